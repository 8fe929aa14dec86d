"""The operator as functions: checks its arguments, chooses the backend, calls `torch.library`.

    y_i = x_i + alpha * (x_i - r_j)  where  j = argmax_j cos(x_i, r_j)  and  cos > threshold

NegToMe, arXiv 2412.01339, section 3 and figure 3c.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from . import ops
from .backends import small
from .pairing import Mode, Pairing

Reference = Literal["first", "others"] | Tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_warned: set[str] = set()


def negtome(
    x: Tensor,
    reference: Reference = "first",
    *,
    alpha: float | Tensor = 0.9,
    threshold: float | Tensor = 0.65,
    reference_mask: Tensor | None = None,
    matching: str = "paper",
    groups: int = 1,
    combine: str = "nearest",
    source_mask: Tensor | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Push every token away from its most similar reference token (negative token merging).

    Args:
        x: image tokens `(B, N, D)`, fp32, bf16, fp16 (or fp64, torch backends only); any strides,
            so a slice `hidden_states[:, text:]` is not copied.
        reference: `"first"` (default, as the authors do): item 0 of every group is the reference
            of the others and is returned bit-identical. `"others"`: the best match among all other
            items of the group. A tensor `(M, D)` or `(R, M, D)`, shared by the batch, or
            `(B, R, M, D)`, a set for each item.
        alpha: push strength, a number or a tensor, 0-dim or one for each reference `(R,)`.
            Positive pushes away, negative pulls toward, 0 is the identity. 0.9 as the authors.
            A tensor never recompiles a `torch.compile`d caller; a number may, once. No gradient
            flows to it. Values on an accelerator are not checked: that would wait for the device.
        threshold: cosine similarity a match must exceed, strictly; like `alpha`. 0.65 as the
            authors use for FLUX.
        reference_mask: bool, True where a reference token may be matched: `(M,)` or `(R, M)`, for
            references per item also `(B, R, M)`, for in-batch references `(N,)` or `(B, N)`.
            With `matching="official"` it gates output positions instead, as the authors' does.
        matching: `"paper"`, the formula above; or `"official"`, what the authors' code computes:
            for each reference token j the source token i with the largest cosine, then token j is
            pushed away from `r_i`. Needs `N == M`.
        groups: equal contiguous groups of the batch that never see each other, 2 where
            classifier-free guidance concatenates its halves.
        combine: with several references, `"nearest"` (default) takes the best match over all of
            them and that reference's alpha and threshold; `"sum"` adds the pushes of each.
        source_mask: bool `(N,)` or `(B, N)`, True where a token may move.
        dropout: probability in [0, 1] that a token is spared.
        generator: draws the dropout, on its own device; None uses torch's global one.
        inplace: write into `x` (not differentiable); `x` is also returned.
        backend: `"auto"` (Triton on a GPU, else torch), `"triton"`, `"torch"`, `"reference"`;
            the environment variable NEGTOME_FAST_BACKEND decides what "auto" means.

    Returns:
        `(B, N, D)`, dtype of `x`. Tokens with a non-finite norm come back as they came and are
        never chosen; ties go to the lowest reference, then the lowest token. The gradient treats
        the choice of match as constant. Arithmetic is fp32 (fp64 for fp64), rounded once.

    Raises:
        ValueError, TypeError: arguments that cannot be right, with shapes in the message.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    return guide_tokens(
        x,
        reference,
        alpha=alpha,
        threshold=threshold,
        reference_mask=reference_mask,
        matching=matching,
        groups=groups,
        combine=combine,
        source_mask=source_mask,
        dropout=dropout,
        generator=generator,
        inplace=inplace,
        backend=backend,
    )[0]


def guide_tokens(
    x: Tensor,
    reference: Reference = "first",
    *,
    alpha: float | Tensor = 0.9,
    threshold: float | Tensor = 0.65,
    reference_mask: Tensor | None = None,
    matching: str = "paper",
    groups: int = 1,
    combine: str = "nearest",
    source_mask: Tensor | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`negtome`, and what it did: `(y, similarity, pushed)`; arguments as there.

    Returns:
        y: as `negtome`.
        similarity: `(B, S, N)` fp32, cosine of the match, -inf where there is none; `S` is 1 for
            `combine="nearest"`, else the number of references an item sees.
        pushed: `(B, S, N)` int64, `slot * M + token` of the reference token that a token was pushed
            away from, -1 where it was left alone. The slot numbers the references an item sees:
            the external ones in order, for `"others"` the other items of the group in order.
    """
    given = None if isinstance(reference, str) else reference
    unwatched = ops.can_skip_dispatcher(x, given, reference_mask, source_mask)
    # Exact types only: True is equal to 1, and no number of groups.
    plain = type(reference) is str and type(matching) is str and type(groups) is int
    if unwatched and reference_mask is None and plain:
        problem = _known_problem(x.shape, x.dtype, reference, matching, groups)
    else:
        problem = check_problem(x, reference, reference_mask, matching, groups)
    check_combine(combine)
    strength = _parameter("alpha", alpha, x, problem.slots, unwatched)
    limit = _parameter("threshold", threshold, x, problem.slots, unwatched)
    source_mask = None
    if not (source_mask is None and generator is None and type(dropout) is float and dropout == 0):
        source_mask = draw_source_mask(x, source_mask, dropout, generator)
    ops.check_backend_name(backend)
    if problem.mode == "first" and x.shape[0] == groups:
        _warn_nothing_to_push(x.shape, groups)
        return _untouched(x, problem.slots if combine == "sum" else 1, inplace)
    if 0 in x.shape or (problem.reference is not None and 0 in problem.reference.shape):
        return _untouched(x, problem.slots if combine == "sum" else 1, inplace)

    if 0 < problem.elements <= small.SMALL and unwatched and x.is_cpu and ops.runs_torch(backend):
        if inplace and not x.is_contiguous():
            _check_writable(x, reference)
        out = x if inplace else x.new_empty(x.shape)
        done = small.guide_from_first(x, strength, limit, source_mask, out)
        if done is not None:
            return out, *done
    call = ops.Call(
        x,
        problem.reference,
        strength,
        limit,
        problem.mask,
        source_mask,
        problem.mode,
        int(groups),
        problem.per_item,
        matching,
        combine,
        backend,
    )
    if inplace:
        _check_writable(x, reference)
        similarity, pushed = ops.run_at_once(call, x) if unwatched else ops.guide_(*call)
        return x, similarity, pushed
    if not unwatched:
        result: tuple[Tensor, Tensor, Tensor] = ops.guide(*call)
        return result
    out = x.new_empty(x.shape)
    return out, *ops.run_at_once(call, out)


