"""Equal tokens tie, however their cosines are rounded: the first copy is chosen.

The tokens are random, so that a product whose rounding depends on the place in a tile would break
ties. The reference backend is left out: its product is one call of a library, which may do that.
"""

from __future__ import annotations

import pytest
import torch

from helpers.cases import tokens
from helpers.device import BACKENDS, DEVICE
from negtome_fast.functional import guide_tokens

FAST = [backend for backend in BACKENDS if backend != "reference"]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("matching", ["paper", "official"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# With the second, copies start at every place in a tile, and the last tile is incomplete.
@pytest.mark.parametrize(("distinct", "copies"), [(64, 8), (37, 9)])
def test_the_first_of_equal_tokens_is_chosen(
    distinct: int, copies: int, dtype: torch.dtype, matching: str, backend: str
) -> None:
    some = tokens(torch.Generator().manual_seed(0), (3, distinct, 96), dtype)
    x = some.repeat(1, copies, 1).to(DEVICE)
    for reference in ("first", "others"):
        _, _, pushed = guide_tokens(
            x, reference, threshold=-1.0, matching=matching, backend=backend
        )
        token = pushed[pushed >= 0] % x.shape[1]
        assert token.numel() > 0
        assert int(token.max()) < distinct
        assert len(token.unique()) > 1


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("rows", "distinct", "copies", "channels"),
    [(1, 64, 8, 96), (3, 64, 8, 96), (3, 5, 23, 100), (50, 3, 3, 640), (200, 3, 3, 24)],
)
def test_the_first_of_equal_tokens_is_chosen_where_few_meet(
    rows: int, distinct: int, copies: int, channels: int, backend: str
) -> None:
    # Libraries multiply small or narrow matrices, and the last columns, in other ways.
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(distinct, channels, generator=generator).repeat(copies, 1).to(DEVICE)
    x = torch.randn(8, rows, channels, generator=generator).to(DEVICE)
    _, _, pushed = guide_tokens(x, reference, threshold=-1.0, backend=backend)
    assert bool(((pushed >= 0) & (pushed < distinct)).all())
