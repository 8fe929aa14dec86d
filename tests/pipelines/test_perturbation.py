"""An oracle without a table: what the guidance is handed is what a pixel of the noise moves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.families import FAMILIES
from helpers.families.core import LoopFamily
from helpers.families.stepped import COSMOS, STABLE_VIDEO
from helpers.families.unlisted import UNLISTED
from helpers.perturbation import disagreements
from negtome_fast.pipelines import ImageTokens, Layout, known_layouts, layouts, register_layout

REFUSALS = r"describe the model with .*register_layout|does not count timesteps from 1000"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test change the table of layouts."""
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))


@pytest.mark.parametrize("placement", ["output", "pre_projection"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_guided_is_what_the_noise_moves(name: str, placement: str) -> None:
    family = FAMILIES[name]
    assert disagreements(family, family.build(), placement=placement, grids=True) == []


@pytest.mark.parametrize("placement", ["output", "pre_projection"])
@pytest.mark.parametrize("family", [COSMOS, STABLE_VIDEO], ids=lambda family: family.model)
def test_so_it_is_where_windows_are_in_steps(family: LoopFamily, placement: str) -> None:
    settings: dict[str, Any] = {"placement": placement, "steps": (0.0, 1.0), "grids": True}
    assert disagreements(family, family.build(), **settings) == []


SERVED_UNKNOWN = (
    *("sd3", "qwen", "pixart-alpha", "pixart-sigma", "sana", "hunyuan-dit", "cogview4", "prx"),
    *("cogview3-plus", "hunyuan-image", "nucleus", "hunyuan video", "cogvideox", "mochi", "ltx"),
    *("easyanimate", "consisid", "ltx 2", "wan", "dit", "any flow", "motif"),
)
"""Families that are served without a layout: they give the model the generated tokens alone."""


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("name", [*FAMILIES, *UNLISTED])
def test_a_class_without_a_layout_is_guided_exactly_or_refused(name: str) -> None:
    layouts._LAYOUTS.clear()
    family = {**FAMILIES, **UNLISTED}[name]
    if name in SERVED_UNKNOWN:
        assert disagreements(family, family.build()) == []
        return
    try:
        wrong = disagreements(family, family.build())
    except ValueError as error:
        assert re.search(REFUSALS, str(error)), error
    else:
        assert wrong == []


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("name", ["sd3", "qwen", "mochi", "ltx", "prx"])
def test_without_a_layout_too_the_image_is_found_before_the_projection(name: str) -> None:
    layouts._LAYOUTS.clear()
    family = FAMILIES[name]
    assert disagreements(family, family.build(), placement="pre_projection") == []


def with_tokens(layout: Layout, **changes: Any) -> Layout:
    """Return a layout whose image tokens are changed; a value may be a function of them."""

    def changed(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
        tokens = layout.image_tokens(model, arguments)
        assert tokens is not None
        values = {k: v(tokens) if callable(v) else v for k, v in changes.items()}
        return replace(tokens, **values)

    return replace(layout, image_tokens=changed)


PLANTED: dict[str, tuple[str, Callable[[Layout], Layout]]] = {
    "text after the image": ("flux", lambda layout: replace(layout, joint="image_first")),
    "text before the image": ("ernie", lambda layout: replace(layout, joint="text_first")),
    "transposed grid": ("sd3", lambda own: with_tokens(own, grid=lambda t: t.grid[::-1])),
    "transposed frames": ("wan", lambda own: with_tokens(own, grid=lambda t: t.grid[::-1])),
    "the given image, too": (
        "flux-kontext",
        lambda own: with_tokens(own, generated=lambda t: t.num_tokens, grid=None),
    ),
    "the given frame, too": (
        "wan image-to-video by token",
        lambda own: with_tokens(own, generated=lambda t: t.num_tokens, offset=0, frames=3),
    ),
    "one token early": (
        "lumina2",
        lambda own: with_tokens(own, starts=lambda t: tuple(start - 1 for start in t.starts)),
    ),
    "one row short": ("ideogram4", lambda own: with_tokens(own, generated=18, grid=(3, 6))),
    "text, too": (
        "ideogram4",
        lambda own: with_tokens(own, generated=lambda t: t.num_tokens, grid=None, offset=0),
    ),
    "half of the blocks": ("sd15", lambda own: replace(own, grid_modules=())),
}
"""Kind of error -> a family, and what makes its layout wrong."""


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("error", PLANTED)
def test_an_error_that_is_planted_in_a_layout_is_found(error: str) -> None:
    name, spoil = PLANTED[error]
    family = FAMILIES[name]
    register_layout(family.model, spoil(known_layouts()[family.model]))
    try:
        found = disagreements(family, family.build())
    except ValueError as refused:  # by the pipeline's own latents, before a block was guided
        assert re.search(REFUSALS, str(refused)), refused
    else:
        assert found != []
