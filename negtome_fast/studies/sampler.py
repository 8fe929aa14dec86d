"""Images of a condition, drawn in batches of guidance groups and kept in a store that resumes.

A condition says how images are made; a plan says which. Each batch is written once it is measured,
under a hash of everything that decides its images, so that a run that is killed goes on where it
was, and studies share what they have in common.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import models
from ..config import NegToMeConfig
from ..files import write_atomically
from ..models.avatars import (
    IMAGE_SIZE,
    STYLES,
    Avatar,
    check_prompt,
    render_all,
    sample_avatars,
)
from ..models.reader import HEADS, load_reader
from .measures import FeatureExtractor

if TYPE_CHECKING:
    from diffusers import FluxPipeline

    from ..pipelines import Reference
    from .rivals import Baseline

BATCH = 32
"""Images of a forward at most; on one CPU thread larger batches bring nothing."""

GROUP = 8
"""Images of one prompt that are guided together, where a study says nothing else."""

STORE = Path("output/eval")

_SEEDS = 10_000
"""Seeds of a prompt: those of the next one begin after as many."""

_REAL_SEED = 7_000

_FORMAT = 1
"""Of the store; a change of what an unchanged condition draws must raise it."""


@dataclass(frozen=True)
class Condition:
    """How images are made; its name is for tables and decides nothing.

    Attributes:
        name: short and unique in a study.
        guidance_scale: of true classifier-free guidance; 1 switches it off.
        steps: of the scheduler.
        negtome: the guidance; its `groups` is set for each batch. None: no guidance.
        references: images to be pushed away from or, by a negative alpha, pulled toward, in place
            of the batch's own.
        baseline: a rival, alone or together with `negtome`.
        negative_prompt: what classifier-free guidance goes away from.
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
        """Everything that decides the images, as plain values; what is at its default is left out.

        A field that the guidance gains later, at a default that changes nothing, leaves the
        identity of earlier results as it was.
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
            values["references"] = [_reference_identity(r) for r in self.references]
        if self.baseline is not None:
            name = self.baseline.name
            if not is_dataclass(self.baseline) or isinstance(self.baseline, type):
                raise TypeError(
                    f"the baseline {self.baseline!r} must be a dataclass, whose fields are what "
                    "decides its images"
                )
            values["baseline"] = {"name": name, **asdict(self.baseline)}
        return values


@dataclass(frozen=True)
class Group:
    """Images of one prompt that see each other, one for each seed."""

    prompt: str
    seeds: tuple[int, ...]


def groups_of(
    prompts: Sequence[str], images: int, *, size: int = GROUP, seed: int = 0
) -> list[Group]:
    """`images` of every prompt in groups of `size`, the prompts in turn.

    Every image has a seed of its own, also across prompts, so that prompts are independent samples.
    A larger plan begins with the batches of a smaller one, which are not drawn again.

    Raises:
        ValueError: `images` is not a multiple of `size` or too many, or a word is not known.
    """
    if not 0 < images <= _SEEDS or images % size:
        raise ValueError(
            f"{images} images of a prompt must be 1 to {_SEEDS} and divide into groups of {size}"
        )
    for prompt in prompts:
        check_prompt(prompt)
    return [
        Group(prompt, tuple(range(number * _SEEDS + first, number * _SEEDS + first + size)))
        for first in range(seed, seed + images, size)
        for number, prompt in enumerate(prompts)
    ]


def batches_of(groups: Sequence[Group], limit: int = BATCH) -> Iterator[list[Group]]:
    """Consecutive groups of one size that fill a batch."""
    batch: list[Group] = []
    for group in groups:
        full = (len(batch) + 1) * len(group.seeds) > limit
        if batch and (full or len(group.seeds) != len(batch[0].seeds)):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


_ARRAYS = ("images", "features", "indices", "seconds")
"""Of `Samples`, as stored of each batch."""


@dataclass(frozen=True)
class Samples:
    """The images of a condition and what the instruments read in them, in the plan's order.

    Attributes:
        images: uint8 (N, 3, 64, 64).
        features: fp32 (N, 1280) of `FeatureExtractor`.
        indices: int (N, heads): the reader's class of each head of `HEADS`.
        prompts, seeds, groups: of each image; a group is a number from 0.
        seconds: of sampling, each batch divided by its images; of no use where others ran.
        pushed, similarity: of the guidance: share of tokens pushed, mean best cosine; NaN without.
    """

    condition: Condition
    images: np.ndarray
    features: np.ndarray
    indices: np.ndarray
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    groups: np.ndarray
    seconds: np.ndarray
    pushed: float
    similarity: float

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def readings(self) -> list[dict[str, str]]:
        """What the attribute reader sees, one dictionary an image."""
        return [
            {head: values[i] for (head, values), i in zip(HEADS.items(), row, strict=True)}
            for row in self.indices.tolist()
        ]

    def pixels(self) -> Tensor:
        """fp32 (N, 3, 64, 64) in [0, 1]."""
        return torch.from_numpy(self.images).float() / 255

    def only(self, at: Sequence[int]) -> Samples:
        """The samples at these places."""
        where = list(at)
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in where),
            seeds=tuple(self.seeds[i] for i in where),
            groups=self.groups[where],
            **{name: getattr(self, name)[where] for name in _ARRAYS},
        )

    @classmethod
    def joined(cls, parts: Sequence[Samples], name: str) -> Samples:
        """One condition whose parts differ in their references or prompts; groups stay apart."""
        firsts = np.cumsum([0, *(part.groups.max() + 1 for part in parts)])
        weights = np.array([len(part) for part in parts])
        return cls(
            condition=replace(parts[0].condition, name=name),
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            seeds=tuple(seed for part in parts for seed in part.seeds),
            groups=np.concatenate([p.groups + f for p, f in zip(parts, firsts, strict=False)]),
            pushed=float(np.average([part.pushed for part in parts], weights=weights)),
            similarity=float(np.average([part.similarity for part in parts], weights=weights)),
            **{a: np.concatenate([getattr(part, a) for part in parts]) for a in _ARRAYS},
        )


class Laboratory:
    """The embedded pipeline, the instruments, and the store of what was drawn.

    Args:
        store: folder of the results; None keeps nothing.
        batch: images of a forward at most. It is part of the identity of results, since rounding
            depends on it.
    """

    def __init__(self, store: Path | None = STORE, *, batch: int = BATCH) -> None:
        self.store = store
        self.batch = batch

    @cached_property
    def pipe(self) -> FluxPipeline:
        return models.load_pipeline()

    @cached_property
    def features(self) -> FeatureExtractor:
        return FeatureExtractor()

    @cached_property
    def reader(self) -> Any:
        return load_reader()[0]

    def sample(
        self,
        condition: Condition,
        groups: Sequence[Group],
        *,
        tick: Callable[[int], Any] = lambda images: None,
    ) -> Samples:
        """Draws what the store does not have yet; `tick` is told of the images of each batch."""
        parts = []
        for batch in batches_of(groups, self.batch):
            path = self._path(condition, batch)
            part = _load(path) if path is not None and path.is_file() else None
            if part is None:
                part = self._draw(condition, batch)
                if path is not None:
                    _save(path, part, self._identity(condition))
            parts.append(part)
            tick(len(part["images"]))
        return _joined(condition, groups, parts)

    def missing(self, condition: Condition, groups: Sequence[Group]) -> int:
        """Images that `sample` would have to draw."""
        paths = ((self._path(condition, batch), batch) for batch in batches_of(groups, self.batch))
        return sum(
            sum(len(group.seeds) for group in batch)
            for path, batch in paths
            if path is None or not path.is_file()
        )

    def real_features(self, count: int, *, decoded: bool = False) -> Tensor:
        """Features (count, 1280) of balanced real images, as many of each style, in turn.

        The first of them are those of a smaller count.

        Args:
            count: a multiple of the styles.
            decoded: after the model's VAE, as good as the model could draw them.

        Raises:
            ValueError: `count` does not divide by the styles.
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
        path = None if self.store is None else self.store / f"real-{_digest(identity)}.npz"
        if path is not None and path.is_file():
            return torch.from_numpy(_load(path)["features"])
        images = torch.from_numpy(render_all(balanced_avatars(count))).permute(0, 3, 1, 2) / 255
        parts = [
            self.features(self._decoded(part) if decoded else part) for part in images.split(BATCH)
        ]
        features = torch.cat(parts)
        if path is not None:
            _save(path, {"features": features.numpy()}, None)
        return features

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """The VAE's (B, C, h, w) of images (B, 3, 64, 64) in [0, 1], not scaled."""
        parts = [
            self.pipe.vae.encode(part * 2 - 1).latent_dist.mode() for part in images.split(BATCH)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def _decoded(self, images: Tensor) -> Tensor:
        decoded: Tensor = self.pipe.vae.decode(self.latents(images)).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    def measure(self, images: Tensor) -> dict[str, np.ndarray]:
        """Features and readings of images (B, 3, 64, 64) in [0, 1]."""
        readings = self.reader.read(images * 2 - 1)
        return {
            "features": self.features(images).numpy(),
            "indices": np.array(
                [[HEADS[head].index(reading[head]) for head in HEADS] for reading in readings]
            ),
        }

    def _draw(self, condition: Condition, batch: Sequence[Group]) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        drawn, total = draw(self.pipe, condition, batch)
        seconds = time.perf_counter() - began
        images = (drawn.clamp(0, 1) * 255).round().byte()
        # Measured as stored, so that a stored image can be measured again to the same figures.
        return {
            "images": images.numpy(),
            "seconds": np.full(len(images), seconds / len(images)),
            "guidance": np.array(total),
            **self.measure(images.float() / 255),
        }

    @cached_property
    def _model(self) -> str:
        return model_hash()

    def _identity(self, condition: Condition) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "model": self._model,
            "torch": torch.__version__,
            "condition": condition.to_dict(),
        }

    def _path(self, condition: Condition, batch: Sequence[Group]) -> Path | None:
        if self.store is None:
            return None
        plan = [[group.prompt, *group.seeds] for group in batch]
        return self.store / _digest(self._identity(condition)) / f"{_digest(plan)}.npz"