def _check_writable(x: Tensor, reference: Reference) -> None:
    if not x.is_contiguous() and any(
        step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)
    ):
        raise ValueError(
            f"inplace=True needs tokens of their own memory; x {tuple(x.shape)} is expanded "
            f"(strides {x.stride()}); use inplace=False or x.clone()"
        )
    if torch.is_grad_enabled() and (
        x.requires_grad or (isinstance(reference, Tensor) and reference.requires_grad)
    ):
        raise ValueError("inplace=True is not differentiable; use inplace=False or torch.no_grad()")


@torch.no_grad()
def match_tokens(
    x: Tensor,
    reference: Reference = "first",
    *,
    reference_mask: Tensor | None = None,
    groups: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The most similar reference token of every source token; arguments as `negtome`.

    Returns:
        similarity: `(B, N)` fp32 (fp64 for fp64), the cosine; -inf where nothing is allowed.
        index: `(B, N)` int64; -1 where nothing is allowed, which includes the reference items of
            `"first"`. For `"first"` and a single reference the token's number in `[0, M)`; for
            several references `reference * M + token`; for `"others"` `item * N + token`.
    """
    problem = check_problem(x, reference, reference_mask, "paper", groups)
    ops.check_backend_name(backend)
    items, tokens = x.shape[:2]
    if (
        problem.slots == 0
        or 0 in x.shape
        or (problem.reference is not None and 0 in problem.reference.shape)
    ):
        _, similarity, index = _untouched(x, 1, True)
        return similarity[:, 0], index[:, 0]
    similarity, index = ops.match(
        x,
        problem.reference,
        problem.mask,
        problem.mode,
        int(groups),
        problem.per_item,
        "paper",
        backend,
    )
    similarity, slot = similarity.max(dim=1)
    index = index.gather(1, slot[:, None])[:, 0]
    if problem.mode == "others":
        size = items // groups
        item = torch.arange(items, device=x.device)[:, None]
        offset = (item - item % size + slot + (slot >= item % size)) * tokens
    else:
        offset = slot * (tokens if problem.reference is None else problem.reference.shape[1])
    return similarity, torch.where(index >= 0, index + offset, -1)


@dataclass(frozen=True)
class Problem:
    """Arguments in the form of the operators: references `(P, M, D)` or None, mask `(P, M)`."""

    reference: Tensor | None
    mask: Tensor | None
    mode: Mode
    per_item: bool
    slots: int
    #: `small.elements` where `small.guide_from_first` could do it, else 0.
    elements: int = 0


def check_tokens(x: Tensor) -> None:
    """Raise `TypeError` or `ValueError` where `x` is not tokens `(B, N, D)` of a known dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor (B, N, D), got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"x must have the shape (B, N, D), got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"x must be one of {names}, got {x.dtype}")
    if x.shape[2] == 0:
        raise ValueError(f"x has no channels: {tuple(x.shape)}")


def check_combine(combine: str) -> None:
    """Raise `ValueError` where `combine` is not one of the two ways."""
    if combine not in ("nearest", "sum"):
        raise ValueError(f'combine must be "nearest" or "sum", got {combine!r}')


def check_problem(
    x: Tensor, reference: Reference, mask: Tensor | None, matching: str, groups: int
) -> Problem:
    check_tokens(x)
    items, tokens, _ = x.shape
    if matching not in ("paper", "official"):
        raise ValueError(f'matching must be "paper" or "official", got {matching!r}')
    if isinstance(groups, bool) or not isinstance(groups, Integral) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    if items % groups:
        raise ValueError(
            f"the batch of {items} items does not divide into {groups} equal groups; "
            f"x is {tuple(x.shape)}"
        )
    if isinstance(reference, Tensor):
        return _external(x, reference, mask, matching)
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
            "groups have one each. Generate more images, or hand over a reference tensor"
        )
    mask = _mask("reference_mask", mask, x, [(tokens,), (1, tokens), (items, tokens)])
    return Problem(None, mask, reference, False, 1 if reference == "first" else size - 1)


