"""The embedded model `tiny-flux-avatars`: a complete FLUX.1-format pipeline of a few megabytes.

`load_pipeline` loads it with diffusers' `FluxPipeline`; `generate` calls it with its defaults.
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
"""Length of padded prompts in tokens; the model was trained on no other."""

STEPS = 20
"""Default number of scheduler steps."""

GUIDANCE_SCALE = 2.5
"""Default true classifier-free guidance scale."""

__all__ = ["check_prompt", "generate", "load_pipeline", "model_folder"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages and bars of diffusers and transformers while the pipeline loads.

    They would warn of the word-level tokenizers: FluxPipeline expects CLIP's and T5's classes.
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
    """Load the embedded pipeline, without a progress bar.

    Args:
        device: device of the pipeline.
        dtype: dtype of the weights, which are stored in bf16.

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
    """Draw one image for each seed, as one batch.

    Args:
        pipe: the pipeline of `load_pipeline`.
        prompt: words of the model's vocabulary; see `check_prompt`.
        seeds: seed of each image's noise; an image does not depend on its place in the batch.
        guidance_scale: true classifier-free guidance against the empty prompt; 1 switches it off.
        steps: number of steps of the flow-matching Euler scheduler.
        output_type: output type of the pipeline; `"pt"` gives `(B, 3, 64, 64)` in [0, 1].
        call: further arguments of the pipeline's call.

    Returns:
        The images.

    Raises:
        ValueError: a word that the model does not know; lists the words that it knows.
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
