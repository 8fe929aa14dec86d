"""Conditions (how images are made) and groups (which images): the plan of what a study draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import models
from ..config import NegToMeConfig
from ..models.avatars import check_prompt

if TYPE_CHECKING:
    from ..pipelines import Reference
    from .rivals import Baseline

BATCH = 32
"""Maximum number of images per forward; on one CPU thread, larger batches are no faster."""

GROUP = 8
"""Default number of images of one prompt that are guided together."""

SEEDS_PER_PROMPT = 10_000
"""Distance between the first seeds of consecutive prompts."""


@dataclass(frozen=True)
class Condition:
    """A way to make images: guidance, scale, steps and rivals.

    Attributes:
        name: label in tables, unique in a study. It is not part of the identity.
        guidance_scale: true classifier-free guidance scale; 1 switches it off.
        steps: number of scheduler steps.
        negtome: the guidance; its `groups` is set for each batch. None: no guidance.
        references: images to push away from, or to pull toward with a negative alpha, instead of
            the batch's own.
        baseline: a rival method, alone or together with `negtome`.
        negative_prompt: the prompt that classifier-free guidance goes away from.

    Raises:
        ValueError: references without `negtome`, or a negative prompt without classifier-free
            guidance.
    """

    name: str
    guidance_scale: float = models.GUIDANCE_SCALE
    steps: int = models.STEPS
    negtome: NegToMeConfig | None = None
    references: tuple[Reference, ...] = field(default=(), compare=False)
    baseline: Baseline | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if self.references and self.negtome is None:
            raise ValueError(f"{self.name}: references need settings of the guidance, negtome=...")
        if self.negative_prompt and self.guidance_scale <= 1:
            raise ValueError(f"{self.name}: a negative prompt needs a guidance scale above 1")

    def to_dict(self) -> dict[str, Any]:
        """Return everything that decides the images, as plain values, without defaults.

        Defaults are left out so that a new field of the guidance, at a default that changes
        nothing, does not change the identity of earlier results.

        Raises:
            TypeError: the baseline is not a dataclass.
        """
        default = NegToMeConfig().to_dict()
        values: dict[str, Any] = {
            "guidance_scale": self.guidance_scale,
            "steps": self.steps,
            "negative_prompt": self.negative_prompt,
        }
        if self.negtome is not None:
            always = ("alpha", "threshold", "t_start", "t_end", "reference", "matching")
            values["negtome"] = {
                name: value
                for name, value in self.negtome.to_dict().items()
                if (name in always or value != default[name]) and name not in ("groups", "backend")
            }
        if self.references:
            values["references"] = [reference_identity(r) for r in self.references]
        if self.baseline is not None:
            name = self.baseline.name
            if not is_dataclass(self.baseline) or isinstance(self.baseline, type):
                raise TypeError(
                    f"the baseline {self.baseline!r} must be a dataclass: its fields identify its "
                    "images"
                )
            values["baseline"] = {"name": name, **asdict(self.baseline)}
        return values


def reference_identity(reference: Reference) -> dict[str, Any]:
    """Return a hash of a reference's pixels and mask, and its settings."""
    loaded = reference.load()
    digest = hashlib.sha256()
    for frame in loaded.frames or ():
        digest.update(f"{frame.size}".encode() + np.asarray(frame).tobytes())
    if loaded.latents is not None:
        digest.update(loaded.latents.detach().cpu().double().numpy().tobytes())
    mask = loaded.settings.mask
    if mask is not None:
        digest.update(f"mask {tuple(mask.shape)}".encode() + mask.cpu().numpy().tobytes())
    settings = {name: getattr(reference, name) for name in ("alpha", "threshold", "noise")}
    return {"image": digest.hexdigest()[:16], **settings}


@dataclass(frozen=True)
class Group:
    """Images of one prompt that see each other, one per seed."""

    prompt: str
    seeds: tuple[int, ...]


def groups_of(
    prompts: Sequence[str], images: int, *, size: int = GROUP, seed: int = 0
) -> list[Group]:
    """Return groups of `size` with `images` images of every prompt, the prompts in turn.

    No two images share a seed, also across prompts, so that prompts are independent samples. A
    larger plan begins with the batches of a smaller one, which are not drawn again.

    Raises:
        ValueError: `images` is too large or no multiple of `size`, or a word is not known.
    """
    if not 0 < images <= SEEDS_PER_PROMPT or images % size:
        raise ValueError(
            f"images per prompt must be 1 to {SEEDS_PER_PROMPT} and divide into groups of {size}, "
            f"got {images}"
        )
    for prompt in prompts:
        check_prompt(prompt)
    return [
        Group(prompt, tuple(number * SEEDS_PER_PROMPT + first + i for i in range(size)))
        for first in range(seed, seed + images, size)
        for number, prompt in enumerate(prompts)
    ]


def batches_of(groups: Sequence[Group], limit: int = BATCH) -> Iterator[list[Group]]:
    """Yield batches of consecutive groups of equal size, at most `limit` images each."""
    batch: list[Group] = []
    for group in groups:
        full = (len(batch) + 1) * len(group.seeds) > limit
        if batch and (full or len(group.seeds) != len(batch[0].seeds)):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch
