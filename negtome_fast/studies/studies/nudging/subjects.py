"""The models, what each has memorised, and the methods that are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....config import NegToMeConfig
from ....models import avatars as world
from ....nudging import CallableFilter, Filter, PixelDistance, ReferenceBank
from ...sampler import Sampler
from ...toy_model import overfit

PIXELS = 0.10
"""An output is a copy if its root mean square difference to a memorised image is below this."""

DESIRED, FEW_DESIRED = 40, 6
"""Number of ordinary avatars per prompt that images are steered toward."""

DESIRED_SEED = 9_500

NEGTOME = NegToMeConfig(alpha=1.5, threshold=0.2, t_start=1000, t_end=400)


@dataclass(frozen=True)
class RetryMethod:
    """A way to generate flagged images again: arguments of `generate_with_nudging`."""

    label: str
    method: Any
    desired: bool = False
    negtome: NegToMeConfig | None = None


METHODS: dict[str, RetryMethod] = {
    "reseed": RetryMethod("re-seeding", "reseed"),
    "nudge": RetryMethod("nudge", "nudge", desired=True),
    "both": RetryMethod("both", "both", desired=True, negtome=NEGTOME.with_overrides(alpha=0.5)),
    "negtome": RetryMethod("NegToMe", "negtome", negtome=NEGTOME),
    "away": RetryMethod("nudge, undesired points alone", "nudge"),
}
PLAIN = "plain"


@dataclass(frozen=True)
class Subject:
    """A model and what it has memorised.

    Attributes:
        name: identifier in the result.
        label: name for readers.
        pipe: the pipeline.
        weights: identity of the weights in the store.
        bank: the memorised images, named by the prompts that draw them.
        filters: filters that judge the model's outputs.
    """

    name: str
    label: str
    pipe: Any
    weights: str
    bank: ReferenceBank
    filters: tuple[Filter, ...]


def subjects(sampler: Sampler, quick: bool) -> list[Subject]:
    """Return both models, or only the embedded one for a rehearsal.

    The overfitted model is trained first if it is missing.
    """
    embedded = _embedded(sampler)
    return [embedded] if quick else [embedded, _overfitted()]


def _embedded(sampler: Sampler) -> Subject:
    def protected(images: Tensor) -> list[float]:
        return [float(one["character"] != "none") for one in sampler.reader.read(images * 2 - 1)]

    drawn = [(name, world.render(avatar)) for name, (avatar, _) in world.CHARACTERS.items()]
    bank = ReferenceBank.build(drawn, size=world.IMAGE_SIZE)
    filters = (PixelDistance(bank, PIXELS), CallableFilter(protected, 0.5, "reader"))
    return Subject("characters", "protected characters", sampler.pipe, "embedded", bank, filters)


def _overfitted() -> Subject:
    if not (overfit.FOLDER / overfit.RECORD).is_file():
        overfit.main([])
    weights = overfit.FOLDER / "transformer" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    memorised = ReferenceBank(tuple(overfit.targets()), overfit.target_images())
    filters = (PixelDistance(memorised, PIXELS),)
    pipe = overfit.load_overfitted()
    return Subject("overfitted", "overfitted variant", pipe, digest, memorised, filters)


def fitting(prompt: str, count: int, seed: int) -> Tensor:
    """Return ordinary avatars that show what the prompt names, uint8 (count, 3, 64, 64).

    The attributes that the prompt leaves open are drawn evenly.
    """
    named, random = world.attributes_in(prompt), np.random.default_rng(seed)
    avatars = []
    for number in range(count):
        chosen = {
            name: named.get(name) or values[random.integers(len(values))]
            for name, values in world.ATTRIBUTES.items()
        }
        avatars.append(world.Avatar(seed=f"{seed}-{number}", **chosen))
    return rendered(avatars)


def rendered(avatars: Sequence[world.Avatar]) -> Tensor:
    """Return pictures of the avatars, uint8 (N, 3, 64, 64)."""
    drawn = np.stack([world.render(avatar) for avatar in avatars])
    return torch.from_numpy(np.ascontiguousarray(drawn.transpose(0, 3, 1, 2)))


def desired(subject: Subject, prompts: Sequence[str], count: int) -> dict[str, ReferenceBank]:
    """Return `count` fitting ordinary avatars for each prompt, without those that filters flag."""
    banks = {}
    for number, prompt in enumerate(prompts):
        images = fitting(prompt, count, DESIRED_SEED + number)
        names = tuple(f"{prompt} {i}" for i in range(count))
        banks[prompt] = ReferenceBank(names, images).passing(subject.filters)
    return banks
