"""`Layout`: how a class of denoisers is guided, and the table of classes that are known.

A layout says which arguments of the model's forward hold the latents and the time, how many tokens
the image has, and where these lie in an attention output. Nothing here imports diffusers: models
are recognised by the names of their classes. `families` fills the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .encoders import ReferenceEncoder
from .image_tokens import ImageTokens
from .unknown import unknown_image_tokens


def as_it_is(value: float) -> float:
    """Returns the scheduler's timestep for a time input that is the timestep."""
    return value


def times_1000(value: float) -> float:
    """Returns the scheduler's timestep for a time input that is the timestep / 1000."""
    return value * 1000


def no_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Returns None, for models whose `grid_modules` tell the tokens block by block."""


@dataclass(frozen=True)
class Layout:
    """Description of a class of denoisers, which is all that guiding it needs.

    Attributes:
        family: name that users know the models by, for the table of supported models.
        latents: name of the forward's argument that holds the noisy latents, items first: a tensor,
            or a list with one tensor per item.
        timestep: name of the argument that holds the time.
        scheduler_timestep: function from the value of that argument to the scheduler's timestep,
            1000 (noise) to 0. None: the pipeline's scheduler is asked instead.
        guidance: `"concatenated"` if pipelines put the halves of classifier-free guidance into one
            batch; the halves are then found by comparing the latents. `"sequential"` if they call
            the model once for each, so that a batch is always one group.
        image_tokens: (model, arguments by name) -> `ImageTokens`, or None if it cannot tell. Called
            once per run and shape, so it may read a value from the device.
        captions: name of an argument on which `image_tokens` also depends, such as the mask of the
            captions. `image_tokens` is then called again whenever that argument is a new object.
        grid_modules: class names of modules whose input (B, C, H, W) holds the tokens of the
            attention modules inside them: a UNet has a grid for each resolution.
        joint: order of an attention output that holds text and image as one tensor:
            `"text_first"`, `"image_first"`, or None if there is no such output. If the output is a
            tuple, its first entry is the image.
        blocks: patterns (fnmatch) for the names of the attention modules that can be guided.
        exclude: patterns for the names of modules that are never guided.
        attention: class names that make a module an attention module, also as a base class.
        fresh_outputs: every attention output is a new tensor, never the module's input or a view
            of it, so it may be written into.
        preset: name of the `NegToMeConfig.preset` used if the caller gives no configuration.
        encode: encodes pictures as latents, for references from outside of the batch. None: such
            references must be given as latents.
        adapt: (model, this layout) -> the layout of that model, if it depends on the model's
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
    encode: ReferenceEncoder | None = None
    adapt: Callable[[nn.Module, Layout], Layout] | None = None


UNKNOWN = Layout(latents="", scheduler_timestep=None, image_tokens=unknown_image_tokens)
"""Layout of classes that are not in the table: tuples and lengths tell which tokens are image."""

_LAYOUTS: dict[str, Layout] = {}
"""Class name -> layout; the name has the module in front for classes of `_OTHER_STACKS`."""

_OTHER_STACKS = ("sglang", "vllm_omni")
"""Packages whose classes have diffusers' names but other arguments, times or shards."""


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
            scheduler_timestep=lambda time: 1000 * time,  # the model is given 1 (noise) to 0
            guidance="sequential",  # one call for each half of classifier-free guidance
            image_tokens=image_tokens,
            joint="text_first",  # its attention returns text and image as one tensor
            blocks=("blocks.*",),
        ),
    )
    ```

    Args:
        model_class: the class or its name; it covers subclasses too. If another package has a
            class of the same name as diffusers, give the class.
        layout: its layout.

    Raises:
        TypeError: an argument is of another type.
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
    """Returns True for a class of `_OTHER_STACKS`."""
    module = model_class.__module__ if isinstance(model_class, type) else ""
    return module.split(".")[0] in _OTHER_STACKS


def known_layouts() -> dict[str, Layout]:
    """Returns a copy of the table: class name -> layout."""
    return dict(_LAYOUTS)


def layout_of(model: nn.Module) -> Layout:
    """Returns the entry of the model's class or of its nearest base; `UNKNOWN` if there is none."""
    for base in type(model).__mro__:
        layout = _LAYOUTS.get(_path(base) if _is_of_another_stack(base) else base.__name__)
        if layout is not None:
            return layout.adapt(model, layout) if layout.adapt else layout
    return UNKNOWN
