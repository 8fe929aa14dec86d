"""Other forms of the push: the prototypes compute what docs/beyond.md says of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench._path import ROOT
from docs.render.pages import render
from helpers.cases import tokens
from negtome_fast import guidance
from negtome_fast.functional import guide_tokens
from negtome_fast.studies.studies.variants import Variant


@pytest.fixture
def x() -> Tensor:
    return tokens(torch.Generator().manual_seed(0), (6, 40, 16))


def moved(x: Tensor, alpha: float = 0.9, **form: object) -> tuple[Tensor, ...]:
    """(tokens before, after, similarity) of those that a form moves; there are some."""
    y, similarity, at = Variant(**form).push(x, alpha, 0.65, groups=2)
    moves = at[:, 0] >= 0
    assert torch.equal(y[~moves], x[~moves])
    assert 20 < int(moves.sum()) < moves.numel()
    return x[moves], y[moves], similarity[:, 0][moves]


def test_without_a_form_it_is_the_operator(x: Tensor) -> None:
    y, similarity, at = Variant().push(x, 0.9, 0.65, groups=2)
    expected = guide_tokens(x, "others", alpha=0.9, threshold=0.65, groups=2)
    torch.testing.assert_close(y, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(similarity, expected[1], rtol=0, atol=1e-6)
    assert torch.equal(at >= 0, expected[2] >= 0)


def test_preserved_length(x: Tensor) -> None:
    before, after, _ = moved(x, preserve=True)
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))


def test_excess_scales_the_operators_push(x: Tensor) -> None:
    before, after, similarity = moved(x, excess=True)
    plain = moved(x)[1]
    weight = ((similarity - 0.65) / 0.35)[:, None]
    torch.testing.assert_close(after - before, weight * (plain - before), rtol=1e-4, atol=1e-5)


def test_nearest_by_distance(x: Tensor) -> None:
    y, _, at = Variant(distance=True).push(x[:3], 1.0, 0.65, groups=1)
    others = torch.cat([x[1], x[2]])
    nearest = others[torch.cdist(x[0], others).argmin(1)]
    moves = at[0, 0] >= 0
    assert bool(moves.any())
    torch.testing.assert_close(y[0, moves], (2 * x[0] - nearest)[moves])


def test_means_of_several_matches(x: Tensor) -> None:
    unit = torch.nn.functional.normalize(x[:3], dim=-1)
    others = torch.cat([x[1], x[2]])
    cosine = unit[0] @ torch.cat([unit[1], unit[2]]).T
    found = cosine.topk(4, dim=1)
    weights = {
        "best": ({"best": 4}, torch.full((40, 4), 0.25)),
        "softmax": ({"best": 4, "temperature": 0.1}, (found.values / 0.1).softmax(1)),
    }
    for form, weight in weights.values():
        y, _, at = Variant(**form).push(x[:3], 1.0, 0.65, groups=1)
        mean = (weight[..., None] * others[found.indices]).sum(1)
        moves = at[0, 0] >= 0
        torch.testing.assert_close(y[0, moves], (2 * x[0] - mean)[moves], rtol=1e-4, atol=1e-5)


def test_centred_cosine_does_not_see_a_common_shift(x: Tensor) -> None:
    variant = Variant(centred=True)
    y, similarity, _ = variant.push(x[:3], 0.9, 0.5, groups=1)
    shifted = variant.push(x[:3] + 7.0, 0.9, 0.5, groups=1)
    torch.testing.assert_close(shifted[0] - 7.0, y, rtol=0, atol=1e-4)
    torch.testing.assert_close(shifted[1], similarity, rtol=0, atol=1e-4)


def test_decay_and_the_operator_put_back(x: Tensor) -> None:
    class Pipe:
        transformer = torch.nn.Identity()

        def forward(self, timestep: float) -> Tensor:
            time = torch.tensor([timestep])
            self.transformer.forward = lambda timestep: None  # type: ignore[method-assign]
            self.transformer(timestep=time)
            settings = {"alpha": 0.9, "threshold": 0.65, "groups": 2}
            return guidance.guide_tokens(x, "others", **settings)[0]

    pipe, original = Pipe(), guidance.guide_tokens
    full = Variant().push(x, 0.9, 0.65, groups=2)[0]
    with Variant(decay=True).applied(pipe, prompts=2, images_per_prompt=3):
        assert torch.equal(pipe.forward(1.0), full)
        half = Variant().push(x, 0.45, 0.65, groups=2)[0]
        torch.testing.assert_close(pipe.forward(0.875), half, rtol=0, atol=1e-5)
    assert guidance.guide_tokens is original and not pipe.transformer._forward_pre_hooks


def test_page_shows_the_tables_of_the_file() -> None:
    text = (ROOT / "docs" / "beyond.md").read_text(encoding="utf-8")
    assert render("docs/beyond.md", text) == text
    stale = text.replace("| 3 uncommon |", "| three |")
    assert render("docs/beyond.md", stale) == text != stale
