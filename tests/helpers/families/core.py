"""Tiny random pipelines: `PipelineFamily` and `LoopFamily` build and run them.

A family names its classes in diffusers, the sizes in which its denoiser differs from `TINY`, and
the tensors that it is given. Nothing is downloaded.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Size = tuple[int, int]
Grids = Mapping[Size, set[Size]]

TEXT = 5
"""Default number of tokens of a caption."""
WIDTH = 16
"""Default number of channels of the text."""
SCALE = 4.0
"""Scale of classifier-free guidance, where a run has it."""

TINY: Mapping[str, Any] = {
    "attention_head_dim": 8,
    "axes_dims_rope": (2, 2, 4),
    "caption_channels": WIDTH,
    "caption_projection_dim": WIDTH,
    "condition_dim": 4,
    "context_in_dim": WIDTH,
    "cross_attention_dim": 16,
    "cross_attention_head_dim": 8,
    "ffn_dim": 32,
    "freq_dim": 16,
    "guidance_embeds": False,
    "hidden_size": 16,
    "in_channels": 4,
    "joint_attention_dim": WIDTH,
    "num_attention_heads": 2,
    "num_cross_attention_heads": 2,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_single_layers": 2,
    "out_channels": 4,
    "pooled_projection_dim": WIDTH,
    "rope_max_seq_len": 32,
    "sample_size": 8,
    "text_dim": WIDTH,
    "text_embed_dim": WIDTH,
    "time_embed_dim": 16,
}
"""Default sizes of a denoiser. A class takes the ones that its constructor names."""

PACKED: Grids = {(64, 96): {(4, 6)}, (80, 32): {(5, 2)}}
"""Grids of models with 16 pixels to a token."""
EVEN_PACKED: Grids = {(64, 96): {(4, 6)}, (96, 32): {(6, 2)}}
"""Like `PACKED`, for pipelines whose sizes are multiples of 32."""
PACKED_32: Grids = {(64, 96): {(2, 3)}, (160, 64): {(5, 2)}}
"""Grids of models with 32 pixels to a token."""
TWO_RESOLUTIONS: Grids = {(64, 96): {(8, 12), (4, 6)}, (80, 32): {(10, 4), (5, 2)}}
"""Grids of UNets with attention at two resolutions."""


def seeded(make: Callable[..., nn.Module], **settings: Any) -> Any:
    """Return a model with the same random weights every time.

    No weight matrix and no bias is zero, so that every block has an effect.
    """
    torch.manual_seed(0)
    model = make(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def noise_generators(images: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(images)]


def noise(images: int, seed: int, *shape: int) -> Tensor:
    return torch.stack([torch.randn(shape, generator=g) for g in noise_generators(images, seed)])


def embeddings(*shape: int, seed: int = 3) -> Tensor:
    """Embeddings of a prompt, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoiser(pipe: Any) -> nn.Module:
    model = getattr(pipe, "transformer", None)
    return pipe.unet if model is None else model


class Part:
    """A class of diffusers and its settings; each pipeline gets a new instance."""

    def __init__(self, name: str, **settings: Any) -> None:
        self.name = name
        self.settings = settings

    @property
    def cls(self) -> Any:
        import diffusers

        return getattr(diffusers, self.name)

    def build(self) -> Any:
        if issubclass(self.cls, nn.Module):
            return seeded(self.cls, **self.settings)
        return self.cls(**self.settings)


class Denoiser(Part):
    """A denoiser with the sizes of `TINY`, except for its settings."""

    def build(self) -> Any:
        return seeded(self.cls, **self.config())

    def config(self) -> dict[str, Any]:
        names = inspect.signature(self.cls.__init__).parameters
        return {name: TINY[name] for name in names if name in TINY} | self.settings


FLOW = Part("FlowMatchEulerDiscreteScheduler")


