"""The operator as functions: `negtome`, `guide_tokens` (with what it did) and `match_tokens`.

    y_i = x_i + alpha * (x_i - r_j)  where  j = argmax_j cos(x_i, r_j)  and  cos > threshold

NegToMe, arXiv 2412.01339, section 3 and figure 3c.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import ops
from .arguments import (
    ReferenceTokens,
    check_combine,
    check_flag,
    check_problem,
    draw_source_mask,
    find_parameter,
    find_problem,
)
from .backends import small
from .call import Call
from .naive import NOTHING, compute_dtype

_warned: set[str] = set()


def negtome(
    x: Tensor,
    reference: ReferenceTokens = "first",
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
            of the others and is returned bit-identical. `"others"`: all other items of the group
            are references. A tensor `(M, D)` or `(R, M, D)` is shared by the batch; a tensor
            `(B, R, M, D)` holds a set for each item.
        alpha: push strength: a number, a 0-dim tensor, or a tensor `(R,)` with a value for each
            reference. Positive pushes away, negative pulls toward, 0 is the identity. 0.9 is the
            authors' default. A tensor never recompiles a `torch.compile`d caller; a number may,
            once. No gradient flows to it. Values on an accelerator are not checked, since that
            would wait for the device.
        threshold: cosine similarity that a match must exceed, strictly; given like `alpha`. The
            authors use 0.65 for FLUX.
        reference_mask: bool, True where a reference token may be matched: `(M,)` or `(R, M)`; for
            references per item also `(B, R, M)`; for in-batch references `(N,)` or `(B, N)`.
            With `matching="official"` it gates output positions instead, as in the authors' code.
        matching: `"paper"`, the formula above; or `"official"`, what the authors' code computes:
            for each reference token j the source token i with the largest cosine, then token j is
            pushed away from `r_i`. Needs `N == M`.
        groups: number of equal, contiguous groups of the batch that never see each other; 2 if
            classifier-free guidance concatenates its halves.
        combine: rule for several references. `"nearest"` (default) takes the best match over all
            of them, with that reference's alpha and threshold; `"sum"` adds the pushes of all.
        source_mask: bool `(N,)` or `(B, N)`, True where a token may move.
        dropout: probability in [0, 1] that a token is spared.
        generator: source of randomness of the dropout, which draws on its own device; None is
            torch's global generator.
        inplace: write into `x` (not differentiable), no two elements of which may share memory;
            `x` is also returned.
        backend: `"auto"` (Triton on a GPU, else torch), `"triton"`, `"torch"` or `"reference"`.
            The environment variable NEGTOME_FAST_BACKEND decides what "auto" means.

    Returns:
        `(B, N, D)`, dtype of `x`. Arithmetic is fp32 (fp64 for fp64), rounded once. The result
        saturates at the largest finite number of the dtype (fp16: 65,504), so finite tokens stay
        finite; with `combine="sum"` the fp32 sum saturates after each push, too. Tokens with a
        non-finite norm are returned unchanged and are never matched: tokens with NaN or infinity,
        and tokens whose fp32 norm overflows (numbers from 1.8e19 on, in bf16 and fp32). Ties go to
        the lowest reference, then the lowest token. The gradient treats the choice of match as
        constant, and passes through saturation as through rounding; it is not saturated itself.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names shapes and values.
        RuntimeError: `backend="triton"`, but Triton cannot run here; or a derivative of forward
            mode or of `torch.func`, which the operator does not have.
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
    reference: ReferenceTokens = "first",
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
    """Do what `negtome` does, and also return the matches; the arguments are the same.

    Returns:
        y: `(B, N, D)`, as `negtome` returns it.
        similarity: `(B, S, N)` fp32 (fp64 for fp64), cosine of the match, -inf without one. S is 1
            for `combine="nearest"`, else the number of references that an item meets.
        pushed: `(B, S, N)` int64, `slot * M + token` of the reference token that a token was pushed
            away from, -1 where it was left alone. Slots number the references that an item meets:
            external ones in order, for `"others"` the other items of the group in order.
    """
    if inplace is not True and inplace is not False:
        inplace = check_flag("inplace", inplace)
    external = None if isinstance(reference, str) else reference
    skips = ops.can_skip_dispatcher(x, external, reference_mask, source_mask)
    problem = find_problem(x, reference, reference_mask, matching, groups, skips)
    check_combine(combine)
    pairing = problem.pairing
    alpha = find_parameter("alpha", alpha, x, pairing.slots, skips)
    threshold = find_parameter("threshold", threshold, x, pairing.slots, skips)
    if not (source_mask is None and generator is None and type(dropout) is float and dropout == 0):
        source_mask = draw_source_mask(x, source_mask, dropout, generator)
    ops.check_backend_name(backend)
    if not skips:
        ops.check_transforms(x, external, inplace)
    nothing_to_push = pairing.mode == "first" and x.shape[0] == groups
    if nothing_to_push:
        _warn_nothing_to_push(x.shape, groups)
    if nothing_to_push or _is_empty(x, problem.reference):
        return _untouched(x, pairing.slots if combine == "sum" else 1, inplace)
    if inplace:
        _check_writable(x, reference)

    if skips:
        out = x if inplace else x.new_empty(x.shape)
        is_small = 0 < problem.small_elements <= small.SMALL and x.is_cpu
        if is_small and ops.runs_torch(backend):
            done = small.guide_from_first(x, alpha, threshold, source_mask, out)
            if done is not None:
                return out, *done
    target = x if problem.reference is None else problem.reference
    matched = x, target, pairing, problem.mask, matching
    call = Call(*matched, alpha, threshold, source_mask, combine)
    if skips:
        return out, *ops.run(call, out, backend)
    if inplace:
        return x, *ops.guide_(*ops.flat_arguments(call, backend))
    result: tuple[Tensor, Tensor, Tensor] = ops.guide(*ops.flat_arguments(call, backend))
    return result


def _check_writable(x: Tensor, reference: ReferenceTokens) -> None:
    if not x.is_contiguous() and (wrong := _overlap(x)):
        raise ValueError(
            f"inplace=True needs memory for every token; x {tuple(x.shape)} {wrong} "
            f"(strides {x.stride()}); use inplace=False or x.clone()"
        )
    if torch.is_grad_enabled() and (
        x.requires_grad or (isinstance(reference, Tensor) and reference.requires_grad)
    ):
        raise ValueError("inplace=True is not differentiable; use inplace=False or torch.no_grad()")


def _overlap(x: Tensor) -> str:
    """Say in words why elements of `x` share memory; empty if they do not."""
    strided = [(step, size) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    if any(step == 0 for step, _ in strided):
        return "is expanded"
    if torch.compiler.is_compiling():
        return ""
    reach = 0
    for step, size in sorted(strided):
        if step <= reach:
            return _shared_elements(strided)
        reach += step * (size - 1)
    return ""


def _shared_elements(strided: list[tuple[int, int]]) -> str:
    """`_overlap` of strides that do not say it at once, by the places of all elements."""
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for step, size in strided:
        places = (places[:, None] + step * torch.arange(size, device="cpu")).flatten()
    return "overlaps itself" if len(places.unique()) < len(places) else ""


@torch.no_grad()
def match_tokens(
    x: Tensor,
    reference: ReferenceTokens = "first",
    *,
    reference_mask: Tensor | None = None,
    groups: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Find the most similar reference token of every source token; arguments as for `negtome`.

    Returns:
        similarity: `(B, N)` fp32 (fp64 for fp64), the cosine; -inf where nothing may be matched.
        index: `(B, N)` int64; -1 where nothing may be matched, which includes the reference items
            of `"first"`. For `"first"` and a single reference it is the token's number in `[0, M)`;
            for several references `reference * M + token`; for `"others"` `item * N + token`.
    """
    problem = check_problem(x, reference, reference_mask, "paper", groups)
    ops.check_backend_name(backend)
    pairing, external = problem.pairing, problem.reference
    items, tokens = x.shape[:2]
    if pairing.slots == 0 or _is_empty(x, external):
        _, similarity, index = _untouched(x, 1, True)
        return similarity[:, 0], index[:, 0]
    settings = (pairing.mode, pairing.groups, pairing.per_item, "paper", backend)
    similarity, index = ops.match(x, external, problem.mask, *settings)
    similarity, slot = similarity.max(dim=1)
    index = index.gather(1, slot[:, None])[:, 0]
    if pairing.mode == "others":
        size = pairing.group_size
        item = torch.arange(items, device=x.device)[:, None]
        offset = (item - item % size + slot + (slot >= item % size)) * tokens
    else:
        offset = slot * (tokens if external is None else external.shape[1])
    return similarity, torch.where(index >= 0, index + offset, -1)


def _is_empty(x: Tensor, reference: Tensor | None) -> bool:
    return 0 in x.shape or (reference is not None and 0 in reference.shape)


def _untouched(x: Tensor, slots: int, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], slots, x.shape[1])
    similarity = x.new_full(shape, NOTHING, dtype=compute_dtype(x.dtype))
    return x if inplace else x.clone(), similarity, x.new_full(shape, -1, dtype=torch.int64)


def _warn_nothing_to_push(shape: torch.Size, groups: int) -> None:
    if torch.compiler.is_compiling() or "nothing" in _warned:
        return
    _warned.add("nothing")
    warnings.warn(
        f'reference="first" with {shape[0]} items in {groups} groups leaves nothing to push: every '
        "item is the reference of its group. Generate several images at once, or pass a "
        "reference.",
        stacklevel=4,
    )