@lru_cache(maxsize=256)
def _known_problem(
    shape: torch.Size, dtype: torch.dtype, reference: Any, matching: str, groups: int
) -> Problem:
    """`check_problem` of an in-batch reference without a mask; errors are not remembered."""
    with torch.inference_mode(False):
        x = torch.empty(shape, dtype=dtype, device="meta")
    problem = check_problem(x, reference, None, matching, groups)
    if reference != "first" or matching != "paper" or groups != 1:
        return problem
    elements = small.elements(shape, shape[1], Pairing("first", shape[0]))
    return replace(problem, elements=elements)


def _external(x: Tensor, reference: Tensor, mask: Tensor | None, matching: str) -> Problem:
    items, tokens, channels = x.shape
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
        # One set expanded to the batch: shared, and not worth B copies.
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
    return Problem(reference, mask, "external", per_item, number)


def _mask(
    name: str,
    mask: Tensor | None,
    x: Tensor,
    shapes: list[tuple[int, ...]],
    rows: int | None = None,
) -> Tensor | None:
    """Check a mask and bring it to `(rows, tokens)`; rows default to the batch."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {kind}; write {name} > 0.5, say")
    if mask.device != x.device:
        raise TypeError(f"{name} is on {mask.device}, x is on {x.device}")
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name} must have the shape {wanted}, got {tuple(mask.shape)}")
    rows = x.shape[0] if rows is None else rows
    return mask.reshape(-1, mask.shape[-1]).expand(rows, -1).contiguous()


def mark_checked(value: Tensor) -> Tensor:
    """Mark a tensor that its owner never changes as a finite `alpha` or `threshold`."""
    value._negtome_checked = True  # type: ignore[attr-defined]
    return value


def _parameter(name: str, value: float | Tensor, x: Tensor, slots: int, unwatched: bool) -> Tensor:
    """`parameter_tensor`, or a tensor that it has made or checked before."""
    if not unwatched:
        return parameter_tensor(name, value, x, slots)
    if type(value) is float:
        return _known_number(name, value, x.dtype)
    if isinstance(value, Tensor) and getattr(value, "_negtome_checked", False):
        same = value.dtype == _parameter_dtype(x) and value.device == x.device
        if same and value.ndim == 0:
            return value
    return parameter_tensor(name, value, x, slots)


@lru_cache(maxsize=64)
def _known_number(name: str, value: float, dtype: torch.dtype) -> Tensor:
    """In host memory, whatever the device of x: backends take it as a number, without a fill.

    Nobody else sees it, and they only read it.
    """
    with torch.inference_mode(False):
        return parameter_tensor(name, value, torch.empty((), dtype=dtype, device="cpu"), 1)


def parameter_tensor(name: str, value: float | Tensor, x: Tensor, slots: int) -> Tensor:
    """`alpha` or `threshold` as an fp32 tensor on x's device, `()` or `(slots,)`."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        if not torch.compiler.is_compiling():
            limit = torch.finfo(_parameter_dtype(x)).max
            if not -limit <= value <= limit:
                raise ValueError(f"{name} must be finite in fp32, got {value}")
            value = float(value)
        if torch.compiler.is_compiling():
            # A product keeps the number symbolic in the graph; `full` would specialise on it.
            return torch.ones((), dtype=_parameter_dtype(x), device=x.device) * value
        return torch.full((), value, dtype=_parameter_dtype(x), device=x.device)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.numel() == 1:
        value = value.reshape(())
    elif tuple(value.shape) != (slots,):
        raise ValueError(
            f"{name} must be a scalar or one value for each of the {slots} references, "
            f"got the shape {tuple(value.shape)}"
        )
    given, value = value, value.detach().to(_parameter_dtype(x))
    # On an accelerator the values are not looked at: that would wait for the device.
    if value.device.type == "cpu" and _is_real(value):
        if not all(math.isfinite(number) for number in value.reshape(-1).tolist()):
            raise ValueError(f"{name} must be finite in fp32, got {given.tolist()}")
        if x.device.type != "cpu" and value.dim() == 0:
            # Known on the host: the argument of a fill, where a copy would wait for the device.
            return torch.full((), float(value), dtype=value.dtype, device=x.device)
    return value.to(x.device)