@dataclass(frozen=True)
class Run:
    """One run of a family, and the tensors that such a run is given.

    Attributes:
        images: number of images or videos.
        size: (height, width) in pixels.
        steps: number of steps of the scheduler.
        cfg: whether there is classifier-free guidance.
        captions: number of text tokens of each image.
        seed: image i starts from the noise of seed + i. Nothing else depends on the seed.
    """

    images: int
    size: Size
    steps: int
    cfg: bool
    captions: tuple[int, ...]
    seed: int

    @property
    def batch(self) -> int:
        """Number of items of a forward with both halves of classifier-free guidance."""
        return self.images * (2 if self.cfg else 1)

    def grid(self, pixels: int) -> Size:
        """Return (height, width) in tokens of `pixels` x `pixels`."""
        return self.size[0] // pixels, self.size[1] // pixels

    def given(self, *shape: int, seed: int = 3) -> Tensor:
        """Return a random tensor that is the same for all images: (images, *shape)."""
        return embeddings(1, *shape, seed=seed).repeat(self.images, *[1] * len(shape))

    def noise(self, *shape: int) -> Tensor:
        """Return a random tensor that differs between images: (images, *shape)."""
        return noise(self.images, self.seed, *shape)

    def text(self, width: int = WIDTH, tokens: int | None = None) -> Tensor:
        """Return the same prompt for all images: (images, tokens, width)."""
        return self.given(tokens or max(self.captions), width)

    def pooled(self, width: int = WIDTH) -> Tensor:
        return self.given(width)

    def mask(self, tokens: int | None = None) -> Tensor:
        """Return (images, tokens): 1 where the caption is, 0 after it."""
        lengths = torch.tensor(self.captions)[:, None]
        return (torch.arange(tokens or max(self.captions)) < lengths).long()

    def visible(self) -> Tensor:
        """Return `mask` as bool."""
        return self.mask().bool()

    def both(self, positive: Tensor) -> Tensor:
        """Return the negative and the positive half, or without `cfg` the positive one alone."""
        return torch.cat([negative(positive), positive]) if self.cfg else positive

    def repeated(self, given: Tensor) -> Tensor:
        """Return the same for both halves of classifier-free guidance."""
        return torch.cat([given, given]) if self.cfg else given


Encoded = dict[str, Callable[[Run], Any]]
"""Name of a pipeline's argument -> function that returns its value for a run."""

TEXT_ONLY: Encoded = {"prompt_embeds": Run.text}
POOLED: Encoded = {"prompt_embeds": Run.text, "pooled_prompt_embeds": Run.pooled}
MASKED: Encoded = {"prompt_embeds": Run.text, "prompt_attention_mask": Run.mask}
MASKED_EMBEDS: Encoded = {"prompt_embeds": Run.text, "prompt_embeds_mask": Run.mask}
TRUE_CFG = ("true_cfg_scale", 1.0)


def negative(value: Any) -> Any:
    """Return the negative prompt that belongs to an argument with the positive one.

    Embeddings change their sign. In masks and lists, the lengths are in reversed order and one
    token shorter. Other integers stay.
    """
    if isinstance(value, list):
        return [-item[:-1] for item in reversed(value)]
    if value.is_floating_point():
        return -value
    if value.ndim == 2:
        return nn.functional.pad(value.flip(0)[:, 1:], (0, 1))
    return value


@dataclass(frozen=True)
class Family(ABC):
    """A tiny random model that the tests can build and run.

    Attributes:
        denoiser: the model; its name is a key of `negtome_fast.pipelines.known_layouts()`.
        grids: size in pixels -> (height, width) of the tokens of each guided block, written down
            by hand. At least one size is not square, and the sizes differ in both directions.
        frames: number of generated frames in the latents.
        cfg: whether classifier-free guidance is tested.
        several_captions: whether the captions of one batch may have different lengths.
        timesteps: converts timesteps of the scheduler to the scale from 1000 (noise) to 0.
        note: name in the table of supported models, where a class is tested in several ways.
        scheduler: the scheduler; most families have `FLOW`.
        whole: True if the pipeline itself runs, False if its denoiser runs alone.
    """

    denoiser: Denoiser
    _: KW_ONLY
    grids: Grids = field(default_factory=lambda: PACKED)
    frames: int = 1
    cfg: bool = True
    several_captions: bool = False
    timesteps: Callable[[float], float] = float
    note: str = ""
    scheduler: Part = FLOW
    whole: ClassVar[bool]

    @property
    def model(self) -> str:
        """Class name of the denoiser."""
        return self.denoiser.name

    def captions(self) -> tuple[int, int, int]:
        """Return lengths of three captions, which differ where the model allows it."""
        return (TEXT, TEXT - 2, TEXT + 3) if self.several_captions else (TEXT, TEXT, TEXT)

    @abstractmethod
    def build(self, **parts: Any) -> Any:
        """Return a new pipeline or `DenoiserLoop`; `parts` override the family's own."""

    def generate(
        self,
        pipe: Any,
        images: int,
        *,
        size: Size | None = None,
        steps: int = 2,
        cfg: bool = False,
        captions: tuple[int, ...] | None = None,
        seed: int = 7,
    ) -> Tensor:
        """Return the latents of a run, images first. `Run` describes the arguments.

        By default, the size is the first one of `grids` and each caption has `TEXT` tokens.
        Without `cfg`, the model is called once a step with the images alone.
        """
        size = next(iter(self.grids)) if size is None else size
        return self._run(pipe, Run(images, size, steps, cfg, captions or (TEXT,) * images, seed))

    @abstractmethod
    def _run(self, pipe: Any, run: Run) -> Tensor:
        """Return the latents of a run, images first."""


WORDLESS = {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}
"""Arguments of pipelines: no prompts in words, no rounding to the sizes of the training."""


