"""Hooks of one guided model: registered, moved to new output projections, removed."""

from __future__ import annotations

import copy
import threading
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .compiled import ForwardOverride

installing = threading.RLock()
"""Held while hooks are registered or removed."""


class Unsaved:
    """Base of objects that a model's hooks hold: a deep copy is whole, a pickle does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unguided, ()


class _Unguided:
    """Replaces the hooks in a pickled model and does nothing: guidance is not saved with it."""

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    _before_model = _after_model = _before_grid = _nothing
    after_attention = before_projection = _nothing


class HookOwner(Protocol):
    """The state that the hooks of a model share."""

    def after_attention(self, output: Any, number: torch.Tensor | int) -> Any:
        """Returns the guided output of an attention module, or None to keep it."""

    def before_projection(self, args: tuple[Any, ...], number: torch.Tensor | int) -> Any:
        """Returns the guided input of an output projection, or None to keep it."""


class BlockHook:
    """The hook after an attention module, or before its output projection.

    Each block has its own object. For compiled code these differ by a tensor only, so that one
    guard on a module's hooks serves all blocks.
    """

    def __init__(self, owner: HookOwner, number: torch.Tensor) -> None:
        self.owner = owner
        self.number = number
        self.index = int(number)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> Any:
        number = self.number if torch.compiler.is_compiling() else self.index
        if output:
            return self.owner.after_attention(output[0], number)
        return self.owner.before_projection(args, number)


class RegisteredHooks:
    """Handles of all hooks of one owner. It is true while there are any.

    Each hooked module also has a `ForwardOverride`, so that compiled code notices the hook.
    """

    def __init__(self, owner: HookOwner) -> None:
        self._owner = owner
        self._handles: list[RemovableHandle] = []
        self._projections: dict[nn.Module, nn.Module] = {}
        self._projection_handles: dict[nn.Module, RemovableHandle] = {}
        self._overrides: dict[nn.Module, ForwardOverride] = {}

    def __bool__(self) -> bool:
        return bool(self._handles)

    @property
    def unseen(self) -> bool:
        """True if there is a hook that compiled code does not notice."""
        return not all(override.seen for override in self._overrides.values())

    def add(self, module: nn.Module, handle: RemovableHandle) -> None:
        """Keeps the handle of a hook that was registered on a module."""
        self._handles.append(handle)
        if module not in self._overrides:
            self._overrides[module] = ForwardOverride(module)

    def hook_projection(
        self, block: nn.Module, projection: nn.Module, number: torch.Tensor
    ) -> None:
        """Hooks the output projection of a block, unless it is hooked.

        Called in every guided forward, because loading a LoRA replaces the projections.
        """
        if projection is self._projections.get(block):
            return
        with installing:
            if block in self._projections:
                self._projection_handles[block].remove()
                self._overrides.pop(self._projections[block]).remove()
            # A new module may have taken over the hooks of the old one, as quantization does, or
            # another thread may have been here first.
            self._discard(projection)
            self._overrides[projection] = ForwardOverride(projection)
            hook = projection.register_forward_pre_hook(BlockHook(self._owner, number))
            self._projection_handles[block] = hook
            self._projections[block] = projection

    def remove(self, model: nn.Module) -> None:
        """Removes all hooks from a model."""
        for handle in (*self._handles, *self._projection_handles.values()):
            handle.remove()
        self._handles.clear()
        self._projection_handles.clear()
        self._projections.clear()
        for module in model.modules():
            self._discard(module)
        for override in self._overrides.values():
            override.remove()
        self._overrides.clear()

    def _discard(self, module: nn.Module) -> None:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, BlockHook) and hook.owner is self._owner:
                    del hooks[key]
