"""Loading a pipeline onto its device, with diffusers' ways to save memory."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from ..ops import resolve_backend
from .settings import DTYPES, EMBEDDED, Settings


def load_pipeline(settings: Settings) -> Any:
    """Load the pipeline of `settings.model` onto its device, with the settings that save memory.

    Raises:
        ValueError: there is no such model, it cannot be loaded, or a setting does not fit it.
        ImportError: diffusers is missing; names the extra to install.
    """
    device, dtype = check_machine(settings)
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


def check_machine(settings: Settings) -> tuple[str, torch.dtype]:
    """Check that this machine has what the settings ask for; returns device and dtype.

    Raises:
        ValueError: there is no such device, or it does not serve the setting; names the field.
    """
    chosen = settings.device or default_device()
    device = _checked_device(chosen)
    if settings.offload in ("model", "sequential") and device.type == "cpu":
        raise ValueError(f"`offload` {settings.offload!r} needs a GPU; on the CPU leave it out")
    dtype = DTYPES[settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    try:
        resolve_backend(settings.overrides().get("backend", "auto"), device, dtype)
    except RuntimeError as error:
        raise ValueError(f"`backend` {str(error).removeprefix('backend=')}") from error
    return chosen, dtype


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` {name} is not a device of torch") from error
    if device.type == "meta":
        raise ValueError("`device` meta computes no images; choose cpu or a GPU")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    elif device.type == "mps":
        count = int(torch.backends.mps.is_available())
    elif device.type == "cpu":
        count = 1
    else:
        count = getattr(getattr(torch, device.type, None), "device_count", lambda: 0)()
    if count == 0:
        raise ValueError(f"`device` {name}: torch finds no such device here")
    if (device.index or 0) >= count:
        raise ValueError(
            f"`device` {name}: torch finds {count} {device.type} device{'s' * (count > 1)} here, "
            f"counted from 0"
        )
    return device


def pipeline_class(settings: Settings) -> type | None:
    """Return the class of the pipeline, if it is known without loading the model."""
    try:
        import diffusers
    except ImportError:
        return None  # loading says what to install
    if settings.model == EMBEDDED:
        return diffusers.FluxPipeline
    index = Path(settings.model).expanduser() / "model_index.json"
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        found = getattr(diffusers, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if isinstance(found, type) else None


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
