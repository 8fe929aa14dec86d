"""Runs that are killed or find the disk full, and pipelines that draw noise at once for them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image

resource = pytest.importorskip("resource", reason="processes cannot be limited here")


def killed(action: Callable[[], Any]) -> None:
    """Run an action in a copy of this process, in which it must kill itself."""
    process = os.fork()
    if not process:
        try:
            signal.alarm(60)
            torch.set_num_threads(1)
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def kill_self(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, function: Callable[..., Any], then: Callable[..., Any]) -> Any:
    """Return a function that calls `then` instead of `function` in its call of this number."""
    calls = iter(range(1, 1 << 30))

    def either(*args: Any, **kwargs: Any) -> Any:
        return (then if next(calls) == number else function)(*args, **kwargs)

    return either


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes, as on a disk that is full."""
    assert threading.current_thread() is threading.main_thread()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class NoisePipeline:
    """A text-to-image pipeline whose images are noise of their seeds; its model never runs."""

    def __init__(self) -> None:
        from helpers.pipelines_fixtures import flux_pipeline

        self.transformer = flux_pipeline().transformer
        self.image_processor: Any = None

    def __call__(
        self,
        prompt: Any,
        generator: Any = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        strength: float = 1.0,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = None,
        negative_prompt: str | None = None,
    ) -> Any:
        images: Any = torch.stack([torch.rand(3, 64, 64, generator=g) for g in generator])
        if output_type == "pil":
            pixels = (images * 255).byte().permute(0, 2, 3, 1).numpy()
            images = [Image.fromarray(one) for one in pixels]
        return type("Output", (), {"images": images})
