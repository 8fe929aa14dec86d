"""How a family's tiny random pipeline is built and run: `PipelineFamily` and `LoopFamily`.

A family is an entry of `FAMILIES`. It names the classes of diffusers, the sizes in which its
denoiser differs from `TINY`, and the tensors that it is given. Nothing is downloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Size = tuple[int, int]
Grids = Mapping[Size, set[Size]]

TEXT = 5
"""Tokens of a caption, unless a run says otherwise."""
WIDTH = 16
"""Channels of the text, unless a model says otherwise."""
SCALE = 4.0
"""Scale of classifier-free guidance."""

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
"""Sizes of a denoiser. A class takes those that its constructor names."""

PACKED: Grids = {(64, 96): {(4, 6)}, (80, 32): {(5, 2)}}
"""Grids of models with 16 pixels to a token."""
EVEN_PACKED: Grids = {(64, 96): {(4, 6)}, (96, 32): {(6, 2)}}
"""Like `PACKED`, for pipelines whose sizes are multiples of 32."""
PACKED_32: Grids = {(64, 96): {(2, 3)}, (160, 64): {(5, 2)}}
"""Grids of models with 32 pixels to a token."""
TWO_RESOLUTIONS: Grids = {(64, 96): {(8, 12), (4, 6)}, (80, 32): {(10, 4), (5, 2)}}
"""Grids of UNets with attention at two resolutions."""


def seeded(make: Callable[..., nn.Module], **settings: Any) -> Any:
    """Return a model with the same random weights every time, none zero, so that no block idles."""
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
    """A part of a pipeline that is made anew for each pipeline: a class of diffusers, settings."""

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
    """A denoiser of the sizes of `TINY`, where the settings do not say otherwise."""

    def build(self) -> Any:
        return seeded(self.cls, **self.config())

    def config(self) -> dict[str, Any]:
        names = inspect.signature(self.cls.__init__).parameters
        return {name: TINY[name] for name in names if name in TINY} | self.settings


FLOW = Part("FlowMatchEulerDiscreteScheduler")


@dataclass(frozen=True)
class Run:
    """What is asked of a family: `images` of `size` = (height, width) in pixels.

    `captions` has the number of text tokens of each image. Image i starts from the noise of
    `seed` + i, and nothing else depends on the seed.
    """

    images: int
    size: Size
    steps: int
    cfg: bool
    captions: tuple[int, ...]
    seed: int

    @property
    def batch(self) -> int:
        """The items of a forward that has both halves of classifier-free guidance."""
        return self.images * (2 if self.cfg else 1)

    def grid(self, pixels: int) -> Size:
        """(height, width) with so many pixels to a token."""
        return self.size[0] // pixels, self.size[1] // pixels

    def given(self, *shape: int, seed: int = 3) -> Tensor:
        """A random tensor that is the same for all images: (images, *shape)."""
        return embeddings(1, *shape, seed=seed).repeat(self.images, *[1] * len(shape))

    def noise(self, *shape: int) -> Tensor:
        """A random tensor for each image: (images, *shape)."""
        return noise(self.images, self.seed, *shape)

    def text(self, width: int = WIDTH, tokens: int | None = None) -> Tensor:
        """The same prompt for each image: (images, tokens, width)."""
        return self.given(tokens or max(self.captions), width)

    def pooled(self, width: int = WIDTH) -> Tensor:
        return self.given(width)

    def mask(self, tokens: int | None = None) -> Tensor:
        """(images, tokens) of 1 where the caption is, 0 after it."""
        lengths = torch.tensor(self.captions)[:, None]
        return (torch.arange(tokens or max(self.captions)) < lengths).long()

    def visible(self) -> Tensor:
        """`mask` as bool."""
        return self.mask().bool()

    def both(self, positive: Tensor) -> Tensor:
        """The negative half and the positive one, or the positive one alone without `cfg`."""
        return torch.cat([negative(positive), positive]) if self.cfg else positive

    def repeated(self, given: Tensor) -> Tensor:
        """The same for both halves of classifier-free guidance."""
        return torch.cat([given, given]) if self.cfg else given


def negative(value: Any) -> Any:
    """Return the negative prompt: opposite embeddings, and in a mask or a list other lengths."""
    if isinstance(value, list):
        return [-item[:-1] for item in reversed(value)]
    if value.is_floating_point():
        return -value
    if value.ndim == 2:
        return nn.functional.pad(value.flip(0)[:, 1:], (0, 1))
    return value


@dataclass(frozen=True)
class Family:
    """A tiny random model that the tests can build and run.

    Attributes:
        denoiser: the model; its name is a key of `negtome_fast.pipelines.known_layouts()`.
        grids: size in pixels -> the (height, width) of the tokens of the guided blocks. Written
            down by hand; no two sizes of a family have equal height and width.
        frames: number of frames of the latents.
        cfg: whether it has classifier-free guidance.
        several_captions: whether the captions of one batch may have different lengths.
        timesteps: from those of the scheduler to 1000 (noise) to 0, where they differ.
        note: name in the table of supported models, where a class is tested in several ways.
        scheduler: the scheduler.
        whole: whether the pipeline itself runs, and not its denoiser alone.
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

    def build(self, **parts: Any) -> Any:
        """Make the pipeline, or the `DenoiserLoop`; `parts` go before the family's own."""
        raise NotImplementedError

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
        """Return the latents of a run, images first.

        The size is by default the first one of `grids`; all captions have `TEXT` tokens. Without
        `cfg`, the model is called once a step with the images alone.
        """
        size = next(iter(self.grids)) if size is None else size
        return self._run(pipe, Run(images, size, steps, cfg, captions or (TEXT,) * images, seed))

    def _run(self, pipe: Any, run: Run) -> Tensor:
        raise NotImplementedError


WORDLESS = {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}
"""No prompts in words, and no rounding of the size to those that were trained."""


@dataclass(frozen=True)
class PipelineFamily(Family):
    """A family whose pipeline runs offline.

    Attributes:
        pipeline: class name of the pipeline, or a function that returns the class.
        encoded: argument of the pipeline -> function of the run. With `cfg`, the pipeline is also
            given the `negative` of each, under the name with "negative_" before it.
        more: further arguments: values, or functions of the run.
        scale: argument that has the scale of guidance, and its value where there is none.
        parts: arguments of the pipeline's constructor, where they are not None.
        finish: what is done to the pipeline after it was made.
        fewest_steps: number of steps below which the pipeline does not run.
    """

    pipeline: str | Callable[[], Any]
    encoded: Mapping[str, Callable[[Run], Any]]
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
        arguments = {name: value for name, value in WORDLESS.items() if name in accepted}
        arguments |= {k: v(run) if callable(v) else v for k, v in self.more.items()} | encoded
        if run.cfg:
            arguments |= {f"negative_{name}": negative(value) for name, value in encoded.items()}
        if self.scale is not None:
            arguments[self.scale[0]] = SCALE if run.cfg else self.scale[1]
        if getattr(pipe, "guider", None) is not None:  # in place of a scale
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
    """The plainest sampling loop around a denoiser, with the attributes that a pipeline has."""

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
        """`predict(latents, timestep)` calls the transformer and returns what `step` wants."""
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
    """A family whose pipeline cannot run offline: `DenoiserLoop` calls its denoiser as it would.

    Attributes:
        latents: shape of the latents of one image, as a function of the run.
        arguments: (run, latents, timesteps) -> arguments of the denoiser, for both halves of
            classifier-free guidance, the negative one first.
        answer: from the output of the denoiser to the prediction.
        schedule: from the number of steps to further arguments of `scheduler.set_timesteps`.
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
