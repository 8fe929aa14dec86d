"""Models of the ComfyUI double, guided by the nodes: what several test files start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.comfyui_double import BaseModel, Flux, ModelPatcher, UNetModel, Vae
from negtome_fast.integrations.comfyui import nodes
from negtome_fast.integrations.comfyui.guide import guides_of

KINDS = {"UNetModel": UNetModel, "Flux": Flux}
SETTINGS = {"alpha": 0.9, "threshold": 0.0, "window": "percent", "start": 0.0, "end": 1.0}
by_kind = pytest.mark.parametrize("kind", KINDS)


def model(kind: str) -> ModelPatcher:
    return ModelPatcher(BaseModel(KINDS[kind]()))


def diversity(patcher: ModelPatcher, **settings: Any) -> ModelPatcher:
    (guided,) = nodes.batch_diversity(patcher, **{**SETTINGS, "reference": "first", **settings})
    return guided


def avoid(patcher: ModelPatcher, count: int = 1, **settings: Any) -> ModelPatcher:
    pictures = torch.rand(count, 40, 56, 3, generator=torch.Generator().manual_seed(9))
    (guided,) = nodes.avoid_image(patcher, pictures, Vae(), **{**SETTINGS, **settings})
    return guided


def summary(guided: ModelPatcher) -> Any:
    (guide,) = guides_of(guided)
    return guide.guidance.summary()
