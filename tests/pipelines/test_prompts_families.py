"""Two prompts with two images each, in all families: images of one prompt never see the other's.

No table of layouts or of groups is used: the batch is permuted, and the outputs must follow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.families import FAMILIES, core
from helpers.families.core import PipelineFamily, Run, embeddings
from negtome_fast.config import NegToMeConfig
from negtome_fast.pipelines import negtome_guidance

IMAGES = 4
OTHERS = NegToMeConfig(threshold=-1, t_end=0, reference="others")
OWN_CONDITIONS = ("joyimage-edit-plus",)
"""Families whose items have other conditions even for one prompt, so that they have an order."""


def with_two_prompts(name: str) -> Any:
    family = FAMILIES[name]
    if name != "longcat":
        return family
    assert isinstance(family, PipelineFamily)
    two = {"prompt": ["a cat", "a dog"], "negative_prompt": ["", ""], "num_images_per_prompt": 2}
    return replace(family, more={**family.more, **two})


def given_by_prompt(run: Run, *shape: int, seed: int = 3) -> Tensor:
    """Return the conditions (images, *shape) of two prompts, one half of the images each."""
    rows = [embeddings(1, *shape, seed=seed + 100 * prompt) for prompt in range(2)]
    return torch.cat([row.repeat(run.images // 2, *[1] * len(shape)) for row in rows])


@pytest.mark.parametrize("name", FAMILIES)
def test_images_follow_a_permutation_and_prompts_are_apart(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = with_two_prompts(name)
    captions = (5, 5, 7, 7) if family.several_captions else (5,) * IMAGES
    monkeypatch.setattr(Run, "given", given_by_prompt)
    pipe = family.build()

    def generate(*order: int) -> Tensor:
        """Return the images whose noise has these seeds: two of each prompt."""
        monkeypatch.setattr(
            core,
            "noise_generators",
            lambda images, seed: [torch.Generator().manual_seed(seed + i) for i in order],
        )
        with torch.no_grad():
            images: Tensor = family.generate(
                pipe, IMAGES, steps=1, cfg=family.cfg, captions=captions
            )
        return images

    groups = None if family.whole else 2  # a loop without prompts
    with negtome_guidance(pipe, OTHERS, groups=groups) as handle:
        before = generate(0, 1, 2, 3)
        exchanged = (0, 1) if name in OWN_CONDITIONS else (1, 0)
        after = generate(*exchanged, 5, 3)
    # The first prompt's images are exchanged, and the second prompt's first image is another.
    torch.testing.assert_close(after[:2], before[list(exchanged)], rtol=1e-5, atol=1e-6)
    assert (after[3] - before[3]).abs().max() > 1e-5, "it did not see its prompt's other image"
    summary = handle.summary()
    assert summary.groups == 2 * summary.parts