def draw(
    pipe: FluxPipeline, condition: Condition, groups: Sequence[Group]
) -> tuple[Tensor, tuple[float, float, float]]:
    """One batch of groups of equal size: images (B, 3, 64, 64) in [0, 1], group by group.

    Also returns what the guidance counted: tokens, share pushed, mean similarity; zeros without.
    """
    from ..pipelines import negtome_guidance

    size = len(groups[0].seeds)
    total = (0.0, 0.0, 0.0)
    guided = condition.guidance_scale > 1
    call: dict[str, Any] = {}
    with ExitStack() as stack:
        handle = None
        if condition.negtome is not None:
            config = condition.negtome.with_overrides(groups=len(groups))
            reference = list(condition.references) or None
            handle = stack.enter_context(negtome_guidance(pipe, config, reference=reference))
        if condition.baseline is not None:
            changed: AbstractContextManager[dict[str, Any]] = condition.baseline.applied(
                pipe, prompts=len(groups), images_per_prompt=size
            )
            call = stack.enter_context(changed)
        images: Tensor = pipe(
            **{
                "prompt": [group.prompt for group in groups],
                "negative_prompt": [condition.negative_prompt] * len(groups) if guided else None,
                "true_cfg_scale": condition.guidance_scale,
                "num_images_per_prompt": size,
                "generator": [
                    torch.Generator().manual_seed(seed) for group in groups for seed in group.seeds
                ],
                "num_inference_steps": condition.steps,
                "height": IMAGE_SIZE,
                "width": IMAGE_SIZE,
                "max_sequence_length": models.TEXT_LENGTH,
                "output_type": "pt",
                **call,
            }
        ).images
        if handle is not None:
            row = handle.summary().total
            total = (float(row.tokens), row.pushed, row.similarity)
    return images, total


