"""Compiled code and hooks.

Code that torch.compile made does not look whether hooks came since (dynamo's
`skip_nnmodule_hook_guards`), but whether a module was given a `forward` of its own. So a hooked
module gets one, its class's: code from before the hooks is then not used, and is once they are
gone, without compiling anything again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import CodeType, FunctionType, MethodType

import torch
from torch import nn

ROOM = 4
"""Variants of a frame that are made at most for one shape: steps in and out of the window, and
blocks whose input has other strides than the first."""


class ForwardOverride:
    """The class's `forward` as a module's own, until `remove`; it computes the same.

    Nothing is done where the module has one already, from an offload hook or a compiler, say.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward: MethodType | None = None
        if "forward" not in module.__dict__ and isinstance(type(module).forward, FunctionType):
            self._forward = MethodType(type(module).forward, module)
            module.__dict__["forward"] = self._forward

    @property
    def seen(self) -> bool:
        """Whether compiled code sees the difference."""
        return self._forward is not None

    def remove(self) -> None:
        # Somebody else may have put another in its place meanwhile.
        if self._forward is not None and self._module.__dict__.get("forward") is self._forward:
            del self._module.__dict__["forward"]
        self._forward = None


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it is: `module.compile()`, or a `forward` that is replaced."""
    return any(
        module._compiled_call_impl is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def nothing_compiles() -> bool:
    """Whether no frame that is entered now can be compiled, so that none has to be kept from it.

    `torch.compiler.disable` takes several microseconds a call.
    """
    current = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
    return current is not None and current() is None


def forget_all() -> None:
    """Has everything compiled anew that is called from now on."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def free_recompile_slots(model: nn.Module) -> None:
    """Drops compiled code of the model of which dynamo would make few more variants.

    A frame that exceeds the limit is not compiled any more, and is an error with `fullgraph`.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    limit = dynamo.config.recompile_limit
    for code in _codes(type(module) for module in model.modules()):
        if len(dynamo.eval_frame._debug_get_cache_entry_list(code)) > limit - ROOM:
            dynamo.reset_code(code)


def _codes(classes: Iterable[type]) -> set[CodeType]:
    """Of the methods of these classes, and of the functions around decorated ones."""
    bases = {base for one in set(classes) for base in one.__mro__}
    functions = (value for base in bases for value in vars(base).values())
    return {function.__code__ for function in functions if isinstance(function, FunctionType)}