@dataclass(frozen=True)
class PipelineFamily(Family):
    """A family whose pipeline runs offline.

    Attributes:
        pipeline: class name of the pipeline, or a function that returns the class.
        encoded: the encoded prompt. With `cfg`, the pipeline is also given the `negative` of each
            value, as the argument "negative_" + name.
        more: further arguments of the call: values, or functions of the run.
        scale: name of the argument with the guidance scale, and its value without `cfg`.
        parts: arguments of the constructor. Required ones that are left out are None.
        finish: changes the pipeline after it was built.
        fewest_steps: smallest number of steps with which the pipeline runs.
    """

    pipeline: str | Callable[[], Any]
    encoded: Encoded
    _: KW_ONLY
    more: Mapping[str, Any] = field(default_factory=dict)
    scale: tuple[str, float] | None = ("guidance_scale", 1.0)
    parts: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Any], None] | None = None
    fewest_steps: int = 1
    whole = True

    def build(self, **parts: Any) -> Any:
        cls = Part(self.pipeline).cls if isinstance(self.pipeline, str) else self.pipeline()
        place = "unet" if "UNet" in self.model else "transformer"
        given = {place: self.denoiser, "scheduler": self.scheduler, **self.parts, **parts}
        given = {k: v.build() if isinstance(v, Part) else v for k, v in given.items()}
        required = (p.name for p in signature(cls).values() if p.default is p.empty)
        pipe = cls(**(dict.fromkeys(required) | given))
        pipe.set_progress_bar_config(disable=True)
        if self.finish is not None:
            self.finish(pipe)
        return pipe

    def _run(self, pipe: Any, run: Run) -> Tensor:
        accepted = signature(type(pipe).__call__)
        encoded = {name: value(run) for name, value in self.encoded.items()}
        arguments: dict[str, Any] = {
            name: value for name, value in WORDLESS.items() if name in accepted
        }
        arguments |= {k: v(run) if callable(v) else v for k, v in self.more.items()} | encoded
        if run.cfg:
            arguments |= {f"negative_{name}": negative(value) for name, value in encoded.items()}
        if self.scale is not None:
            arguments[self.scale[0]] = SCALE if run.cfg else self.scale[1]
        if getattr(pipe, "guider", None) is not None:  # takes the place of a scale
            pipe.guider._enabled = run.cfg
        return pipe(
            height=run.size[0],
            width=run.size[1],
            num_inference_steps=max(run.steps, self.fewest_steps),
            generator=noise_generators(run.images, run.seed),
            output_type="latent",
            return_dict=False,
            **arguments,
        )[0]


def signature(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


class DenoiserLoop:
    """A plain sampling loop around a denoiser, with the attributes of a pipeline."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        self.transformer = transformer
        self.scheduler = scheduler

    def __call__(
        self,
        latents: Tensor,
        predict: Callable[[Tensor, Tensor], Tensor],
        steps: int,
        **schedule: Any,
    ) -> Tensor:
        """Return the final latents; `predict(latents, timestep)` calls the transformer."""
        self.scheduler.set_timesteps(steps, **schedule)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1)
        for timestep in self.scheduler.timesteps:
            scaled = latents
            if hasattr(self.scheduler, "scale_model_input"):
                scaled = self.scheduler.scale_model_input(latents, timestep)
            prediction = predict(scaled, timestep)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return latents


@dataclass(frozen=True)
class LoopFamily(Family):
    """A family whose pipeline cannot run offline: `DenoiserLoop` calls the denoiser in its place.

    Attributes:
        latents: returns the shape of the latents of one image for a run.
        arguments: returns the arguments of the denoiser for (run, latents, timesteps). With
            `cfg`, the batch has both halves, the negative one first.
        answer: returns the prediction for an output of the denoiser.
        schedule: returns further arguments of `scheduler.set_timesteps` for a number of steps.
    """

    latents: Callable[[Run], tuple[int, ...]]
    arguments: Callable[[Run, Tensor, Tensor], Mapping[str, Any]]
    _: KW_ONLY
    answer: Callable[[Any], Tensor] = field(default=lambda output: output)
    schedule: Callable[[int], Mapping[str, Any]] = field(default=lambda steps: {})
    whole = False

    def build(self, **parts: Any) -> Any:
        given = {"transformer": self.denoiser.build(), "scheduler": self.scheduler.build()}
        return DenoiserLoop(**(given | parts))

    def _run(self, pipe: Any, run: Run) -> Tensor:
        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            arguments = self.arguments(run, run.repeated(latents), timestep.expand(run.batch))
            prediction = self.answer(pipe.transformer(**arguments, return_dict=False)[0])
            if not run.cfg:
                return prediction
            unconditional, conditional = prediction.chunk(2)
            return unconditional + SCALE * (conditional - unconditional)

        return pipe(run.noise(*self.latents(run)), predict, run.steps, **self.schedule(run.steps))