def balanced_avatars(count: int, seed: int = _REAL_SEED) -> list[Avatar]:
    """Balanced avatars, the styles in turn; training drew its own from seeds 0, 1000 and 2000."""
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
    """Of the weights and settings of the embedded pipeline and of the attribute reader."""
    folder = Path(str(models.model_folder()))
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors") and path.name != "training.json":
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _reference_identity(reference: Reference) -> dict[str, Any]:
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


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def _save(path: Path, part: dict[str, np.ndarray], identity: dict[str, Any] | None) -> None:
    """Whole or not at all; the condition stands beside its batches, for readers of the store."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if identity is not None:
        write_atomically(
            path.parent / "condition.json", (json.dumps(identity, indent=1) + "\n").encode()
        )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **part)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def _joined(
    condition: Condition, groups: Sequence[Group], parts: Sequence[dict[str, np.ndarray]]
) -> Samples:
    tokens, pushed, similarity = np.array([part["guidance"] for part in parts]).T
    count = tokens.sum()
    nan = float("nan")
    return Samples(
        condition=condition,
        prompts=tuple(group.prompt for group in groups for _ in group.seeds),
        seeds=tuple(seed for group in groups for seed in group.seeds),
        groups=np.repeat(np.arange(len(groups)), [len(group.seeds) for group in groups]),
        pushed=float(tokens @ pushed / count) if count else nan,
        similarity=float(tokens @ similarity / count) if count else nan,
        **{name: np.concatenate([part[name] for part in parts]) for name in _ARRAYS},
    )
