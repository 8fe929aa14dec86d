"""`PipelineBatch`: a pipeline call that can be repeated for some images, from the same noise.

Every image has a generator of its own, whose state is kept, so that a retry starts from the same
noise as the first attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_TEXTS = ("negative_prompt", "prompt_2", "prompt_3")
"""Prefixes of the names of arguments that hold one text for each prompt, or one for all."""


MOST_IMAGES = 10_000
"""Largest number of images of a prompt."""


class PipelineBatch:
    """A pipeline's call for all images of all prompts.

    Args:
        pipe: a text-to-image pipeline.
        prompt: one or several.
        images_per_prompt: number of images of each prompt.
        generator: one for each image; None makes them from torch's global generator.
        call: further arguments of the pipeline's call.

    Raises:
        ValueError, TypeError: invalid arguments.
    """

    def __init__(
        self,
        pipe: Any,
        prompt: str | Sequence[str],
        images_per_prompt: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        call: dict[str, Any],
    ) -> None:
        listed = isinstance(prompt, Sequence) and not isinstance(prompt, str)
        prompts: list[Any] = list(prompt) if listed else [prompt]
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompt must be a string or several, got {prompt!r}")
        if "callback_on_step_end" in call and not callable(call["callback_on_step_end"]):
            raise TypeError("callback_on_step_end must be callable")
        if isinstance(images_per_prompt, bool) or not isinstance(images_per_prompt, int):
            raise TypeError(f"num_images_per_prompt must be an integer, got {images_per_prompt!r}")
        if not 1 <= images_per_prompt <= MOST_IMAGES:
            raise ValueError(
                f"num_images_per_prompt must be 1 to {MOST_IMAGES}, got {images_per_prompt}"
            )
        for name in ("return_dict", "num_videos_per_prompt"):
            if name in call:
                raise ValueError(f"{name} cannot be given: the images are taken from the output")
        if "latents" in call:
            raise ValueError(
                "latents cannot be given: hand over generators, from which every "
                "attempt draws the same noise"
            )
        self.pipe, self._prompt, self._call = pipe, prompt, call
        self._per_prompt = images_per_prompt
        self.prompts = [p for p in prompts for _ in range(images_per_prompt)]
        self.count = len(self.prompts)
        for name, value in call.items():
            if name.startswith(_TEXTS) and isinstance(value, list) and len(value) != len(prompts):
                raise ValueError(f"{name} must have {len(prompts)} entries, got {len(value)}")
        self._generators = self._one_each(generator)
        self._states = [g.get_state() for g in self._generators]

    def _one_each(
        self, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> list[torch.Generator]:
        if generator is None:
            return [
                torch.Generator().manual_seed(int(torch.randint(2**62, ())))
                for _ in range(self.count)
            ]
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        if not all(isinstance(one, torch.Generator) for one in generators):
            raise TypeError(f"generator must be torch.Generator objects, got {generator!r:.80}")
        if len(generators) != self.count:
            raise ValueError(
                f"{self.count} images need a generator each, so that one can be made again alone; "
                f"got {len(generators)}"
            )
        if len(set(map(id, generators))) != self.count:
            raise ValueError(
                f"{self.count} images need a generator each; one generator stands for two images, "
                "which would start from the same noise when they are made again"
            )
        return generators

    def generate(
        self,
        items: Sequence[int],
        callback: Callable[..., dict[str, Any]] | None = None,
        reseed: int = 0,
    ) -> Tensor:
        """Generate these images: `(len(items), 3, H, W)` in [0, 1] fp32 on the CPU.

        Args:
            items: numbers of the images.
            callback: called after each step, behind the caller's own callback.
            reseed: number of the attempt, from 1, which starts from different noise; 0 keeps the
                noise.
        """
        call = dict(self._call)
        if len(items) == self.count and callback is None and not reseed:
            prompt, generators = self._prompt, self._generators
            call["num_images_per_prompt"] = self._per_prompt
        else:
            prompt = [self.prompts[i] for i in items]
            generators = [self._copy(i, reseed) for i in items]
            for name, value in call.items():
                if name.startswith(_TEXTS) and isinstance(value, (str, list)):
                    call[name] = [self._text_of(value, i) for i in items]
        if callback is not None:
            call["callback_on_step_end"] = _both(call.get("callback_on_step_end"), callback)
            inputs = call.get("callback_on_step_end_tensor_inputs", ["latents"])
            call["callback_on_step_end_tensor_inputs"] = [*{*inputs, "latents"}]
        images = self.pipe(prompt, generator=generators, output_type="pt", **call).images
        return images.float().cpu()

    def _text_of(self, value: str | list[str], item: int) -> str:
        return value if isinstance(value, str) else value[item // self._per_prompt]

    def _copy(self, item: int, reseed: int) -> torch.Generator:
        copied = torch.Generator(self._generators[item].device)
        copied.set_state(self._states[item])
        if reseed:
            copied.manual_seed(retry_seed(self.seed_of(item), reseed))
        return copied

    def seed_of(self, item: int) -> int:
        return self._generators[item].initial_seed()

    def as_pil(self, images: Tensor) -> list[Any]:
        """Convert images as the pipeline's own post-processing does."""
        processor = self.pipe.image_processor
        return list(processor.numpy_to_pil(processor.pt_to_numpy(images)))


def retry_seed(seed: int, attempt: int) -> int:
    """Seed of a retry, far from the seeds of other images."""
    return (seed + 0x9E3779B97F4A7C15 * attempt) % 2**63


def _both(first: Callable[..., Any] | None, second: Callable[..., Any]) -> Callable[..., Any]:
    """Callback that calls the caller's, then ours on what the caller's returned."""
    if first is None:
        return second

    def call(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        changed = first(pipe, step, timestep, tensors) or {}
        return {**changed, **second(pipe, step, timestep, {**tensors, **changed})}

    return call
