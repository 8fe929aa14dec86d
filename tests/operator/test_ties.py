"""Equal tokens tie, however their cosines are rounded: the first copy is chosen.

The tokens are random, so that a product whose rounding depends on the place in a tile would break
ties. The reference backend is left out: its product is one call of a library, which may do that.
"""

from __future__ import annotations

import pytest
import torch

from helpers.cases import tokens
from helpers.device import BACKENDS, DEVICE
from helpers.fuzz_problems import PATHS, rounding_by_place
from negtome_fast.backends import coarse, equal
from negtome_fast.functional import guide_tokens, match_tokens

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


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round equal columns of a product otherwise, by their place and the product's width."""
    monkeypatch.setattr(torch, "mm", rounding_by_place(torch.mm))
    monkeypatch.setattr(torch, "bmm", rounding_by_place(torch.bmm))


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead the torch backend on one of its paths, in small blocks."""
    for module, values in PATHS[path].items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


def assert_lowest(x: torch.Tensor, distinct: int, reference: str, matching: str) -> None:
    _, _, pushed = guide_tokens(
        x, reference, threshold=-1.0, matching=matching, backend="torch", combine="sum"
    )
    token = pushed[pushed >= 0] % x.shape[1]
    assert token.numel() > 0
    assert int(token.max()) < distinct


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("matching", ["paper", "official"])
@pytest.mark.parametrize("reference", ["first", "others"])
def test_the_first_is_chosen_however_a_library_rounds(
    reference: str,
    matching: str,
    dtype: torch.dtype,
    count: int,
    path: str,
    uneven: None,
    threads: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The last block is narrower: 300 tokens are 256 and 44.
    take(path, monkeypatch)
    torch.set_num_threads(count - 1)
    x = tokens(torch.Generator().manual_seed(0), (count, 75, 32), dtype).repeat(1, 4, 1)
    assert_lowest(x, 75, reference, matching)


@pytest.mark.parametrize(
    ("count", "channels", "workers"),
    [(1124, 1280, 1), (1700, 1280, 1), (1700, 1280, 2), (4096, 1536, 2)],
)
def test_the_narrower_last_block_of_columns_is_no_exception(
    count: int, channels: int, workers: int, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # These lost ties by the rounding of a library, without int8 too.
    monkeypatch.setattr(coarse, "has_int8_products", lambda: False)
    torch.set_num_threads(workers)
    some = torch.randn(2, count // 2, channels, generator=torch.Generator().manual_seed(0))
    assert_lowest(some.repeat(1, 2, 1), count // 2, "first", "official")


@pytest.mark.parametrize("matching", ["paper", "official"])
@pytest.mark.parametrize("path", PATHS)
def test_a_picture_handed_over_twice_is_the_first_where_its_mask_allows(
    path: str, matching: str, uneven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(path, monkeypatch)
    check_twice(items=2, count=200, channels=40, matching=matching)


def test_a_large_picture_handed_over_twice_is_the_first_where_its_mask_allows() -> None:
    # With int8 products, the masked part was scored by pairs, and all of it by a product.
    check_twice(items=1, count=2304, channels=3072, matching="paper")


def check_twice(items: int, count: int, channels: int, matching: str) -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(count, channels, generator=generator)
    x = picture + 0.7 * torch.randn(items, count, channels, generator=generator)
    mask = torch.ones(2, count, dtype=torch.bool)
    mask[0] = torch.rand(count, generator=generator) < 0.5
    y, _, pushed = guide_tokens(
        x,
        picture.expand(2, -1, -1),
        alpha=torch.tensor([1.5, -0.5]),
        threshold=0.3,
        reference_mask=mask,
        matching=matching,
        backend="torch",
    )
    slot, token = pushed[:, 0] // count, pushed[:, 0] % count
    allowed = mask[0][token] if matching == "paper" else mask[0].expand(items, count)
    assert bool((pushed >= 0).any()) and bool(allowed.any()) and not bool(allowed.all())
    assert torch.equal(slot[pushed[:, 0] >= 0], (~allowed)[pushed[:, 0] >= 0].long())
    alpha = torch.where(allowed, 1.5, -0.5)[..., None]
    torch.testing.assert_close(y, x + alpha * (x - picture[token]))


@pytest.mark.parametrize("path", PATHS)
def test_equal_items_are_one_another_s_lowest_reference(
    path: str, uneven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Items 0 and 2 are equal: item 1 meets item 0, item 0 meets item 2, item 3 meets item 0.
    take(path, monkeypatch)
    x = tokens(torch.Generator().manual_seed(0), (4, 100, 32))
    x[2] = x[0]
    similarity, index = match_tokens(x, "others", backend="torch")
    assert bool((similarity > -1).all())
    assert not bool((index[[1, 3]] // 100 == 2).any())
    assert bool((index[[1, 3]] // 100 == 0).any())
    assert torch.equal(index[0], torch.arange(100) + 200)
    assert torch.equal(index[2], torch.arange(100))


class TestEqualTokens:
    """The search for equal tokens itself."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("count", [5, 300])
    def test_tokens_that_differ_in_signs_alone_are_told_apart(
        self, count: int, dtype: torch.dtype
    ) -> None:
        signs = torch.randn(count, 9, generator=torch.Generator().manual_seed(0)).sign().to(dtype)
        expected = (signs[:, None] == signs).all(dim=2).float().argmax(dim=1)
        assert torch.equal(equal.lowest(signs), expected)

    def test_sums_that_agree_by_chance_are_followed_by_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = equal._keys

        def useless_at_first(values: torch.Tensor, attempt: int = 0) -> torch.Tensor:
            found = keys(values, attempt)
            return torch.zeros_like(found) if attempt == 0 else found

        monkeypatch.setattr(equal, "_keys", useless_at_first)
        some = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
        lowest = equal.lowest(some.repeat(3, 1))
        assert torch.equal(lowest, torch.arange(20).repeat(3))

    def test_tokens_that_share_channels_are_told_apart_by_the_others(self) -> None:
        some = torch.randn(20, 96, generator=torch.Generator().manual_seed(0))
        some[:, ::12] = 1.0
        some[:, 1] = 1.0
        assert not equal.differ(some)
        assert torch.equal(equal.lowest(some), torch.arange(20))
