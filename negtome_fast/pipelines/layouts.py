"""Where the image tokens are: a `Layout` for each class of denoiser.

A `Layout` says which arguments of the model's forward hold the latents and the time, how many
image tokens follow from them, and where these lie in an attention output. Nothing here imports
diffusers: models are recognised by the names of their classes. `families` holds the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..guidance import Grid
from .encoders import Encoder


@dataclass(frozen=True)
class ImageTokens:
    """The image among the tokens of one forward.

    Attributes:
        stream: tokens N of the model's image stream; an attention output of N tokens is all image.
        generated: how many of them, from `first` on, are the image that is generated; the rest are
            conditions, which an edit pipeline appended and an image-to-video one put before.
        grid: (height, width) with frames * height * width = generated, where known.
        frames: generated frames of a video's latents; 1 for an image. Attention outputs that hold
            one frame each, of (items * frames, height * width) tokens, are guided as the videos
            they make up.
        starts: first image token of each item of the batch in an attention output that holds more
            than the image; None where `Layout.joint` settles it. For models that put captions of
            several lengths before the image.
        first: the first generated token of the image stream.
    """

    stream: int
    generated: int
    grid: Grid | None = None
    frames: int = 1
    starts: tuple[int, ...] | None = None
    first: int = 0


def as_it_is(value: float) -> float:
    """The time input is the scheduler's timestep."""
    return value


def times_1000(value: float) -> float:
    """The time input is the scheduler's timestep / 1000."""
    return value * 1000


def no_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """For models whose `grid_modules` tell the tokens block by block."""


@dataclass(frozen=True)
class Layout:
    """How a class of denoisers is guided.

    Attributes:
        family: what users call the models of this class, for the table of supported models.
        latents: name of the forward's argument that holds the noisy latents, items first: a tensor
            or a list of one tensor an item.
        timestep: name of the argument that holds the time.
        scheduler_timestep: from the value of that argument to the scheduler's timestep, 1000
            (noise) to 0. None asks the pipeline's scheduler instead.
        guidance: `"concatenated"` where pipelines put the halves of classifier-free guidance into
            one batch, which is then found by comparing the latents; `"sequential"` where they
            call the model once for each, so that a batch is always one group.
        image_tokens: (model, arguments by name) -> `ImageTokens`, or None where it cannot tell.
            Called once per run and shape, so it may read a value from the device.
        captions: name of an argument on which `image_tokens` depends too, such as the mask of the
            captions: it is then also called where that is another object than before.
        grid_modules: class names of modules whose input (B, C, H, W) holds the tokens of the
            attention modules inside them: a UNet has a grid for each resolution.
        joint: order in an attention output that holds more than the image: `"text_first"`,
            `"image_first"`, or None where that does not happen. A tuple's first entry is the image.
        blocks: patterns (fnmatch) of the attention modules' names that can be guided.
        exclude: patterns of names that never are.
        attention: class names, with bases, that make a module an attention module.
        fresh_outputs: every attention output is a new tensor, never the module's input or a view
            of it, so it may be written into.
        preset: the `NegToMeConfig.preset` to use where the caller gives no configuration.
        encode: how pictures become latents, for references from outside of the batch; None where
            these must be given as latents.
        adapt: (model, this layout) -> the layout of that model, where it depends on the model's
            configuration.
    """

    family: str = ""
    latents: str = "hidden_states"
    timestep: str = "timestep"
    scheduler_timestep: Callable[[float], float] | None = as_it_is
    guidance: Literal["concatenated", "sequential"] = "concatenated"
    image_tokens: Callable[[nn.Module, Mapping[str, Any]], ImageTokens | None] = no_image_tokens
    captions: str | None = None
    grid_modules: tuple[str, ...] = ()
    joint: Literal["text_first", "image_first"] | None = None
    blocks: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("*refiner*", "*temporal*", "*motion_modules*", "*audio*")
    attention: tuple[str, ...] = (
        "Attention",
        "MochiAttention",
        "AttentionModuleMixin",
        "NunchakuBaseAttention",
    )
    fresh_outputs: bool = False
    preset: str | None = None
    encode: Encoder | None = None
    adapt: Callable[[nn.Module, Layout], Layout] | None = None


def latent_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens | None:
    """What the first tensor of an unknown model suggests: (B, N, C), or (B, C, H, W) in patches."""
    latents = next((value for value in arguments.values() if isinstance(value, torch.Tensor)), None)
    if latents is None or latents.ndim not in (3, 4):
        return None
    if latents.ndim == 3:
        return ImageTokens(latents.shape[1], latents.shape[1])
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    patch = patch if isinstance(patch, int) else 1
    height, width = latents.shape[2] // patch, latents.shape[3] // patch
    return ImageTokens(height * width, height * width, (height, width))


UNKNOWN = Layout(latents="", scheduler_timestep=None, image_tokens=latent_image_tokens)
"""Serves classes that are not in the table, where tuples and lengths settle what is the image."""

_LAYOUTS: dict[str, Layout] = {}
"""By the name of the class; with its module for those of `_OTHER_STACKS`."""

_OTHER_STACKS = ("sglang", "vllm_omni")
"""Packages whose classes have diffusers' names and take other arguments, times or shards."""


def register_layout(model_class: type | str, layout: Layout) -> None:
    """Makes a class of denoisers known to `apply_negtome`; an entry of the same name is replaced.

    ```python
    from negtome_fast.pipelines import ImageTokens, Layout, register_layout

    def image_tokens(model, arguments):  # the arguments of the model's forward, by name
        height, width = (length // 2 for length in arguments["latents"].shape[-2:])
        return ImageTokens(height * width, height * width, grid=(height, width))

    register_layout(
        "MyTransformer",  # the class or its name
        Layout(
            latents="latents",
            timestep="time",
            scheduler_timestep=lambda time: 1000 * time,  # it is given 1 (noise) to 0
            guidance="sequential",  # one call for each half of classifier-free guidance
            image_tokens=image_tokens,
            joint="text_first",  # its attention returns text and image as one tensor
            blocks=("blocks.*",),
        ),
    )
    ```

    Args:
        model_class: the class or its name. Subclasses are served too. A class of another stack
            that bears the name of one of diffusers has to be given itself.
        layout: how it is guided.
    """
    name = model_class if isinstance(model_class, str) else getattr(model_class, "__name__", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"model_class must be a class or its name, not {model_class!r}")
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, not {type(layout).__name__}")
    _LAYOUTS[_path(model_class) if _is_of_another_stack(model_class) else name] = layout


def _path(model_class: Any) -> str:
    return f"{model_class.__module__}.{model_class.__qualname__}"


def _is_of_another_stack(model_class: Any) -> bool:
    """Whether it is a class, and of a package whose names say nothing."""
    module = model_class.__module__ if isinstance(model_class, type) else ""
    return module.split(".")[0] in _OTHER_STACKS


def known_layouts() -> dict[str, Layout]:
    """A copy of the table: class name -> layout."""
    return dict(_LAYOUTS)


def layout_of(model: nn.Module) -> Layout:
    """The entry of the model's class or of its nearest base; `UNKNOWN` where there is none."""
    for base in type(model).__mro__:
        layout = _LAYOUTS.get(_path(base) if _is_of_another_stack(base) else base.__name__)
        if layout is not None:
            return layout.adapt(model, layout) if layout.adapt else layout
    return UNKNOWN


def is_attention(module: nn.Module, layout: Layout) -> bool:
    """Whether the layout counts this module as an attention module."""
    return any(base.__name__ in layout.attention for base in type(module).__mro__)
