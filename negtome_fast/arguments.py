"""Checks of the operator's arguments, and the form in which backends take them.

A failed check raises `TypeError` or `ValueError`. Answers that cannot change are cached: with few
tokens, checking again would take longer than matching.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from .backends import small
from .naive import compute_dtype
from .pairing import Pairing, pairing_of

ReferenceTokens = Literal["first", "others"] | Tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class MatchProblem:
    """Which tokens are matched with which.

    Attributes:
        reference: reference tokens `(P, M, D)`; None if they come from the batch.
        mask: bool `(P, M)`, True where a reference token may be matched, or None.
        pairing: which source item meets which reference item.
        small_elements: `small.elements` where `small.guide_from_first` could serve, else 0.
    """

    reference: Tensor | None
    mask: Tensor | None
    pairing: Pairing
    small_elements: int = 0


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise `TypeError` for a sparse or nested tensor, whose memory is not an array of tokens."""
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor; pass one shape: torch.nested.to_padded_tensor")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {tensor.layout}; pass {name}.to_dense()")


def check_tokens(x: Tensor, name: str = "x") -> None:
    """Raise `TypeError` or `ValueError` unless `x` is tokens `(B, N, D)` of a known dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor (B, N, D), got {type(x).__name__}")
    check_dense(name, x)
    if x.dim() != 3:
        raise ValueError(f"{name} must have the shape (B, N, D), got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"x must be one of {names}, got {x.dtype}")
    if x.shape[2] == 0:
        raise ValueError(f"x has no channels: {tuple(x.shape)}")


def check_combine(combine: str) -> None:
    """Raise `ValueError` unless `combine` is "nearest" or "sum"."""
    if type(combine) is not str or combine not in ("nearest", "sum"):
        raise ValueError(f'combine must be "nearest" or "sum", got {combine!r:.80}')


def check_flag(name: str, value: Any) -> bool:
    """Return True or False, also of NumPy; raise `TypeError` for anything else."""
    if value is True or value is False:
        return value
    # By name, because the kernels' package does without NumPy.
    if type(value).__name__ in ("bool", "bool_") or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_problem(
    x: Tensor, reference: ReferenceTokens, mask: Tensor | None, matching: str, groups: int
) -> MatchProblem:
    """Check the arguments that select what is matched; see `negtome_fast.negtome`."""
    check_tokens(x)
    items, tokens, _ = x.shape
    if not isinstance(matching, str) or matching not in ("paper", "official"):
        raise ValueError(f'matching must be "paper" or "official", got {matching!r}')
    if isinstance(groups, bool) or not isinstance(groups, Integral) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    if items % groups:
        raise ValueError(
            f"the batch of {items} items does not divide into {groups} equal groups; "
            f"x is {tuple(x.shape)}"
        )
    if isinstance(reference, Tensor):
        return _external(x, reference, mask, matching, int(groups))
    if not isinstance(reference, str):
        raise TypeError(
            f'reference must be "first", "others" or a tensor, got {type(reference).__name__}'
        )
    if reference not in ("first", "others"):
        raise ValueError(f'reference must be "first", "others" or a tensor, got {reference!r}')
    size = items // groups
    if reference == "others" and size < 2:
        raise ValueError(
            f'reference="others" needs at least 2 items in a group; {items} items in {groups} '
            "groups have one each. Generate more images at once, or pass an image from outside of "
            'the batch: a tensor here, reference=Reference("image.png") for a pipeline'
        )
    mask = _mask("reference_mask", mask, x, [(tokens,), (1, tokens), (items, tokens)])
    return MatchProblem(None, mask, pairing_of(reference, items, int(groups)))


def find_problem(
    x: Tensor,
    reference: ReferenceTokens,
    mask: Tensor | None,
    matching: str,
    groups: int,
    skips_dispatcher: bool,
) -> MatchProblem:
    """Return the result of `check_problem`, cached if shapes alone determine it."""
    # Exact types only: True equals 1, but is not a number of groups.
    plain = type(reference) is str and type(matching) is str and type(groups) is int
    if plain and skips_dispatcher and mask is None and x is not None:
        return _known_problem(x.shape, x.dtype, reference, matching, groups)
    return check_problem(x, reference, mask, matching, groups)


@lru_cache(maxsize=256)
def _known_problem(
    shape: torch.Size, dtype: torch.dtype, reference: Any, matching: str, groups: int
) -> MatchProblem:
    """`check_problem` of an in-batch reference without a mask; errors are not cached."""
    with torch.inference_mode(False):
        x = torch.empty(shape, dtype=dtype, device="meta")
    problem = check_problem(x, reference, None, matching, groups)
    if reference != "first" or matching != "paper" or groups != 1:
        return problem
    return replace(problem, small_elements=small.elements(shape, shape[1], problem.pairing))


def _external(
    x: Tensor, reference: Tensor, mask: Tensor | None, matching: str, groups: int
) -> MatchProblem:
    items, tokens, channels = x.shape
    check_dense("reference", reference)
    if reference.dim() not in (2, 3, 4):
        raise ValueError(
            f"reference must be (M, D), (R, M, D) or (B, R, M, D), got {tuple(reference.shape)}"
        )
    if reference.dtype != x.dtype or reference.device != x.device:
        raise TypeError(
            f"reference and x must share dtype and device; reference is {reference.dtype} on "
            f"{reference.device}, x is {x.dtype} on {x.device}"
        )
    if reference.shape[-1] != channels:
        raise ValueError(
            f"reference has {reference.shape[-1]} channels, x has {channels}: "
            f"{tuple(reference.shape)} against {tuple(x.shape)}"
        )
    per_item = reference.dim() == 4
    if per_item and reference.shape[0] != items:
        raise ValueError(
            f"a reference (B, R, M, D) needs one set for each of the {items} items, "
            f"got {tuple(reference.shape)}"
        )
    if per_item and reference.stride(0) == 0 and (mask is None or mask.dim() < 3):
        # One set, expanded to the batch: it is shared, and B copies would be a waste.
        reference, per_item = reference[0], False
    number, length = (1, *reference.shape)[-3], reference.shape[-2]
    if number == 0:
        raise ValueError(f"reference holds no references: {tuple(reference.shape)}")
    if matching == "official" and length != tokens:
        raise ValueError(
            f'matching="official" needs as many reference tokens as source tokens, got {length} '
            f'and {tokens}; use matching="paper"'
        )
    shapes: list[tuple[int, ...]] = [(length,), (number, length)]
    if per_item:
        shapes.append((items, number, length))
        reference = reference.flatten(0, 1)
        if mask is not None and mask.dim() == 2:
            mask = mask.expand(items, *mask.shape)
    else:
        reference = reference.reshape(number, length, channels)
    mask = _mask("reference_mask", mask, x, shapes, rows=reference.shape[0])
    pairing = pairing_of("external", items, groups, number, per_item)
    return MatchProblem(reference, mask, pairing)


def _mask(
    name: str,
    mask: Tensor | None,
    x: Tensor,
    shapes: list[tuple[int, ...]],
    rows: int | None = None,
) -> Tensor | None:
    """Check a mask and expand it to `(rows, tokens)`; `rows` defaults to the batch size."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {kind}; pass {name} > 0.5, for example")
    check_dense(name, mask)
    if mask.device != x.device:
        raise TypeError(f"{name} is on {mask.device}, x is on {x.device}")
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name} must have the shape {wanted}, got {tuple(mask.shape)}")
    rows = x.shape[0] if rows is None else rows
    return mask.reshape(-1, mask.shape[-1]).expand(rows, -1).contiguous()


