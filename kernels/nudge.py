"""Embedding nudging: all descent steps of all items in one launch.

    L <- project(L - step_size * grad f(L)),  f(L) = <g, L> + |L - L0|,  g = beta U - alpha D

U and D are the means of the undesired and desired points. Every iterate is (1 + p) L0 + q g, so a
step changes only the numbers p and q: the kernel reads the latents once for three inner products
and once to write the result. negtome_fast/nudging/ says where the objectives come from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import round_to

TINY = tl.constexpr(1e-12)


@triton.jit
def square(p, q, ss, sg, gg):
    """`|p L0 + q g|^2` from the inner products of L0 (s) and g, up to rounding."""
    return p * p * ss + 2.0 * p * q * sg + q * q * gg


@triton.jit
def length(p, q, ss, sg, gg):
    """`|p L0 + q g|` from the inner products of L0 (s) and g."""
    return tl.sqrt(tl.maximum(square(p, q, ss, sg, gg), 0.0))


@triton.jit
def value_of(p, q, ss, sg, gg, slope, OBJECTIVE: tl.constexpr):
    """The objective at (1 + p) L0 + q g."""
    product = (1.0 + p) * sg + q * gg
    distance = length(p, q, ss, sg, gg)
    if OBJECTIVE == "cosine":
        product = product / tl.maximum(length(1.0 + p, q, ss, sg, gg), TINY)
    if OBJECTIVE == "squared":
        result = product + distance * distance
    else:
        result = product + slope * distance
    return result


@triton.jit
def load_g(desired_ptr, undesired_ptr, offsets, inside, alpha, beta, BLOCK: tl.constexpr):
    """`g = beta U - alpha D` at `offsets`, fp32."""
    g = tl.zeros((BLOCK,), tl.float32)
    if undesired_ptr is not None:
        g += beta * tl.load(undesired_ptr + offsets, mask=inside, other=0.0)
    if desired_ptr is not None:
        g -= alpha * tl.load(desired_ptr + offsets, mask=inside, other=0.0)
    return g


@triton.jit(do_not_specialize=["width", "steps", "step_size", "tolerance"])
def nudge_kernel(
    latents_ptr,
    desired_ptr,
    undesired_ptr,
    alpha_ptr,
    beta_ptr,
    radius_ptr,
    out_ptr,
    distance_ptr,
    taken_ptr,
    reason_ptr,
    trace_ptr,
    width,
    steps,
    step_size,
    tolerance,
    stride_latents,
    stride_desired,
    stride_undesired,
    OBJECTIVE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take all descent steps of the items; program b owns item b.

    latents, out (B, width), unit stride inside an item; desired, undesired: means (1 or B, width)
    fp32 or None, stride 0 where shared; alpha, beta, radius (B,) fp32; distance (B,) fp32; taken
    and reason (B,) int64; trace (B, steps + 1) fp32 or None. Reasons: 0 converged, 1 steps,
    2 distance, 3 non-finite, which includes a step that would leave the range of fp32.
    """
    item = tl.program_id(0).to(tl.int64)
    latents_ptr += item * stride_latents
    out_ptr += item * width
    if desired_ptr is not None:
        desired_ptr += item * stride_desired
    if undesired_ptr is not None:
        undesired_ptr += item * stride_undesired
    alpha = tl.load(alpha_ptr + item)
    beta = tl.load(beta_ptr + item)
    radius = tl.load(radius_ptr + item)

    # Inner products of L0 (s) and g
    block_ss = tl.zeros((BLOCK,), tl.float32)
    block_sg = tl.zeros((BLOCK,), tl.float32)
    block_gg = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < width
        s = tl.load(latents_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        g = load_g(desired_ptr, undesired_ptr, offsets, inside, alpha, beta, BLOCK)
        block_ss += s * s
        block_sg += s * g
        block_gg += g * g
    ss = tl.sum(block_ss, axis=0)
    sg = tl.sum(block_sg, axis=0)
    gg = tl.sum(block_gg, axis=0)
    # A comparison with NaN is false, so NaN is not finite, as infinity is not.
    finite = (ss < float("inf")) & (gg < float("inf")) & (tl.abs(sg) < float("inf"))
    norm = tl.sqrt(ss)
    slope = 1.0
    if OBJECTIVE == "cosine":
        slope = 1.0 / tl.maximum(norm, TINY)
        step_size = step_size * ss

    # Descent on two numbers
    p = ss * 0.0
    q = ss * 0.0
    taken = tl.full((), 0, tl.int32)
    active = finite
    converged = active & (not active)
    on_sphere = converged
    lost = converged
    if trace_ptr is not None:
        trace_ptr += item * (steps + 1)
        value = value_of(p, q, ss, sg, gg, slope, OBJECTIVE)
        value = tl.where(finite, value, float("nan"))
        tl.store(trace_ptr, value)
    for number in range(steps):
        if OBJECTIVE == "squared":
            next_p = p
            next_q = p - 0.5
            active = active & (number == 0)
        else:
            on_start = p * 0.0
            on_g = on_start + 1.0
            if OBJECTIVE == "cosine":
                size = tl.maximum(length(1.0 + p, q, ss, sg, gg), TINY)
                product = (1.0 + p) * sg + q * gg
                cubed = size * size * size
                on_start = -product * (1.0 + p) / cubed
                on_g = 1.0 / size - product * q / cubed
            away = length(p, q, ss, sg, gg)
            # The norm has a kink at L0: take the shortest of its subgradients there.
            steepness = tl.maximum(length(on_start, on_g, ss, sg, gg), TINY)
            left = tl.maximum(1.0 - slope / steepness, 0.0)
            pull = slope / tl.maximum(away, TINY)
            at_start = away == 0.0
            next_p = p - step_size * tl.where(at_start, on_start * left, on_start + pull * p)
            next_q = q - step_size * tl.where(at_start, on_g * left, on_g + pull * q)
        far = length(next_p, next_q, ss, sg, gg)
        # A step out of the range of fp32 is not taken. A maximum would pass over NaN.
        lost = lost | (active & (not (square(next_p, next_q, ss, sg, gg) < float("inf"))))
        active = active & (not lost)
        outside = far >= radius
        shrink = tl.where(outside, radius / tl.maximum(far, TINY), 1.0)
        next_p = next_p * shrink
        next_q = next_q * shrink
        still = length(next_p - p, next_q - q, ss, sg, gg) <= tolerance * norm
        converged = converged | (active & still)
        active = active & (not still)
        p = tl.where(active, next_p, p)
        q = tl.where(active, next_q, q)
        on_sphere = tl.where(active, outside, on_sphere)
        taken += active.to(tl.int32)
        if trace_ptr is not None:
            value = tl.where(active, value_of(p, q, ss, sg, gg, slope, OBJECTIVE), value)
            tl.store(trace_ptr + number + 1, value)
    if OBJECTIVE == "squared":
        converged = finite
    reason = tl.where(converged, 0, 1)
    reason = tl.where(on_sphere, 2, reason)
    reason = tl.where(finite & (not lost), reason, 3)
    tl.store(distance_ptr + item, tl.where(finite, length(p, q, ss, sg, gg), 0.0))
    tl.store(taken_ptr + item, taken.to(tl.int64))
    tl.store(reason_ptr + item, reason.to(tl.int64))

    # Result
    for start in range(0, width, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < width
        raw = tl.load(latents_ptr + offsets, mask=inside, other=0.0)
        g = load_g(desired_ptr, undesired_ptr, offsets, inside, alpha, beta, BLOCK)
        s = raw.to(tl.float32)
        moved = round_to(s + p * s + q * g, raw.dtype, INTERPRETED)
        tl.store(out_ptr + offsets, tl.where(taken > 0, moved, raw), mask=inside)
