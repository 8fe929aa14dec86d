"""The device and the backends that tests run on: without a GPU, Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton reads this when it decorates the kernels, so it must be set before they are imported.
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

BACKENDS = ["reference", "torch", *(["triton"] if find_spec("triton") else [])]
# On a GPU the suite asks for the kernels alone: the other backends were tested elsewhere.
if chosen := os.environ.get("NEGTOME_FAST_TEST_BACKENDS"):
    BACKENDS = [backend for backend in BACKENDS if backend in chosen.split(",")]
