"""The operators in ONNX: functions of `onnx.translation_table` that replace nodes of `torch.ops`.

Written in onnxscript. `guide` and `match` are traced once for each node, with its modes and masks.
The scripted functions `match_slots` and `push_all` are put into the model as they are; their loops,
over the slots of references and over blocks of columns, become `Loop`.
"""

# mypy: ignore-errors

from typing import TypeVar, Union

import numpy
import torch
from onnx.numpy_helper import from_array
from onnxscript import BOOL, DOUBLE, FLOAT, INT64, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

DOMAIN = Opset("negtome_fast", 1)
#: Maximum number of reference tokens of a block, and the number whose multiple it is. All blocks of
#: a problem have one size, so that equal tokens in two blocks are rounded alike and tie.
BLOCK, RUN = 256, 64
T = TypeVar("T", bound=Union[FLOAT, DOUBLE])  # noqa: UP007, onnxscript knows no other form
_FLOAT, _DOUBLE, _INT64, _BOOL = 1, 11, 7, 9  # of onnx.TensorProto
_TORCH = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}


@script(DOMAIN, default_opset=op)
def match_slots(x: T, reference: T, allowed: BOOL, table: INT64, official: BOOL) -> tuple[T, INT64]:
    """Best match of every token in every slot: similarity and index (B, C, N), else -inf and -1.

    x (B, N, D), reference (P, M, D), allowed (P, M); table (B, C): reference item of each slot.
    Rows search columns: x searches allowed tokens of reference; `official`: reference searches x.
    """
    nothing = op.CastLike(op.Constant(value_float=float("-inf")), x)
    zero = op.CastLike(0.0, x)
    epsilon = op.CastLike(1e-12, x)
    shape = op.Shape(x, start=0, end=2)
    empty = op.Concat(op.Shape(x, start=0, end=1), [0], op.Shape(x, start=1, end=2), axis=0)
    similarity = op.Expand(zero, empty)
    index = op.Expand(op.Constant(value_int=0), empty)
    for slot in range(op.Squeeze(op.Shape(table, start=1, end=2), [0])):
        item = op.Gather(table, slot, axis=1)
        others = op.Gather(reference, item)
        if official:
            rows = op.Identity(others)
            columns = op.Identity(x)
            may_match = op.Expand(op.Cast(1, to=_BOOL), shape)
        else:
            rows = op.Identity(x)
            columns = op.Identity(others)
            may_match = op.Gather(allowed, item)

        # Unit columns, padded to blocks of one size; zero where they may not be chosen
        norm = op.ReduceL2(columns, [2], keepdims=1)
        finite = op.Not(op.Or(op.IsInf(norm), op.IsNaN(norm)))
        usable = op.And(op.Unsqueeze(may_match, [2]), finite)
        units = op.Where(usable, columns / op.Max(norm, epsilon), zero)
        length = op.Shape(units, start=1, end=2)
        block = op.Min((length + (RUN - 1)) / RUN * RUN, op.Constant(value_ints=[BLOCK]))
        steps = (length + (block - 1)) / block
        padding = op.Concat([0, 0, 0, 0], steps * block - length, [0], axis=0)
        units = op.Pad(units, padding)
        usable = op.Pad(usable, padding)

        # Best column of every row; ties keep the earlier block, which holds the lower index
        best = op.Expand(nothing, shape)
        chosen = op.Expand(op.Constant(value_int=-1), shape)
        for number in range(op.Squeeze(steps, [0])):
            start = op.Unsqueeze(number, [0]) * block
            part = op.Slice(units, start, start + block, [1])
            open = op.Transpose(op.Slice(usable, start, start + block, [1]), perm=[0, 2, 1])
            scores = op.MatMul(rows, op.Transpose(part, perm=[0, 2, 1]))
            scores = op.Where(open, scores, nothing)
            at = op.ArgMax(scores, axis=2, keepdims=0)
            value = op.ReduceMax(scores, [2], keepdims=0)
            # A comparison with NaN is false, so rows that are not finite have no match.
            better = value > best
            chosen = op.Where(better, at + start, chosen)
            best = op.Where(better, value, best)

        row_norm = op.ReduceL2(rows, [2], keepdims=0)
        row_finite = op.Not(op.Or(op.IsInf(row_norm), op.IsNaN(row_norm)))
        found = op.And(row_finite, chosen >= 0)
        one = op.Where(found, best / op.Max(row_norm, epsilon), nothing)
        similarity = op.Concat(similarity, op.Unsqueeze(one, [1]), axis=1)
        index = op.Concat(index, op.Unsqueeze(op.Where(found, chosen, -1), [1]), axis=1)
    return similarity, index


