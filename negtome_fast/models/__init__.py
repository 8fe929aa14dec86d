"""The embedded model `tiny-flux-avatars`: a complete FLUX.1-format pipeline of a few megabytes.

`load_pipeline` loads it with diffusers' own `FluxPipeline`; `generate` calls it with its settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .avatars import IMAGE_SIZE, check_prompt, model_folder

if TYPE_CHECKING:
    from diffusers import FluxPipeline

TEXT_LENGTH = 16
STEPS = 20
GUIDANCE_SCALE = 2.5

__all__ = ["check_prompt", "generate", "load_pipeline", "model_folder"]


@contextmanager
def _quiet() -> Iterator[None]:
    """No messages and bars of diffusers and transformers while the small pipeline loads.

    FluxPipeline expects CLIP's and T5's tokenizer classes; word-level ones need no warning.
    """
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        from diffusers.utils import logging as diffusers_logging

        own_level = diffusers_logging.get_verbosity()
        own_bars = diffusers_logging.is_progress_bar_enabled()
        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
        try:
            yield
        finally:
            diffusers_logging.set_verbosity(own_level)
            if own_bars:
                diffusers_logging.enable_progress_bar()
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_pipeline(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> FluxPipeline:
    """The embedded pipeline, without a progress bar; weights are stored in bf16.

    Raises:
        ImportError: diffusers or transformers are missing; names the extra to install.
        FileNotFoundError: the package was built without the weights.
    """
    folder = model_folder()
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the embedded model's weights are not at {folder}; reinstall the package"
        )
    try:
        with _quiet():
            from diffusers import FluxPipeline

            pipe = FluxPipeline.from_pretrained(str(folder), local_files_only=True)
            pipe = pipe.to(device, dtype)
    except ImportError as error:
        raise ImportError(
            "the embedded model needs the extra 'demo': pip install 'negtome-fast[demo]'"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: FluxPipeline,
    prompt: str,
    seeds: Sequence[int],
    *,
    guidance_scale: float = GUIDANCE_SCALE,
    steps: int = STEPS,
    output_type: str = "pt",
    **call: Any,
) -> Any:
    """One image for each seed, as one batch.

    Args:
        prompt: words of the model's vocabulary; see `check_prompt`.
        seeds: of each image's own noise, so that an image depends on its seed, not on its place.
        guidance_scale: true classifier-free guidance against the empty prompt; 1 switches it off.
        steps: of the flow-matching Euler scheduler.
        output_type: as the pipeline's; `"pt"` gives `(B, 3, 64, 64)` in [0, 1].
        call: further arguments of the pipeline's call.

    Raises:
        ValueError: a word that the model does not know; names it and lists those it knows.
    """
    check_prompt(prompt)
    return pipe(
        prompt,
        negative_prompt="" if guidance_scale > 1 else None,
        true_cfg_scale=guidance_scale,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=steps,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        max_sequence_length=TEXT_LENGTH,
        output_type=output_type,
        **call,
    ).images