def mark_checked(value: Tensor) -> Tensor:
    """Mark a finite `alpha` or `threshold` that its owner never changes, so it is checked once."""
    value._negtome_checked = True  # type: ignore[attr-defined]
    return value


def find_parameter(
    name: str, value: float | Tensor, x: Tensor, slots: int, skips_dispatcher: bool
) -> Tensor:
    """Return the result of `parameter_tensor`; reuse a tensor that was made or checked before."""
    if not skips_dispatcher:
        return parameter_tensor(name, value, x, slots)
    if type(value) is float:
        return _known_number(name, value, x.dtype)
    if isinstance(value, Tensor) and getattr(value, "_negtome_checked", False):
        same = value.dtype == compute_dtype(x.dtype) and value.device == x.device
        if same and value.ndim == 0:
            return value
    return parameter_tensor(name, value, x, slots)


@lru_cache(maxsize=64)
def _known_number(name: str, value: float, dtype: torch.dtype) -> Tensor:
    """Cached tensor of a number, in host memory whatever the device of x.

    Backends can use a number on the host without filling a tensor on the device. They only read it.
    """
    with torch.inference_mode(False):
        return parameter_tensor(name, value, torch.empty((), dtype=dtype, device="cpu"), 1)


def parameter_tensor(name: str, value: float | Tensor, x: Tensor, slots: int) -> Tensor:
    """Check `alpha` or `threshold`; return an fp32 tensor `()` or `(slots,)` on x's device.

    It is fp64 for fp64 tokens.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        if not torch.compiler.is_compiling():
            limit = torch.finfo(compute_dtype(x.dtype)).max
            if not -limit <= value <= limit:
                raise ValueError(f"{name} must be finite in fp32, got {_short(value)}")
            value = float(value)
        if torch.compiler.is_compiling():
            # A product keeps the number symbolic in the graph; `full` would specialise on it.
            return torch.ones((), dtype=compute_dtype(x.dtype), device=x.device) * value
        return torch.full((), value, dtype=compute_dtype(x.dtype), device=x.device)
    check_dense(name, value)
    if value.is_meta and not x.is_meta:
        raise TypeError(f"{name} is on meta, without a value; x is on {x.device}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.numel() == 1:
        value = value.reshape(())
    elif tuple(value.shape) != (slots,):
        raise ValueError(
            f"{name} must be a scalar or one value for each of the {slots} references, "
            f"got the shape {tuple(value.shape)}"
        )
    # A lazily negated view, such as `z.conj().imag`, has the negative in its memory.
    given, value = value, value.detach().to(compute_dtype(x.dtype)).resolve_neg()
    # Values on an accelerator are not read: that would wait for the device.
    if value.device.type == "cpu" and _is_real(value):
        if not all(math.isfinite(number) for number in value.reshape(-1).tolist()):
            raise ValueError(f"{name} must be finite in fp32, got {given.tolist()}")
        if x.device.type != "cpu" and value.dim() == 0:
            # The host knows the number, so fill the tensor: a copy would wait for the device.
            return torch.full((), float(value), dtype=value.dtype, device=x.device)
    return value.to(x.device)


def _short(value: Any) -> str:
    """Return the value for an error; a number of many digits by their count."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1100:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.80}"


