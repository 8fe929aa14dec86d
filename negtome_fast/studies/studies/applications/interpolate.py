"""Going toward a picture (negative alpha) and away from it (positive alpha)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....models.avatars import OPEN_ATTRIBUTES, STYLES, attributes_in
from ... import measures
from ...conditions import Condition
from ...samples import Samples
from ...scores import Scores
from ..study import PROMPTS, StudyRun
from .common import (
    GROUP,
    UNGUIDED,
    Values,
    compared,
    own_references,
    picture,
    picture_avatar,
    settings,
    shown,
    unguided,
)

ALPHAS = (-0.9, -0.6, -0.3, 0.5, 0.9)

TAKEN = ("its skin", "its hair colour", "its hair shape")
"""Measures that say whether an image has the picture's `OPEN_ATTRIBUTES`, in their order."""


def run_interpolate(run: StudyRun) -> list[dict[str, Any]]:
    """Move each image toward or away from a picture of its prompt's style.

    The measures are the likeness to the picture, and the attributes that are taken from it.
    """
    from ....pipelines import Reference

    base = unguided(run, PROMPTS)
    styles = [attributes_in(prompt)["style"] for prompt in base.prompts]
    drawn = {UNGUIDED: base}
    for alpha in run.sizes.chosen(ALPHAS, ALPHAS[1:2]):

        def condition(item: int, alpha: float = alpha) -> Condition:
            return Condition(
                "moved",
                negtome=settings("interpolate", alpha=alpha),
                references=(Reference(picture(styles[item])),),
            )

        name = f"alpha {alpha:g}"
        drawn[name] = own_references(run, base, name, condition, GROUP)
    _sheet(run, styles, drawn)
    likeness = _Likeness(run, styles)
    return compared(run.scores(drawn), likeness.values)


class _Likeness:
    """Measures of likeness between each image and the picture of its style."""

    def __init__(self, run: StudyRun, styles: list[str]) -> None:
        self._sampler, self._styles = run.sampler, styles
        pictures = {style: _pixels(picture(style)) for style in STYLES}
        self._features = {s: run.sampler.features(one)[0] for s, one in pictures.items()}
        self._latents = {s: run.sampler.latents(one)[0] for s, one in pictures.items()}

    def values(self, one: Scores) -> Values:
        """Return all measures of a condition."""
        latents = self._sampler.latents(one.samples.pixels())
        cosine, distance = [], []
        for item, style in enumerate(self._styles):
            own = slice(item, item + 1)
            cosine.append(measures.feature_cosine(one.features[own], self._features[style]))
            distance.append(measures.latent_l2(latents[own], self._latents[style]))
        avatars = [picture_avatar(style) for style in self._styles]
        taken = {
            name: shown(one.samples, head, [getattr(avatar, head) for avatar in avatars])
            for name, head in zip(TAKEN, OPEN_ATTRIBUTES, strict=True)
        }
        return {
            "cosine": torch.cat(cosine).double(),
            "latent L2": torch.cat(distance).double(),
            **taken,
            "precision": one.inside.double(),
            "prompt kept": one.hits.double(),
        }


def _pixels(picture: np.ndarray) -> Tensor:
    """Return the picture as (1, 3, 64, 64) in [0, 1]."""
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 255


def _sheet(run: StudyRun, styles: list[str], drawn: dict[str, Samples]) -> None:
    base = drawn[UNGUIDED]
    firsts = [base.prompts.index(prompt) for prompt in PROMPTS]
    pictures = replace(
        base.only(firsts),
        images=np.stack([picture(styles[item]).transpose(2, 0, 1) for item in firsts]),
    )
    run.sheet(
        "interpolate",
        "Toward a picture (negative alpha) and away from it",
        {"the pictures": pictures}
        | {
            name if one is base else f"NegToMe, {name}": one
            for name, one in sorted(drawn.items(), key=lambda entry: alpha_of(entry[0]))
        },
    )


def alpha_of(name: str) -> float:
    """Return the alpha in a condition's name; 0 for unguided images."""
    return 0.0 if name == UNGUIDED else float(name.split()[-1])
