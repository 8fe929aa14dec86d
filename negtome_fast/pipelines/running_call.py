"""`RunningCall`: what a pipeline was called with, read from its frame on the stack.

A pipeline does not hand its arguments to its model. They say which items of a batch belong
together.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from types import FrameType
from typing import Any

import torch


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
        return self._call() is not None

    def _call(self) -> FrameType | None:
        pipe = self._pipe()
        frame: FrameType | None = sys._getframe()
        while pipe is not None and frame is not None:
            # Reading a frame's locals keeps them alive, so only the pipeline's frames are read.
            method: Any = getattr(type(pipe), frame.f_code.co_name, None)
            is_method = getattr(inspect.unwrap(method), "__code__", None) is frame.f_code
            if is_method and frame.f_locals.get("self") is pipe:
                return frame
            frame = frame.f_back
        return None

    def generator(self) -> torch.Generator | None:
        """Returns the generator that the pipeline was called with, the first if there are many."""
        call = self._call()
        given = None if call is None else call.f_locals.get("generator")
        if isinstance(given, (list, tuple)) and given:
            given = given[0]
        return given if isinstance(given, torch.Generator) else None

    def latents(self) -> torch.Tensor | None:
        """Returns the latents that the pipeline's call holds, those that it generates."""
        call = self._call()
        own = None if call is None else call.f_locals.get("latents")
        return own if isinstance(own, torch.Tensor) else None

    def guides_classifier_free(self) -> bool | None:
        """Returns True if the pipeline says that its batch has guidance parts; None if unknown."""
        pipe, answers = self._pipe() if self.running else None, []
        for name in ("do_classifier_free_guidance", "do_perturbed_attention_guidance"):
            try:
                answer = getattr(pipe, name, None)
            except (AttributeError, TypeError):  # the property needs a value that no call has set
                answer = None
            if isinstance(answer, bool):
                answers.append(answer)
        return any(answers) if answers else None
