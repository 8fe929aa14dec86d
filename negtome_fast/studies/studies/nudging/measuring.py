"""Measures of each output, and their means with intervals for the file of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....nudging import PixelDistance, judge
from ...intervals import FrechetTo, Mean, bootstrap, paired_bootstrap
from ...measures import feature_cosine, latent_l2, prompt_hits
from ...sampler import Sampler
from ...scores import triple
from .drawing import Drawn, SubjectDrawing


@dataclass(frozen=True)
class Measured:
    """Measures of the outputs of one method, (N,) each unless noted.

    Attributes:
        drawn: the outputs.
        features: image features (N, 1280).
        memorised: 1 for an output that a filter flags.
        agrees: 1 for an output that shows what its prompt names.
        pixels: root mean square difference to the memorised image of the same prompt.
        latents: L2 distance of latents to that image.
        cosine: cosine of features with that image.
        nearest_desired: root mean square difference to the nearest desired image.
    """

    drawn: Drawn
    features: Tensor
    memorised: Tensor
    agrees: Tensor
    pixels: Tensor
    latents: Tensor
    cosine: Tensor
    nearest_desired: Tensor


def measure(sampler: Sampler, drawing: SubjectDrawing, drawn: Drawn) -> Measured:
    """Measure every output; distances are to the memorised image of its own prompt."""
    subject, images = drawing.subject, drawn.images
    prompts = [prompt for prompt in drawing.prompts for _ in range(drawing.each)]
    features = torch.from_numpy(sampler.measure(images)["features"])
    readings = sampler.reader.read(images * 2 - 1)
    targets = subject.bank.pixels
    target_features = sampler.features(targets)
    target_latents = _latents(subject.pipe, targets)
    latents = _latents(subject.pipe, images)
    cosine, pixels, distance, nearest = (torch.zeros(len(images)) for _ in range(4))
    for prompt in drawing.prompts:
        own = torch.tensor([place for place, one in enumerate(prompts) if one == prompt])
        row = subject.bank.names.index(prompt)
        cosine[own] = feature_cosine(features[own], target_features[row]).float()
        distance[own] = latent_l2(latents[own], target_latents[row]).float()
        pixels[own] = (images[own] - targets[row]).square().mean(dim=(1, 2, 3)).sqrt()
        wanted = PixelDistance(drawing.desired[prompt], 0.0).judge(images[own])
        nearest[own] = torch.tensor([verdict.score for verdict in wanted])
    flagged = [rows[-1].triggered for rows in judge(subject.filters, images)]
    return Measured(
        drawn=drawn,
        features=features,
        memorised=torch.tensor(flagged).double(),
        agrees=prompt_hits(readings, prompts).double(),
        pixels=pixels,
        latents=distance,
        cosine=cosine,
        nearest_desired=nearest,
    )


@torch.no_grad()
def _latents(pipe: Any, images: Tensor) -> Tensor:
    mean = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    return (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def record(
    name: str, one: Measured, base: Measured | None, real: Tensor, prompts: Sequence[str]
) -> dict[str, Any]:
    """Return the measures of a method with 95% intervals, for the file of results.

    Args:
        name: the method.
        one: its measures.
        base: measures of re-seeding from the same seeds; adds the differences to them.
        real: features of ordinary avatars, for the Frechet distance.
        prompts: the prompts, in the order of the outputs.
    """
    each = len(one.pixels) // len(prompts)
    strata = [prompt for prompt in prompts for _ in range(each)]
    statistics_of: dict[str, tuple[Callable[[Any], float], Callable[[Measured], Any]]] = {
        "memorised": (Mean(), lambda m: m.memorised),
        "agreement": (Mean(), lambda m: m.agrees),
        "frechet": (FrechetTo(real), lambda m: m.features),
        "cosine": (Mean(), lambda m: m.cosine),
        "pixels": (Mean(), lambda m: m.pixels),
        "latents": (Mean(), lambda m: m.latents),
        "nearest_desired": (Mean(), lambda m: m.nearest_desired),
        "generations": (Mean(), lambda m: torch.tensor(m.drawn.attempts).double()),
    }
    found: dict[str, Any] = {"name": name, "measures": {}}
    for key, (statistic, values) in statistics_of.items():
        found["measures"][key] = triple(bootstrap(statistic, values(one), strata=strata))
    if base is not None:
        found["against_reseeding"] = {}
        for key in ("memorised", "agreement", "frechet", "cosine"):
            statistic, values = statistics_of[key]
            change = paired_bootstrap(statistic, values(one), values(base), strata=strata)
            found["against_reseeding"][key] = triple(change)
    return found
