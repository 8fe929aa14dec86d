"""An oracle without a table: what the guidance is handed is what a pixel of the noise moves."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.families import FAMILIES
from helpers.perturbation import disagreements


@pytest.mark.parametrize("placement", ["output", "pre_projection"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_guided_is_what_the_noise_moves(name: str, placement: str) -> None:
    family = FAMILIES[name]
    assert disagreements(family, family.build(), placement=placement) == []