@script(DOMAIN, default_opset=op)
def push_all(x: T, tokens: T, place: INT64, pushed: BOOL, alpha: T, largest: T) -> T:
    """x + the pushes of every slot: tokens (P * M, D), place and pushed (B, C, N), alpha (C,).

    The sum saturates at `largest` after each push, so that no infinity meets another.
    """
    moved = x
    zero = op.CastLike(0.0, x)
    for slot in range(op.Squeeze(op.Shape(alpha), [0])):
        chosen = op.Gather(tokens, op.Gather(place, slot, axis=1))
        step = op.Gather(alpha, slot) * (x - chosen)
        moves = op.Unsqueeze(op.Gather(pushed, slot, axis=1), [2])
        moved = op.Clip(moved + op.Where(moves, step, zero), -largest, largest)
    return moved


def _compute(tokens):
    """Tokens in fp64 if they are fp64, else in fp32."""
    return tokens if tokens.dtype == _DOUBLE else op.Cast(tokens, to=_FLOAT)


def _largest(dtype, wide):
    """The largest finite number of `dtype`, in the dtype of `wide`."""
    number = torch.finfo(_TORCH[dtype]).max
    return op.CastLike(op.Constant(value=from_array(numpy.array(number))), wide)


def _length(tokens, axis):
    return op.Shape(tokens, start=axis, end=axis + 1)


def _numbers(count):
    """0, 1, ..., count - 1."""
    return op.Range(op.Constant(value_int=0), op.Squeeze(count), op.Constant(value_int=1))


def _table(x, reference, pairing_mode, groups, per_item):
    """Reference item of each item and slot (B, C), and True if the item has any (B, 1)."""
    items = _length(x, 0)
    item = op.Unsqueeze(_numbers(items), op.Constant(value_ints=[1]))
    every = op.Expand(op.Cast(op.Constant(value_int=1), to=_BOOL), op.Shape(item))
    if reference is not None:
        slots = _length(reference, 0)
        if per_item:
            slots = op.Div(slots, items)
        slot = op.Unsqueeze(_numbers(slots), op.Constant(value_ints=[0]))
        first = op.Mul(item, slots if per_item else op.Constant(value_ints=[0]))
        return op.Add(first, slot), every
    size = op.Div(items, op.Constant(value_ints=[groups]))
    position = op.Mod(item, size)
    start = op.Sub(item, position)
    if pairing_mode == "first":
        return start, op.Greater(position, op.Constant(value_int=0))
    slots = op.Sub(size, op.Constant(value_ints=[1]))
    slot = op.Unsqueeze(_numbers(slots), op.Constant(value_ints=[0]))
    later = op.Cast(op.GreaterOrEqual(slot, position), to=_INT64)
    return op.Add(op.Add(start, slot), later), every


def _is_finite(tokens):
    """Tokens (B, N) of finite norm."""
    norm = op.ReduceL2(tokens, op.Constant(value_ints=[2]), keepdims=0)
    return op.Not(op.Or(op.IsInf(norm), op.IsNaN(norm)))


def _pushable(x, reference, allowed, table, index):
    """Tokens (B, C, N) that official matching may push: r_i allowed, x_i and the match finite."""
    source = op.Unsqueeze(_is_finite(x), op.Constant(value_ints=[1]))
    finite = op.Cast(op.Gather(_is_finite(reference), table), to=_INT64)
    zero = op.Constant(value_int=0)
    away = op.Greater(op.GatherElements(finite, op.Max(index, zero), axis=2), zero)
    return op.And(op.And(op.Gather(allowed, table), source), away)


