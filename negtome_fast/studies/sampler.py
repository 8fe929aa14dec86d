"""The sampler of all studies: draws conditions with the embedded pipeline, measures, and stores.

Every batch is stored as soon as it is measured, under a hash of everything that decides its images.
A killed run therefore resumes, and studies share the batches that they have in common.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import models
from ..models.avatars import IMAGE_SIZE, STYLES, Avatar, render_all, sample_avatars
from ..models.features import FeatureExtractor
from ..models.reader import HEADS, AttributeReader, load_reader
from .conditions import BATCH, Condition, Group, batches_of
from .samples import ARRAYS, Samples
from .store import STORE, Arrays, digest, fetch

if TYPE_CHECKING:
    from diffusers import FluxPipeline

_REAL_SEED = 7_000

_FORMAT = 1
"""Store version; bump it when the same condition yields different images."""


class Sampler:
    """The embedded pipeline, the instruments that measure its images, and the store of both.

    Args:
        store: folder of the results; None stores nothing.
        batch: maximum number of images per forward. It is part of the identity of results, since
            rounding depends on it.
        device: device of the pipeline and the instruments.

    Raises:
        ValueError: a store for a device other than the CPU, whose rounding differs.
    """

    def __init__(
        self, store: Path | None = STORE, *, batch: int = BATCH, device: str = "cpu"
    ) -> None:
        if store is not None and device != "cpu":
            raise ValueError(f"the store holds images of the CPU, not of {device}: use store=None")
        self.store = store
        self.batch = batch
        self.device = device

    @cached_property
    def pipe(self) -> FluxPipeline:
        """The embedded pipeline."""
        return models.load_pipeline(self.device)

    @cached_property
    def features(self) -> FeatureExtractor:
        """The network of image features."""
        return FeatureExtractor().to(self.device)

    @cached_property
    def reader(self) -> AttributeReader:
        """The attribute reader."""
        return load_reader()[0].to(self.device)

    def sample(
        self,
        condition: Condition,
        groups: Sequence[Group],
        *,
        tick: Callable[[int], Any] = lambda images: None,
    ) -> Samples:
        """Return the samples of all groups, and draw those that the store does not have.

        Args:
            condition: how the images are made.
            groups: which images.
            tick: called with the number of images after each batch.
        """
        identity = self._identity(condition)
        parts = []
        for batch in batches_of(groups, self.batch):
            draw = partial(self._measured, condition, batch)
            count = sum(len(group.seeds) for group in batch)
            rows = {**dict.fromkeys(ARRAYS, count), "guidance": 3}
            parts.append(fetch(self._path(identity, batch), draw, identity, rows))
            tick(len(parts[-1]["images"]))
        return Samples.from_batches(condition, groups, parts)

    def missing(self, condition: Condition, groups: Sequence[Group]) -> int:
        """Return how many images `sample` would have to draw."""
        identity, missing = self._identity(condition), 0
        for batch in batches_of(groups, self.batch):
            path = self._path(identity, batch)
            if path is None or not path.is_file():
                missing += sum(len(group.seeds) for group in batch)
        return missing

    def draw(
        self, condition: Condition, groups: Sequence[Group], **call: Any
    ) -> tuple[Tensor, tuple[float, float, float]]:
        """Draw one batch of groups of equal size, without the store.

        Args:
            condition: how the images are made.
            groups: the batch.
            call: further arguments of the pipeline's call.

        Returns:
            Images (B, 3, 64, 64) in [0, 1], group by group, and the guidance's counts: tokens,
            share pushed, mean similarity; zeros without guidance.
        """
        from ..pipelines import negtome_guidance

        size = len(groups[0].seeds)
        guided = condition.guidance_scale > 1
        with ExitStack() as stack:
            handle = None
            if condition.negtome is not None:
                config = condition.negtome.with_overrides(groups=len(groups))
                reference = list(condition.references) or None
                guidance = negtome_guidance(self.pipe, config, reference=reference)
                handle = stack.enter_context(guidance)
            if condition.baseline is not None:
                changed = condition.baseline.applied(
                    self.pipe, prompts=len(groups), images_per_prompt=size
                )
                call |= stack.enter_context(changed)
            images: Tensor = self.pipe(
                **{
                    "prompt": [group.prompt for group in groups],
                    "negative_prompt": (
                        [condition.negative_prompt] * len(groups) if guided else None
                    ),
                    "true_cfg_scale": condition.guidance_scale,
                    "num_images_per_prompt": size,
                    "generator": [
                        torch.Generator().manual_seed(seed)
                        for group in groups
                        for seed in group.seeds
                    ],
                    "num_inference_steps": condition.steps,
                    "height": IMAGE_SIZE,
                    "width": IMAGE_SIZE,
                    "max_sequence_length": models.TEXT_LENGTH,
                    "output_type": "pt",
                    **call,
                }
            ).images
            if handle is None:
                return images, (0.0, 0.0, 0.0)
            total = handle.summary().total
            return images, (float(total.tokens), total.pushed, total.similarity)

    def measure(self, images: Tensor) -> Arrays:
        """Return features and reader classes of images (B, 3, 64, 64) in [0, 1]."""
        images = images.to(self.device)
        readings = self.reader.read(images * 2 - 1)
        return {
            "features": self.features(images).cpu().numpy(),
            "indices": np.array(
                [[HEADS[head].index(reading[head]) for head in HEADS] for reading in readings]
            ),
        }

    def real_features(self, count: int, *, decoded: bool = False) -> Tensor:
        """Return features (count, 1280) of real images, balanced over styles and attributes.

        A larger count begins with the images of a smaller one.

        Args:
            count: number of images, a multiple of the number of styles.
            decoded: pass the images through the model's VAE first, which shows the best that the
                model could draw.

        Raises:
            ValueError: `count` is not a multiple of the number of styles.
            ImportError: the renderer is missing; names the extra to install.
        """
        if count < 1 or count % len(STYLES):
            raise ValueError(f"{count} real images do not divide into {len(STYLES)} styles")
        identity = {
            "format": _FORMAT,
            "real": count,
            "decoded": decoded,
            "model": self._model if decoded else None,
        }

        def make() -> Arrays:
            images = torch.from_numpy(render_all(balanced_avatars(count))).permute(0, 3, 1, 2) / 255
            parts = [
                self.features(self._decoded(part) if decoded else part)
                for part in images.split(BATCH)
            ]
            return {"features": torch.cat(parts).numpy()}

        path = None if self.store is None else self.store / f"real-{digest(identity)}.npz"
        return torch.from_numpy(fetch(path, make, rows={"features": count})["features"])

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Return the VAE's unscaled latents (B, C, h, w) of images (B, 3, 64, 64) in [0, 1]."""
        parts = [
            self.pipe.vae.encode(part * 2 - 1).latent_dist.mode() for part in images.split(BATCH)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def _decoded(self, images: Tensor) -> Tensor:
        decoded: Tensor = self.pipe.vae.decode(self.latents(images)).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    def _measured(self, condition: Condition, batch: Sequence[Group]) -> Arrays:
        began = time.perf_counter()
        drawn, counts = self.draw(condition, batch)
        seconds = time.perf_counter() - began
        images = (drawn.clamp(0, 1) * 255).round().byte().cpu()
        # Measured as stored, so that measuring a stored image again gives the same figures.
        return {
            "images": images.numpy(),
            "seconds": np.full(len(images), seconds / len(images)),
            "guidance": np.array(counts),
            **self.measure(images.float() / 255),
        }

    @cached_property
    def _model(self) -> str:
        return model_hash()

    def _identity(self, condition: Condition) -> dict[str, Any] | None:
        if self.store is None:
            return None
        return {
            "format": _FORMAT,
            "model": self._model,
            "torch": torch.__version__,
            "condition": condition.to_dict(),
        }

    def _path(self, identity: dict[str, Any] | None, batch: Sequence[Group]) -> Path | None:
        if self.store is None:
            return None
        plan = [[group.prompt, *group.seeds] for group in batch]
        return self.store / digest(identity) / f"{digest(plan)}.npz"


def balanced_avatars(count: int, seed: int = _REAL_SEED) -> list[Avatar]:
    """Return balanced avatars, the styles in turn.

    The training data come from the seeds 0, 1000 and 2000, so the default seed repeats none of it.
    """
    each = count // len(STYLES)
    found: dict[str, list[Avatar]] = {style: [] for style in STYLES}
    while any(len(part) < each for part in found.values()):
        for avatar in sample_avatars(256, seed, "balanced"):
            found[avatar.style].append(avatar)
        seed += 1
    return [
        avatar
        for turn in zip(*(part[:each] for part in found.values()), strict=True)
        for avatar in turn
    ]


def model_hash() -> str:
    """Return a hash of weights and settings of the embedded pipeline and the attribute reader."""
    folder = Path(str(models.model_folder()))
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors") and path.name != "training.json":
            found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]
