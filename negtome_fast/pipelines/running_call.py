"""The calls of pipelines, read from their frames on the stack: `RunningCall`, `ModelCall`.

A pipeline does not hand its arguments to its model. They say which items of a batch belong
together, and which generator draws the noise.
"""

from __future__ import annotations

import inspect
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

_IMAGES_PER_PROMPT = (
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "num_waveforms_per_prompt",
)
_GUIDANCE_FLAGS = ("do_classifier_free_guidance", "do_perturbed_attention_guidance")
_EMBEDS = re.compile(r"prompt_embed|text_embed|encoder_hidden_states")
_NOT_EMBEDS = re.compile(r"negative|uncond|pooled|mask|image_embed")


class RunningCall:
    """The call of a pipeline that this thread is in.

    It holds the pipeline weakly.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)

    @property
    def running(self) -> bool:
        """True if this thread is in a call of the pipeline, not of another that shares its model.

        The stack is searched for the call, because a pipeline keeps the state of its last run and
        does not say when that run ended.
        """
        pipe = self._pipe()
        frame: FrameType | None = sys._getframe()
        while pipe is not None and frame is not None:
            # Reading a frame's locals keeps them alive, so only the pipeline's frames are read.
            if _is_method(frame, pipe) and frame.f_locals.get("self") is pipe:
                return True
            frame = frame.f_back
        return False


class ModelCall:
    """The calls of pipelines in which this thread runs a model, the innermost first.

    They may be calls of any pipeline that holds the model: a copy made by `from_pipe`, a modular
    pipeline, a loop of the user's. It holds the pipelines' variables, so it must not be kept.

    Args:
        model: the model that runs.
        pipe: the pipeline that was guided, which may run its model in any of its methods; of other
            pipelines, only `__call__` is read.
    """

    def __init__(self, model: nn.Module, pipe: Any = None) -> None:
        self._scopes = list(_scopes(model, pipe))

    def __bool__(self) -> bool:
        """Returns True if a pipeline runs the model."""
        return bool(self._scopes)

    def get(self, name: str) -> Any:
        """Returns a variable of the innermost call in which it is not None; else None."""
        return next((known[name] for _, known in self._scopes if name in known), None)

    def has_callback(self) -> bool:
        """Returns True if the caller's code is called between the steps."""
        names = ("callback", "callback_on_step_end")
        return any(self.get(name) is not None for name in names)

    def generator(self) -> torch.Generator | None:
        """Returns the generator that the pipeline was called with, the first if there are many."""
        given = self.get("generator")
        if isinstance(given, (list, tuple)) and given:
            given = given[0]
        return given if isinstance(given, torch.Generator) else None

    def guides_classifier_free(self) -> bool | None:
        """Returns True if a pipeline says that its batch has guidance parts; None if unknown."""
        answers = []
        for pipe, _ in self._scopes:
            for name in _GUIDANCE_FLAGS:
                try:
                    answer = getattr(pipe, name, None)
                except (AttributeError, TypeError):  # it needs a value that no call has set
                    answer = None
                if isinstance(answer, bool):
                    answers.append(answer)
        return any(answers) if answers else None

    def scheduled_pipe(self) -> Any:
        """Returns the innermost pipeline that has a scheduler; None if there is none."""
        scheduled = (p for p, _ in self._scopes if getattr(p, "scheduler", None) is not None)
        return next(scheduled, None)

    def latents(self) -> Tensor | None:
        """Returns the pipeline's latents, one item per image, where they can be found."""
        latents = self.get("latents")
        return latents if isinstance(latents, Tensor) and latents.ndim > 2 else None

    def images_per_prompt(self) -> int | None:
        """Returns how many images each prompt of the call has; None if the call does not say."""
        given = (self.get(name) for name in _IMAGES_PER_PROMPT)
        return next((int(value) for value in given if isinstance(value, int) and value > 0), None)

    def prompts(self) -> list[str] | None:
        """Returns the prompts in words; None if the call has none."""
        given = self.get("prompt")
        if isinstance(given, str):
            return [given]
        if isinstance(given, (list, tuple)) and given:
            return [entry if isinstance(entry, str) else repr(entry) for entry in given]
        return None

    def embeddings(self) -> Iterator[list[Tensor]]:
        """Yields the encoded prompts of the innermost call that has some, as one tensor per item.

        They may be those of all images, with or without the negative ones, or of all prompts.
        """
        for _, variables in self._scopes:
            found = [
                _by_item(name, value)
                for name, value in variables.items()
                if _EMBEDS.search(name) and not _NOT_EMBEDS.search(name)
            ]
            if any(found):
                yield from filter(None, found)
                return


def _by_item(name: str, value: Any) -> list[Tensor]:
    if isinstance(value, Tensor) and value.ndim > 2:
        # HiDream has the states of several layers of its text encoder, (layers, B, ...).
        return list(value.unbind(1 if "llama3" in name else 0))
    lists = isinstance(value, (list, tuple))
    return list(value) if lists and all(isinstance(item, Tensor) for item in value) else []


def _scopes(model: nn.Module, pipe: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields the pipeline and the variables of each call that runs the model, innermost first.

    The blocks of a modular pipeline are called with the pipeline as an argument, and keep the
    variables in a state.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        # Reading a frame's locals keeps them alive, so few frames are read.
        if frame.f_code.co_name == "__call__" or (pipe is not None and _is_method(frame, pipe)):
            local = frame.f_locals
            holders = (local.get(name) for name in ("self", "components", "pipeline"))
            holder = next((h for h in holders if h is not None and _holds(h, model, pipe)), None)
            if holder is not None:
                state = getattr(local.get("state"), "values", None)
                block = getattr(local.get("block_state"), "__dict__", {})
                stored = state if isinstance(state, Mapping) else {}
                everywhere = (*stored.items(), *block.items(), *local.items())
                yield holder, {k: value for k, value in everywhere if value is not None}
        frame = frame.f_back


def _is_method(frame: FrameType, pipe: Any) -> bool:
    method: Any = getattr(type(pipe), frame.f_code.co_name, None)
    return method is not None and getattr(inspect.unwrap(method), "__code__", None) is frame.f_code


def _holds(pipe: Any, model: nn.Module, given: Any) -> bool:
    """Returns True if an object is a pipeline with this model, perhaps compiled."""
    if isinstance(pipe, nn.Module):
        return False
    parts = getattr(pipe, "__dict__", {}).values()
    modules = (part for part in parts if isinstance(part, nn.Module))
    return pipe is given or any(getattr(m, "_orig_mod", m) is model for m in modules)
