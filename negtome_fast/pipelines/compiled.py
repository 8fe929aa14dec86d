"""Hooks in code that torch.compile made: opaque operators, and a `forward` that dynamo notices.

Compiled code does not check whether hooks were added since (dynamo's `skip_nnmodule_hook_guards`),
but whether a module has an instance attribute `forward`. So a hooked module gets its class's
`forward` as such an attribute. Code from before the hooks is then not used, and is used again once
they are gone, without another compilation.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MAX_VARIANTS = 4
"""Variants of a frame that one shape may need: steps in and out of the window, and blocks whose
input has other strides than the first."""

# torch.compiler.disable would import the whole compiler here; this imports it when it is called.
outside_of_graphs: Callable[..., Any] = getattr(torch, "_disable_dynamo", torch.compiler.disable)


class OpenForward(Protocol):
    """A guided forward of a model, which compiled code calls back."""

    def guide_block(
        self, tokens: Tensor, number: Tensor | int, all_image: bool, inplace: bool
    ) -> Tensor:
        """Guides the attention tokens (B, S, D) of a block."""

    def enter_grid(self, images: Tensor) -> None:
        """Notes that the pixels of images (B, C, H, W) are the tokens from here on."""


class _Current(threading.local):
    forward: OpenForward | None = None


current = _Current()
"""`current.forward`: the guided forward that this thread is in."""

# Compiled code cannot hold the state of a run, so it calls back. The state and the count of calls
# change as it runs, which a recorded CUDA graph would not repeat.
_OPAQUE_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
torch.library.define(
    "negtome_fast::guide_block",
    "(Tensor tokens, Tensor number, bool all_image) -> Tensor",
    tags=_OPAQUE_TAGS,
)


@torch.library.impl("negtome_fast::guide_block", "CompositeExplicitAutograd")
def _guide_block(tokens: Tensor, number: Tensor, all_image: bool) -> Tensor:
    assert current.forward is not None
    guided = current.forward.guide_block(tokens, number, all_image, inplace=False)
    return (tokens.clone() if guided is tokens else guided).contiguous()


@torch.library.register_fake("negtome_fast::guide_block")
def _fake_guide_block(tokens: Tensor, number: Tensor, all_image: bool) -> Tensor:
    return tokens.new_empty(tokens.shape)


torch.library.define("negtome_fast::enter_grid", "(Tensor images) -> Tensor", tags=_OPAQUE_TAGS)


@torch.library.impl("negtome_fast::enter_grid", "CompositeExplicitAutograd")
def _enter_grid(images: Tensor) -> Tensor:
    assert current.forward is not None
    current.forward.enter_grid(images)
    return images.clone()


@torch.library.register_fake("negtome_fast::enter_grid")
def _fake_enter_grid(images: Tensor) -> Tensor:
    return torch.empty_like(images)


class ForwardOverride:
    """The class's `forward` as an instance attribute of a module, until `remove`.

    It computes the same. Nothing is done if the module has such an attribute already, for example
    from an offload hook or a compiler.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward: MethodType | None = None
        if "forward" not in module.__dict__ and isinstance(type(module).forward, FunctionType):
            self._forward = MethodType(type(module).forward, module)
            module.__dict__["forward"] = self._forward

    @property
    def seen(self) -> bool:
        """True if compiled code notices the hooks."""
        return self._forward is not None

    def remove(self) -> None:
        # Somebody else may have replaced it meanwhile.
        if self._forward is not None and self._module.__dict__.get("forward") is self._forward:
            del self._module.__dict__["forward"]
        self._forward = None


def is_compiled(model: nn.Module) -> bool:
    """Returns True if the model or a part of it is: `module.compile()`, or a replaced `forward`."""
    return any(
        module._compiled_call_impl is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def nothing_compiles() -> bool:
    """Returns True if dynamo looks at no frame that is entered now.

    Then `torch.compiler.disable`, which takes several microseconds per call, is not needed.
    """
    callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
    return callback is not None and callback() is None


def forget_all() -> None:
    """Drops all compiled code, so that everything that is called from now on is compiled again."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def free_recompile_slots(model: nn.Module) -> None:
    """Drops compiled code of the model's frames that are close to dynamo's recompile limit.

    A frame beyond the limit is not compiled any more, and is an error with `fullgraph`.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    limit = dynamo.config.recompile_limit
    for code in _codes(type(module) for module in model.modules()):
        if len(dynamo.eval_frame._debug_get_cache_entry_list(code)) > limit - MAX_VARIANTS:
            dynamo.reset_code(code)


def _codes(classes: Iterable[type]) -> set[CodeType]:
    """Returns the code of all methods of these classes, and of their decorators' wrappers."""
    bases = {base for one in set(classes) for base in one.__mro__}
    functions = (value for base in bases for value in vars(base).values())
    return {function.__code__ for function in functions if isinstance(function, FunctionType)}