def _match(x, reference, reference_mask, pairing_mode, groups, per_item, matching):
    """Similarity and index (B, C, N), the tokens in the dtype of the comparison, and the table."""
    table, has_reference = _table(x, reference, pairing_mode, groups, per_item)
    wide = _compute(x)
    others = wide if reference is None else _compute(reference)
    if reference_mask is None:
        shape = op.Shape(others, start=0, end=2)
        reference_mask = op.Expand(op.Cast(op.Constant(value_int=1), to=_BOOL), shape)
    official = op.Cast(op.Constant(value_int=int(matching == "official")), to=_BOOL)
    similarity, index = match_slots(wide, others, reference_mask, table, official)
    # Shape inference does not see the rank of the results of a loop.
    shape = op.Concat(_length(x, 0), _length(table, 1), _length(x, 1), axis=0)
    similarity, index = op.Reshape(similarity, shape), op.Reshape(index, shape)
    found = None
    if matching == "official":
        found = _pushable(wide, others, reference_mask, table, index)
    if pairing_mode == "first":
        sources = op.Unsqueeze(has_reference, op.Constant(value_ints=[2]))
        found = sources if found is None else op.And(found, sources)
    if found is not None:
        nothing = op.CastLike(op.Constant(value_float=float("-inf")), wide)
        similarity = op.Where(found, similarity, nothing)
        index = op.Where(found, index, op.Constant(value_int=-1))
    return similarity, index, wide, others, table


def match(
    x,
    reference,
    reference_mask,
    pairing_mode: str,
    groups: int,
    per_item: bool,
    matching: str,
    backend: str,
):
    """Translation of `negtome_fast::match`."""
    found = _match(x, reference, reference_mask, pairing_mode, groups, per_item, matching)
    return found[0], found[1]


def guide(
    x,
    reference,
    alpha,
    threshold,
    reference_mask,
    source_mask,
    pairing_mode: str,
    groups: int,
    per_item: bool,
    matching: str,
    combine: str,
    backend: str,
):
    """Translation of `negtome_fast::guide`."""
    similarity, index, wide, others, table = _match(
        x, reference, reference_mask, pairing_mode, groups, per_item, matching
    )
    first, second = op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    slots = _length(table, 1)
    alpha = op.Expand(op.CastLike(op.Reshape(alpha, op.Constant(value_ints=[-1])), wide), slots)
    threshold = op.Expand(
        op.CastLike(op.Reshape(threshold, op.Constant(value_ints=[-1])), wide), slots
    )
    if combine == "nearest":
        # Only the best slot, the lowest of equal ones: arrays are (B, 1, N) from here on.
        slot = op.ArgMax(similarity, axis=1, keepdims=1)
        similarity = op.GatherElements(similarity, slot, axis=1)
        index = op.GatherElements(index, slot, axis=1)
        limit = op.Gather(threshold, slot)
        item = op.Unsqueeze(op.GatherElements(table, op.Squeeze(slot, first), axis=1), first)
    else:
        slot = op.Unsqueeze(_numbers(slots), op.Constant(value_ints=[0, 2]))
        limit = op.Unsqueeze(threshold, first)
        item = op.Unsqueeze(table, second)
    none = op.Constant(value_int=-1)
    pushed = op.And(op.Greater(similarity, limit), op.Greater(index, none))
    if source_mask is not None:
        pushed = op.And(pushed, op.Unsqueeze(source_mask, first))
    columns = _length(others, 1)
    channels = _length(others, 2)
    token = op.Max(index, op.Constant(value_int=0))
    place = op.Add(op.Mul(item, columns), token)
    tokens = op.Reshape(others, op.Concat(op.Constant(value_ints=[-1]), channels, axis=0))
    if combine == "nearest":
        strength = op.Unsqueeze(op.Squeeze(op.Gather(alpha, slot), first), second)
        chosen = op.Gather(tokens, op.Squeeze(place, first))
        moved = op.Add(wide, op.Mul(strength, op.Sub(wide, chosen)))
        moves = op.Squeeze(pushed, first)
    else:
        arithmetic = _largest(_DOUBLE if x.dtype == _DOUBLE else _FLOAT, wide)
        moved = push_all(wide, tokens, place, pushed, alpha, arithmetic)
        moves = op.Cast(op.ReduceMax(op.Cast(pushed, to=_INT64), first, keepdims=0), to=_BOOL)
    largest = _largest(x.dtype, wide)
    moved = op.Clip(moved, op.Neg(largest), largest)
    y = op.CastLike(op.Where(op.Unsqueeze(moves, second), moved, wide), x)
    flat = op.Add(op.Mul(slot, columns), token)
    return y, similarity, op.Where(pushed, flat, none)