def _is_real(value: Tensor) -> bool:
    """Return True if the tensor's values can be read now: not while compiling or under `vmap`."""
    from torch._subclasses.fake_tensor import FakeTensor

    if torch.compiler.is_compiling() or isinstance(value, FakeTensor):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(value)


def draw_source_mask(
    x: Tensor, source_mask: Tensor | None, dropout: float, generator: torch.Generator | None
) -> Tensor | None:
    """Return the mask `(B, N)` of tokens that may move: the caller's mask, minus dropped tokens."""
    items, tokens = x.shape[:2]
    source_mask = _mask("source_mask", source_mask, x, [(tokens,), (1, tokens), (items, tokens)])
    wrong = isinstance(dropout, bool) or not isinstance(dropout, Real)
    if wrong or not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be a probability between 0 and 1, got {_short(dropout)}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if dropout > 0.0:
        # As in diffusers: a generator on the CPU draws there, whatever the device of x.
        device = x.device if generator is None else generator.device
        # generator=None is left out: that overload takes no symbolic sizes.
        given: dict[str, Any] = {} if generator is None else {"generator": generator}
        drawn = torch.rand(items, tokens, dtype=torch.float32, device=device, **given)
        kept = (drawn > float(dropout)).to(x.device)
        source_mask = kept if source_mask is None else source_mask & kept
    return source_mask
