"""Going away from blurred pictures, for images with more contrast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ....generation import Settings, blurred
from ....models.avatars import attributes_in, render
from ...conditions import Condition
from ...measures import contrast
from ...sampler import balanced_avatars
from ...samples import Samples
from ...scores import Scores
from ..study import PROMPTS, StudyRun
from .common import GROUP, UNGUIDED, Values, compared, own_references, picture, settings, unguided

if TYPE_CHECKING:
    from PIL.Image import Image

ALPHAS = (0.3, 0.9)

SCALES = (2.5, 1.0)
"""Guidance scales. At 1, without classifier-free guidance, images are worse, and gain more."""

BLUR = Settings.blur
"""Radius of the blur in pixels, of 64."""


def run_sharpen(run: StudyRun, scale: float) -> dict[str, Any]:
    """Push away from each image's own blurred copy, or from a blurred picture of its style."""
    base = unguided(run, PROMPTS, scale)
    copies = blurred_copies(base)
    drawn = {UNGUIDED: base, **_sharpened(run, base, copies, scale)}
    scores = run.scores(drawn)
    real = torch.nn.functional.normalize(scores[UNGUIDED].real.features, dim=-1)

    def values(one: Scores) -> Values:
        unit = torch.nn.functional.normalize(one.features, dim=-1)
        return {
            "contrast": contrast(one.samples.pixels()),
            "cosine with the nearest real image": (unit @ real.T).amax(1).double(),
            "precision": one.inside.double(),
            "prompt kept": one.hits.double(),
        }

    run.sheet(
        f"sharpen-{scale:g}",
        f"Away from what is blurred, guidance scale {scale:g}",
        {UNGUIDED: base, "their blurred copies": copies}
        | {f"NegToMe, {name}": one for name, one in drawn.items() if one is not base},
    )
    return {
        "scale": scale,
        "blurred_contrast": round(float(contrast(copies.pixels()).mean()), 4),
        "conditions": compared(scores, values),
    }


def _sharpened(run: StudyRun, base: Samples, copies: Samples, scale: float) -> dict[str, Samples]:
    """Draw every kind of reference at every alpha."""
    from ....pipelines import Reference

    def own(item: int) -> Image:
        return _image(copies, item)

    def of_style(item: int) -> Image:
        from PIL import Image

        style = attributes_in(base.prompts[item])["style"]
        return blurred(Image.fromarray(picture(style)), BLUR)

    kinds: dict[str, tuple[Callable[[int], Image], int]] = {"own blurred copy": (own, 1)}
    if scale == SCALES[0]:
        kinds["blurred picture of the style"] = (of_style, GROUP)
    drawn = {}
    for kind, (source, size) in kinds.items():
        for alpha in run.sizes.chosen(ALPHAS, ALPHAS[:1]):

            def condition(
                item: int, source: Callable[[int], Image] = source, alpha: float = alpha
            ) -> Condition:
                return Condition(
                    "sharpened",
                    guidance_scale=scale,
                    negtome=settings("sharpen", alpha=alpha),
                    references=(Reference(source(item)),),
                )

            name = f"{kind}, alpha {alpha:g}"
            drawn[name] = own_references(run, base, name, condition, size)
    return drawn


def blurred_copies(samples: Samples) -> Samples:
    """Return the same samples with blurred images; features and readings stay unchanged."""
    images = [blurred(_image(samples, item), BLUR) for item in range(len(samples))]
    return replace(
        samples, images=np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
    )


def _image(samples: Samples, item: int) -> Image:
    from PIL import Image

    return Image.fromarray(samples.images[item].transpose(1, 2, 0))


def real_contrast(count: int) -> float:
    """Return the mean contrast of `count` balanced real images."""
    images = np.stack([render(avatar) for avatar in balanced_avatars(count)])
    return float(contrast(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).mean())
