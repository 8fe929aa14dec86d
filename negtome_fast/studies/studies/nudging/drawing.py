"""Outputs of a model with each method, drawn a few prompts at a time and kept in the store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .... import models
from ....models.avatars import IMAGE_SIZE
from ....nudging import NudgeSchedule, generate_with_nudging
from ... import store
from ..study import SEED, StudyRun
from .subjects import DESIRED, FEW_DESIRED, METHODS, PIXELS, PLAIN, Subject, desired

ATTEMPTS = 4
"""Maximum number of generations of an image, the plain one included."""

CHUNK = 2
"""Number of prompts that are drawn together and kept as one file."""

SCHEDULE = NudgeSchedule()

_FORMAT = 1
"""Store version; bump it when the same settings yield different images."""


def call_arguments(steps: int) -> dict[str, Any]:
    """Return arguments of every call of the pipelines."""
    return {
        "true_cfg_scale": models.GUIDANCE_SCALE,
        "num_inference_steps": steps,
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "max_sequence_length": models.TEXT_LENGTH,
        "output_type": "pt",
    }


@dataclass(frozen=True)
class Drawn:
    """Outputs of a method, prompt by prompt.

    Attributes:
        images: (N, 3, 64, 64) in [0, 1].
        attempts: number of generations of each image.
        passed: True for each image that the filters let through.
    """

    images: Tensor
    attempts: list[int]
    passed: list[bool]


class SubjectDrawing:
    """Outputs of a model with any method; draws those that the store does not have."""

    def __init__(self, run: StudyRun, subject: Subject, prompts: Sequence[str], each: int) -> None:
        self._run, self.subject = run, subject
        self.prompts, self.each = tuple(prompts), each
        self._count = FEW_DESIRED if run.sizes.quick else DESIRED
        self.desired = desired(subject, prompts, self._count)

    def method(self, name: str, tick: Callable[[int], Any]) -> Drawn:
        """Return the outputs of `PLAIN` or of a name in `METHODS`.

        Args:
            name: the method.
            tick: called with the number of images after each chunk.
        """
        parts = []
        for start in range(0, len(self.prompts), CHUNK):
            prompts = self.prompts[start : start + CHUNK]
            seeds = [
                SEED + 10_000 * (start + i) + j
                for i in range(len(prompts))
                for j in range(self.each)
            ]
            parts.append(self._chunk(name, prompts, seeds))
            tick(len(seeds))
        return Drawn(
            torch.cat([part.images for part in parts]),
            [count for part in parts for count in part.attempts],
            [passed for part in parts for passed in part.passed],
        )

    def _chunk(self, name: str, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        def make() -> store.Arrays:
            drawn = self._generated(name, prompts, seeds)
            return {
                "images": (drawn.images.clamp(0, 1) * 255).round().byte().numpy(),
                "attempts": np.array(drawn.attempts),
                "passed": np.array(drawn.passed),
            }

        # Read as stored, so that a resumed run measures the same as an uninterrupted one.
        rows = dict.fromkeys(("images", "attempts", "passed"), len(seeds))
        kept = store.fetch(self._path(name, prompts, seeds), make, rows=rows)
        images = torch.from_numpy(kept["images"]).float() / 255
        return Drawn(images, kept["attempts"].tolist(), kept["passed"].tolist())

    def _generated(self, name: str, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        subject, plain = self.subject, name == PLAIN
        method = METHODS["reseed" if plain else name]
        result = generate_with_nudging(
            subject.pipe,
            list(prompts),
            filters=subject.filters,
            undesired=subject.bank,
            desired=self.desired if method.desired else None,
            method=method.method,
            negtome=method.negtome,
            schedule=SCHEDULE,
            max_attempts=1 if plain else ATTEMPTS,
            num_images_per_prompt=self.each,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            first=None if plain else self._chunk(PLAIN, prompts, seeds).images,
            negative_prompt=[""] * len(prompts),
            **call_arguments(self._run.sizes.steps),
        )
        attempts = [len(rows) for rows in result.attempts]
        return Drawn(torch.stack(result.images), attempts, list(result.passed))

    def _path(self, name: str, prompts: Sequence[str], seeds: Sequence[int]) -> Path | None:
        folder = self._run.sampler.store
        if folder is None:
            return None
        identity: dict[str, Any] = {
            "format": _FORMAT,
            "weights": self.subject.weights,
            "steps": self._run.sizes.steps,
            "prompts": list(prompts),
            "seeds": list(seeds),
            "torch": torch.__version__,
        }
        if name != PLAIN:
            method = METHODS[name]
            identity |= {
                "method": method.method,
                "desired": self._count if method.desired else 0,
                "negtome": None if method.negtome is None else method.negtome.to_dict(),
                "schedule": asdict(SCHEDULE),
                "pixels": PIXELS,
                "attempts": ATTEMPTS,
            }
        # `store.digest` has other separators; the names of stored files must stay.
        text = json.dumps(identity, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return folder / "nudging" / self.subject.name / f"{name}-{digest}.npz"
