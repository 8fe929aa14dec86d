"""Mistakes that only Triton kernels can make: blocks, strides, offsets, dtypes, in-place writes.

test_operator.py runs the table of cases with the launches that the tuning table chooses; here the
table runs with each kind of launch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.cases import CASES, Case
from helpers.device import DEVICE
from helpers.oracle import Problem

pytest.importorskip("triton", reason="Triton is not installed")

from negtome_fast.backends import triton_backend, triton_runtime
from negtome_fast.backends.triton_descriptors import descriptor
from negtome_fast.backends.triton_geometry import Geometry
from negtome_fast.call import Call
from negtome_fast.functional import guide_tokens
from negtome_fast.kernels import tuning
from negtome_fast.pairing import Pairing

ROOT = Path(__file__).parents[2]
INFINITY = float("inf")

MODES = {
    "first": Pairing("first", 3),
    "first in two groups": Pairing("first", 4, groups=2),
    "others": Pairing("others", 3),
    "others in two groups": Pairing("others", 6, groups=2),
    "shared references": Pairing("external", 2, references=3),
    "references per item": Pairing("external", 2, references=2, per_item=True),
}


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random tokens with a common direction, so that a threshold of 0.3 divides them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    return (noise + torch.randn(shape[-1], generator=generator) * 0.8).to(dtype).to(DEVICE)


def reference_of(pairing: Pairing, x: Tensor, M: int) -> Tensor:
    if pairing.mode != "external":
        return x
    P = pairing.references * (pairing.items if pairing.per_item else 1)
    return tokens(P, M, x.shape[2], seed=1, dtype=x.dtype)


def cosines(x: Tensor, reference: Tensor, pairing: Pairing, mask: Tensor | None) -> Tensor:
    """Cosines (B, C, N, M) in fp64, -inf where not allowed."""
    x, reference = x.double(), reference.double()
    result = torch.full(
        (x.shape[0], pairing.slots, x.shape[1], reference.shape[1]), -INFINITY, dtype=x.dtype
    ).to(x.device)
    for item in pairing.sources:
        for slot in range(pairing.slots):
            p = pairing.reference_item(item, slot)
            result[item, slot] = (
                torch.nn.functional.normalize(x[item], dim=-1)
                @ torch.nn.functional.normalize(reference[p], dim=-1).T
            )
            if mask is not None:
                result[item, slot][:, ~mask[p]] = -INFINITY
    return result


def pushed_by(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    alpha: Tensor,
    pushed: Tensor,
) -> Tensor:
    """The output that `pushed` (B, S, N) asks for, in fp64."""
    M = reference.shape[1]
    y = x.double()
    for item, row, token in (pushed >= 0).nonzero().tolist():
        slot, position = divmod(int(pushed[item, row, token]), M)
        matched = reference[pairing.reference_item(item, slot), position].double()
        strength = alpha.double().expand(pairing.slots)[slot]
        y[item, token] += strength * (x[item, token].double() - matched)
    return y


def guide(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    alpha: Tensor | float = 0.9,
    threshold: Tensor | float = 0.3,
    reference_mask: Tensor | None = None,
    source_mask: Tensor | None = None,
    matching: str = "paper",
    combine: str = "nearest",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.full_like(x, float("nan")) if out is None else out
    numbers = torch.as_tensor(alpha), torch.as_tensor(threshold)
    matched = x, reference, pairing, reference_mask, matching
    similarity, pushed = triton_backend.guide(Call(*matched, *numbers, source_mask, combine), out)
    return out, similarity, pushed


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch):
    """Force a kind of launch for paper matching, and one configuration everywhere if given."""

    def force(kind: str, *config: int, descriptors: bool = False) -> None:
        arch = tuning.INTERPRETED
        if not triton_runtime.interpreting():
            arch = triton_runtime.architecture(torch.cuda.current_device())

        def forced(_: str, *problem: int | str) -> tuning.Plan:
            chosen = unforced(arch, *problem)._replace(kind=kind)
            if config:
                everywhere = dict.fromkeys(tuning.KERNELS, tuning.Config(*config))
                chosen = chosen._replace(**everywhere)
            tiles = chosen.tiles._replace(DESCRIPTORS=int(descriptors))
            pairs = chosen.pairs._replace(DESCRIPTORS=int(descriptors))
            return chosen._replace(tiles=tiles, pairs=pairs)

        monkeypatch.setattr(tuning, "plan", forced)

    unforced = tuning.plan
    return force


LAUNCHES = {
    "fused": {"kind": "fused"},
    "tiles": {"kind": "tiles"},
    "descriptors": {"kind": "tiles", "descriptors": True},
}
DESCRIBED = (
    "first, groups",
    "others, mask per item",
    "official, others",
    "references per item, masked",
    "first, nan",
    "first, image slice",
    "first, channels apart",
    "others, bfloat16",
    "first, float16",
    "first, 3x200x96",
)


def other_launches() -> list[Any]:
    """Cases with the kinds of launch that test_operator.py, by the fused kernel, leaves out."""
    pairs = []
    for case in CASES:
        arguments = case.make()[1] if not case.slow else {}
        plain = arguments.get("matching") != "official" and arguments.get("combine") != "sum"
        for kind in ("tiles", "descriptors"):
            # Only paper matching with "nearest" has a choice; descriptors take some of everything.
            chosen = plain if kind == "tiles" else case.name in DESCRIBED
            if chosen and not (case.slow and DEVICE == "cpu"):
                pairs.append(pytest.param(case, kind, id=f"{kind}: {case}"))
    return pairs


@pytest.mark.parametrize(("case", "kind"), other_launches())
def test_every_kind_of_launch_is_right(launch, case: Case, kind: str, poisoned: None) -> None:
    launch(**LAUNCHES[kind])
    x, arguments = case.make(DEVICE)
    Problem(x, arguments).check_guide(*guide_tokens(x, **arguments, backend="triton"))


@pytest.mark.parametrize("matching", ["paper", "official"])
@pytest.mark.parametrize(("items", "groups"), [(3, 1), (4, 1), (8, 2)])
def test_each_pair_of_others_is_computed_for_both(
    launch, items: int, groups: int, matching: str
) -> None:
    # External references are never symmetric: here they are the other items of the group.
    launch("tiles", 32, 64, 32, 4, 1)
    x = tokens(items, 40, 24)
    similarity, index = triton_backend.match(
        Call(x, x, Pairing("others", items, groups), None, matching)
    )
    size = items // groups
    own = [
        [other for other in range(i - i % size, i - i % size + size) if other != i]
        for i in range(items)
    ]
    external = x[torch.tensor(own, device=DEVICE).flatten()]
    pairing = Pairing("external", items, references=size - 1, per_item=True)
    expected, expected_index = triton_backend.match(Call(x, external, pairing, None, matching))
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(similarity, expected, rtol=0, atol=1e-6)


def test_tokens_that_descriptors_cannot_express_are_read_by_pointers() -> None:
    joint = torch.zeros(2, 90, 80, dtype=torch.bfloat16, device=DEVICE)
    described = [joint, joint[:, 10:], joint[:1], joint[:, :1], joint[:, :, :64], joint[:, ::2]]
    for x in described:
        found = descriptor(x, 16, 16)
        assert found.shape == list(x.shape) and found.block_shape == [1, 16, 16]
    by_pointers = [
        joint[:, :, 1:],  # not aligned
        joint[:, :, ::2],  # channels apart
        joint.transpose(1, 2),
        torch.zeros(2, 90, 77, dtype=torch.bfloat16, device=DEVICE),
        joint[:1].expand(2, -1, -1),
        joint[:, :1].expand(-1, 90, -1),
        joint.transpose(0, 1),  # items interleave
    ]
    for x in by_pointers:
        assert descriptor(x, 16, 16) is None


def test_more_candidates_than_a_key_can_number_are_matched_by_rows(launch, monkeypatch) -> None:
    launch("tiles")
    launched: list[str] = []

    def note(shape: Geometry, *_: object) -> None:
        launched.append("fused" if shape.by_fused else "keys")
        raise InterruptedError

    monkeypatch.setattr(triton_backend, "_match_and_push", note)
    x = tokens(1, 3, 8)
    for references, expected in ((2**20, "keys"), (2**29, "fused")):
        many = tokens(1, 4, 8).expand(references, 4, 8)
        with pytest.raises(InterruptedError):
            guide(x, many, Pairing("external", 1, references=references))
        assert launched.pop() == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("combine", ["nearest", "sum"])
@pytest.mark.parametrize("matching", ["paper", "official"])
def test_push_follows_the_fp64_definition(mode: str, combine: str, matching: str) -> None:
    pairing = MODES[mode]
    x = tokens(pairing.items, 37, 24)
    reference = reference_of(pairing, x, 37 if matching == "official" else 50)
    mask = torch.rand(reference.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.8
    mask = mask.to(DEVICE)
    source_mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(3)) < 0.8
    source_mask = source_mask.to(DEVICE)
    alpha = torch.linspace(0.5, 1.0, pairing.slots)
    threshold = torch.linspace(0.5, 0.3, pairing.slots)

    y, similarity, pushed = guide(
        x,
        reference,
        pairing,
        alpha.to(DEVICE),
        threshold.to(DEVICE),
        mask,
        source_mask,
        matching,
        combine,
    )

    if matching == "paper":
        best, index = cosines(x, reference, pairing, mask).max(-1)
    else:
        best, index = cosines(x, reference, pairing, None).max(-2)
        for item in pairing.sources:
            for slot in range(pairing.slots):
                best[item, slot][~mask[pairing.reference_item(item, slot)]] = -INFINITY
    M = reference.shape[1]
    flat = index + torch.arange(pairing.slots, device=DEVICE)[None, :, None] * M
    limit = threshold.to(DEVICE).double()[None, :, None].expand_as(best)
    if combine == "nearest":
        best, slot = best.max(1, keepdim=True)
        flat, limit = flat.gather(1, slot), limit.gather(1, slot)
    expected = torch.where((best > limit) & source_mask[:, None], flat, -1)
    torch.testing.assert_close(similarity, best.float(), rtol=0, atol=1e-5)
    assert torch.equal(pushed, expected)
    assert 0 < (pushed >= 0).sum() < pushed.numel()
    truth = pushed_by(x, reference, pairing, alpha, expected)
    torch.testing.assert_close(y, truth.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [(16, 32, 16), (64, 32, 128)])
@pytest.mark.parametrize("matching", ["paper", "official"])
@pytest.mark.parametrize("kind", LAUNCHES)
def test_matches_do_not_depend_on_the_launch(launch, config, matching: str, kind: str) -> None:
    pairing = Pairing("others", 2)
    x = tokens(2, 70, 24)
    x[:, 45:65] = x[:, 10:30]  # exact ties, in another tile for some of the configurations
    launch("fused")
    expected = triton_backend.match(Call(x, x, pairing, None, matching))
    _, expected_best, expected_pushed = guide(x, x, pairing, matching=matching)
    launch(LAUNCHES[kind]["kind"], *config, 4, 1, descriptors=kind == "descriptors")
    similarity, index = triton_backend.match(Call(x, x, pairing, None, matching))
    _, best, pushed = guide(x, x, pairing, matching=matching)
    assert int(index.max()) < 70 and not ((index >= 45) & (index < 65)).any()
    assert torch.equal(index, expected[1])
    assert torch.equal(pushed, expected_pushed)
    torch.testing.assert_close(similarity, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(best, expected_best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", LAUNCHES)
def test_ties_go_to_the_lowest_token_and_slot(launch, kind: str) -> None:
    launch(LAUNCHES[kind]["kind"], 16, 16, 16, 4, 1, descriptors=kind == "descriptors")
    x = tokens(2, 40, 24)
    reference = tokens(1, 20, 24, seed=1).repeat(3, 2, 1)
    pairing = Pairing("external", 2, references=3)
    _, index = triton_backend.match(Call(x, reference, pairing, None, "paper"))
    assert int(index.max()) < 20
    _, _, pushed = guide(x, reference, pairing, threshold=-1.0)
    assert int(pushed.max()) < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("combine", ["nearest", "sum"])
def test_rounds_once_to_the_dtype_of_the_input(dtype: torch.dtype, combine: str) -> None:
    pairing = MODES["shared references"]
    x = tokens(2, 50, 96, dtype=dtype)
    reference = reference_of(pairing, x, 70)
    y, similarity, pushed = guide(x, reference, pairing, combine=combine)
    all_cosines = cosines(x, reference, pairing, None)
    best = all_cosines.amax(-1)
    best = best if combine == "sum" else best.amax(1, keepdim=True)
    torch.testing.assert_close(similarity.double(), best, rtol=0, atol=2e-6)
    truth = pushed_by(x, reference, pairing, torch.tensor(0.9), pushed)
    spacing = torch.finfo(dtype).eps * truth.abs()
    # Half a spacing of the dtype, plus the fp32 arithmetic before the one rounding.
    assert bool(((y.double() - truth).abs() <= 0.5 * spacing + 1e-5).all())


def test_strided_slices_and_channels_give_the_contiguous_result() -> None:
    pairing = MODES["shared references"]
    joint = tokens(2, 90, 80)
    x = joint[:, 45:, ::2]
    reference = tokens(30, 3, 40, seed=1).permute(1, 0, 2)
    mask = (torch.arange(30) % 3 > 0).to(DEVICE).expand(3, 30)
    source_mask = (torch.arange(45) % 4 > 0).to(DEVICE)[:, None].expand(45, 2).T
    expected = guide(
        x.contiguous(),
        reference.contiguous(),
        pairing,
        reference_mask=mask.contiguous(),
        source_mask=source_mask.contiguous(),
    )
    surrounding = torch.full((2, 40, 90), 7.0, device=DEVICE)
    out = surrounding.transpose(1, 2)[:, 45:]
    result = guide(x, reference, pairing, reference_mask=mask, source_mask=source_mask, out=out)
    for actual, wanted in zip(result, expected, strict=True):
        assert torch.equal(actual, wanted)
    assert bool((surrounding[:, :, :45] == 7.0).all())


@pytest.mark.parametrize(
    ("kind", "combine"), [("fused", "nearest"), ("tiles", "nearest"), ("tiles", "sum")]
)
def test_offsets_beyond_32_bits(launch, kind: str, combine: str) -> None:
    launch(kind)
    # Two tokens are 2^31 bytes apart, and items lie beyond 2^31 elements, in memory that is
    # reserved but hardly touched.
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GB of GPU memory")
    far = 2**31 + 16
    pool = torch.empty(2 * far + 64, dtype=torch.bfloat16, device=DEVICE)
    x = pool.as_strided((2, 5, 8), (far, 8, 1))
    x.copy_(tokens(2, 5, 8))
    pairing = Pairing("first", 2)
    expected = guide(x.clone(), x.clone(), pairing, combine=combine)
    _, _, pushed = guide(x, x, pairing, combine=combine, out=x)
    assert torch.equal(pushed, expected[2])
    assert torch.equal(x, expected[0])

    token_far = 2**29 + 16
    x = pool.as_strided((1, 5, 8), (8, token_far, 1))
    x.copy_(tokens(1, 5, 8))
    reference = pool[64:].as_strided((1, 5, 8), (8, token_far, 1))
    reference.copy_(tokens(1, 5, 8, seed=1))
    pairing = Pairing("external", 1)
    expected = guide(x.clone(), reference.clone(), pairing, combine=combine)
    result = guide(x, reference, pairing, combine=combine)
    assert torch.equal(result[0], expected[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("combine", ["nearest", "sum"])
@pytest.mark.parametrize("matching", ["paper", "official"])
def test_in_place_equals_out_of_place(mode: str, combine: str, matching: str) -> None:
    pairing = MODES[mode]
    x = tokens(pairing.items, 37, 24)
    reference = reference_of(pairing, x, 37)
    expected = guide(x, reference, pairing, matching=matching, combine=combine)
    result = guide(x, reference, pairing, matching=matching, combine=combine, out=x)
    for actual, wanted in zip(result, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_in_place_with_references_in_the_same_memory() -> None:
    pairing = Pairing("external", 2, references=2)
    x = tokens(2, 60, 24)
    expected, _, _ = guide(x, x.clone()[:, 10:50], pairing)
    y, _, _ = guide(x, x[:, 10:50], pairing, out=x)
    assert torch.equal(y, expected)


def test_group_heads_and_tokens_that_stay_are_bit_identical() -> None:
    pairing = MODES["first in two groups"]
    x = tokens(4, 37, 24, dtype=torch.bfloat16)
    x[0, 3] = float("nan")
    x[1, 4] = INFINITY
    x[2, 5] = -0.0
    y, similarity, pushed = guide(x, x, pairing)
    stays = (pushed[:, 0] < 0)[:, :, None]
    assert bool(stays[0].all()) and bool(stays[2].all())
    bits, before = y.view(torch.int16), x.view(torch.int16)
    assert bool(((bits == before) | ~stays).all())
    assert bool((similarity[0] == -INFINITY).all())
    assert float(similarity[1, 0, 4]) == -INFINITY


@pytest.mark.parametrize("matching", ["paper", "official"])
def test_broken_tokens_have_no_match_and_are_none(matching: str) -> None:
    pairing = Pairing("external", 1)
    x = tokens(1, 40, 24)
    reference = tokens(1, 40, 24, seed=1)
    x[0, 5, 3] = float("nan")
    x[0, 6, 3] = 1e20
    reference[0, 7] = x[0, 20] * float("nan")
    reference[0, 8] = INFINITY
    similarity, index = triton_backend.match(Call(x, reference, pairing, None, matching))
    index = index[0, 0].tolist()
    none = [i for i, j in enumerate(index) if j < 0]
    if matching == "paper":
        assert none == [5, 6]
    else:
        assert {5, 6, 7, 8} <= set(none)
    assert not {7, 8} & set(index)
    assert bool((similarity[0, 0, none] == -INFINITY).all())
    assert not bool(similarity.isnan().any())


def test_nothing_allowed_returns_the_input() -> None:
    pairing = Pairing("external", 2)
    x = tokens(2, 20, 24)
    nothing = torch.zeros((1, 30), dtype=torch.bool, device=DEVICE)
    y, similarity, pushed = guide(
        x, tokens(1, 30, 24), pairing, threshold=-2.0, reference_mask=nothing
    )
    assert torch.equal(y, x)
    assert bool((pushed == -1).all()) and bool((similarity == -INFINITY).all())


def test_one_item_per_group_is_copied() -> None:
    x = tokens(2, 20, 24)
    y, similarity, pushed = guide(x, x, Pairing("first", 2, groups=2))
    assert torch.equal(y, x)
    assert bool((pushed == -1).all()) and bool((similarity == -INFINITY).all())


def test_fp64_is_refused() -> None:
    x = tokens(2, 8, 8).double()
    with pytest.raises(ValueError, match="float64"):
        triton_backend.match(Call(x, x, Pairing("first", 2), None, "paper"))


def test_importing_the_backend_does_not_import_the_kernels() -> None:
    # bench._path makes the kernels importable if the project is not installed.
    program = (
        "import sys, bench._path, negtome_fast.backends.triton_runtime as b;"
        "print(b.available('cpu'), 'negtome_fast.kernels.match' in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(False, ") and done.stdout.endswith(" False\n")


def test_whether_it_can_run_is_examined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = tokens(1, 1, 1).device
    # The first answer imports the kernels, which settles it.
    answer = triton_runtime.available(device)
    monkeypatch.setattr(triton_runtime, "_examine", lambda _: pytest.fail("examined again"))
    assert triton_runtime.available(device) == answer and answer[0]
