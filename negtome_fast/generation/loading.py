"""Loading a pipeline onto its device, with diffusers' ways to save memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from .settings import DTYPES, EMBEDDED, Settings


def load_pipeline(settings: Settings) -> Any:
    """Load the pipeline of `settings.model` onto its device, with the settings that save memory.

    Raises:
        ValueError: there is no such model, it cannot be loaded, or a setting does not fit it.
        ImportError: diffusers is missing; names the extra to install.
    """
    device = settings.device or default_device()
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"`device` {device} is not a device of torch") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` {device}: torch finds no such device here")
    if settings.offload in ("model", "sequential") and kind == "cpu":
        raise ValueError(f"`offload` {settings.offload!r} needs a GPU; on the CPU leave it out")
    dtype = DTYPES[settings.dtype or ("bfloat16" if kind == "cuda" else "float32")]
    if settings.model == EMBEDDED:
        from .. import models

        pipe = models.load_pipeline("cpu", dtype)
    else:
        pipe = _from_pretrained(settings, dtype)
    if settings.vae_tiling:
        tiling = getattr(getattr(pipe, "vae", None), "enable_tiling", None)
        if tiling is None:
            raise ValueError(f"`vae_tiling`: {type(pipe).__name__} has no VAE that can be tiled")
        tiling()
    if settings.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif settings.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif settings.offload == "group":
        if not hasattr(pipe, "enable_group_offload"):
            raise ValueError("`offload` 'group' needs a newer diffusers; use 'model'")
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    else:
        pipe.to(device)
    return pipe


def _from_pretrained(settings: Settings, dtype: torch.dtype) -> Any:
    path = Path(settings.model).expanduser()
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"`model` {settings.model}: the folder has no model_index.json of diffusers"
        )
    if path.is_file():
        raise ValueError(
            f"`model` {settings.model} is a file; give a folder in diffusers' format or a Hub id"
        )
    if not path.exists() and (settings.model.count("/") != 1 or settings.model[0] in "./~"):
        raise FileNotFoundError(
            f"there is no model at {settings.model}; give a folder, a Hub id such as owner/name, "
            f"or {EMBEDDED}"
        )
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError(
            "generating images needs the extra 'diffusers': pip install 'negtome-fast[diffusers]'"
        ) from error
    options = {"revision": settings.revision, "variant": settings.variant}
    given = {name: value for name, value in options.items() if value is not None}
    where = str(path) if path.exists() else settings.model
    try:
        with warnings.catch_warnings():
            # The new name of the argument, dtype, is unknown to the oldest supported diffusers.
            warnings.filterwarnings("ignore", category=FutureWarning)
            return DiffusionPipeline.from_pretrained(where, torch_dtype=dtype, **given)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"the model {settings.model} cannot be loaded: {reason}") from error


def default_device() -> str:
    """Return `"cuda"`, `"mps"` or `"cpu"`, the first one available."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