def _parameter_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_real(value: Tensor) -> bool:
    """Whether the tensor's values can be looked at now: not while compiling or tracing."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not torch.compiler.is_compiling() and not isinstance(value, FakeTensor)


def draw_source_mask(
    x: Tensor, source_mask: Tensor | None, dropout: float, generator: torch.Generator | None
) -> Tensor | None:
    items, tokens = x.shape[:2]
    source_mask = _mask("source_mask", source_mask, x, [(tokens,), (1, tokens), (items, tokens)])
    if not isinstance(dropout, Real) or not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be a probability between 0 and 1, got {dropout!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if dropout > 0.0:
        # As diffusers does: a generator on the CPU draws there, whatever the device of x.
        device = x.device if generator is None else generator.device
        # Not generator=None: that overload takes no symbolic sizes.
        given = {} if generator is None else {"generator": generator}
        drawn = torch.rand(items, tokens, dtype=torch.float32, device=device, **given)
        kept = (drawn > dropout).to(x.device)
        source_mask = kept if source_mask is None else source_mask & kept
    return source_mask


def _untouched(x: Tensor, slots: int, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], slots, x.shape[1])
    similarity = x.new_full(shape, -math.inf, dtype=_parameter_dtype(x))
    return x if inplace else x.clone(), similarity, x.new_full(shape, -1, dtype=torch.int64)


def _warn_nothing_to_push(shape: torch.Size, groups: int) -> None:
    if torch.compiler.is_compiling() or "nothing" in _warned:
        return
    _warned.add("nothing")
    warnings.warn(
        f'reference="first" with {shape[0]} items in {groups} groups leaves nothing to push: every '
        "item is the reference of its group. Generate several images at once, or hand over a "
        "reference.",
        stacklevel=4,
    )
