"""One call of a pipeline: its arguments, its images or videos, and its guidance."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..config import NegToMeConfig
from ..pipelines import negtome_guidance
from ..pipelines.references import Reference
from .call_checks import check_signature, check_values
from .loading import pipeline_class
from .settings import EMBEDDED, Settings


def check_call_before_loading(settings: Settings) -> None:
    """Check what the pipeline's class alone tells, if it is known without loading the model.

    Raises:
        ValueError, TypeError: as `call_arguments`.
    """
    check_values(settings.call)
    pipeline = pipeline_class(settings)
    if pipeline is not None:
        _check_generates_from_text(pipeline)
        check_signature(pipeline, settings.call)


def call_arguments(pipe: Any, settings: Settings) -> dict[str, Any]:
    """Return the arguments of the pipeline's call, without prompt, number of images and generators.

    Raises:
        ValueError, TypeError: the pipeline does not generate from text, lacks an argument of a
            setting, or takes another type.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    _check_generates_from_text(type(pipe))
    check_values(settings.call)
    check_signature(type(pipe), settings.call)
    arguments = _embedded_arguments() if settings.model == EMBEDDED else {}

    def take(field: str, argument: str, value: Any) -> None:
        if value is None:
            return
        if argument not in known:
            raise ValueError(f"{field}: {type(pipe).__name__} has no {argument}")
        arguments[argument] = value

    model = getattr(pipe, "transformer", None)
    distilled = bool(getattr(getattr(model, "config", None), "guidance_embeds", False))
    true_cfg = "true_cfg_scale" in known
    scale_of = "true_cfg_scale" if true_cfg and not distilled else "guidance_scale"
    take("`guidance_scale`", scale_of, settings.guidance_scale)
    take("`true_cfg_scale`", "true_cfg_scale", settings.true_cfg_scale)
    take("`negative_prompt`", "negative_prompt", settings.negative_prompt)
    if arguments.get("true_cfg_scale", 1) > 1:
        arguments.setdefault("negative_prompt", "")
    elif true_cfg and distilled and settings.negative_prompt is not None:
        raise ValueError(
            f"`negative_prompt` has no effect on a distilled {type(pipe).__name__} without "
            "`true_cfg_scale` above 1 (which doubles the time)"
        )
    take("`steps`", "num_inference_steps", settings.steps)
    take("`height`", "height", settings.height)
    take("`width`", "width", settings.width)
    take("`frames`", "num_frames", settings.frames)
    for argument, value in settings.call.items():
        take(f"`call` {argument}", argument, value)
    if "output_type" in known:
        arguments["output_type"] = "pil"
    return arguments


def _check_generates_from_text(pipeline: type) -> None:
    name, known = pipeline.__name__, inspect.signature(pipeline.__call__).parameters
    for needed in ("prompt", "generator"):
        if needed not in known:
            raise ValueError(f"{name} takes no {needed}, so it does not generate from text alone")
    for other in ("image", "video", "control_image", "mask_image"):
        if other in known and known[other].default is inspect.Parameter.empty:
            raise ValueError(f"{name} needs an {other} to start from; use a text-to-image pipeline")


def _embedded_arguments() -> dict[str, Any]:
    """Arguments of the embedded model's pipeline, which its training fixed."""
    from .. import models
    from ..models.avatars import IMAGE_SIZE

    return {
        "max_sequence_length": models.TEXT_LENGTH,
        "num_inference_steps": models.STEPS,
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "true_cfg_scale": models.GUIDANCE_SCALE,
    }


def draw(
    pipe: Any,
    call: Mapping[str, Any],
    prompt: str,
    seeds: Sequence[int],
    label: str | None = None,
) -> list[Any]:
    """Call the pipeline once; returns PIL images, or frames of videos, one for each seed.

    Args:
        pipe: a pipeline that generates from text.
        call: its other arguments, from `call_arguments`.
        prompt: the prompt of all images.
        seeds: one for each image, for its generator.
        label: text of the pipeline's progress bar; None shows no bar.
    """
    arguments = dict(call)
    known = inspect.signature(type(pipe).__call__).parameters
    each = ("num_images_per_prompt", "num_videos_per_prompt")
    several = next((name for name in each if name in known), None)
    arguments["prompt"] = prompt
    if several is not None:
        arguments[several] = len(seeds)
    elif len(seeds) > 1:
        arguments["prompt"] = [prompt] * len(seeds)
        if isinstance(arguments.get("negative_prompt"), str):
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(seeds)
    arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(desc=label, disable=label is None, leave=False)
    output = pipe(**arguments)
    made = output.frames if hasattr(output, "frames") else output.images
    return list(made)


def configuration(pipe: Any, settings: Settings) -> NegToMeConfig:
    """Return the whole configuration: the authors' for the family, the preset's, the caller's.

    Raises:
        ValueError: the pipeline cannot be guided like this, or cannot encode the references.
    """
    from PIL import Image

    references = [entry.load() for entry in settings.references]
    if settings.preset == "sharpen":
        references = [Reference(Image.new("RGB", (8, 8)))]  # drafts that are not drawn yet
    with negtome_guidance(pipe, **settings.overrides()) as handle:
        config = handle.config
    if references:
        with negtome_guidance(pipe, config, reference=references):
            pass  # it would have refused references that cannot be encoded
    return config
