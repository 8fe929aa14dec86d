"""Every backend against the fp64 oracle, on the one table of cases."""

from __future__ import annotations

import pytest
import torch

import negtome_fast as nf
from helpers.cases import CASES, Case, tokens
from helpers.device import BACKENDS, DEVICE
from helpers.oracle import Problem, bits
from negtome_fast import ops
from negtome_fast.arguments import check_problem
from negtome_fast.functional import guide_tokens


def runs_on(case: Case, backend: str) -> bool:
    return not (case.slow and backend == "triton" and DEVICE == "cpu")


PAIRS = [
    pytest.param(case, backend, id=f"{backend}: {case}")
    for backend in BACKENDS
    for case in CASES
    if runs_on(case, backend)
]


@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_output_is_right(case: Case, backend: str, poisoned: None) -> None:
    x, arguments = case.make(DEVICE)
    before = x.clone()
    result = guide_tokens(x, **arguments, backend=backend)
    assert torch.equal(bits(x), bits(before)), "the input was written to"
    Problem(x, arguments).check_guide(*result)


@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_match_is_right(case: Case, backend: str, poisoned: None) -> None:
    x, arguments = case.make(DEVICE)
    groups, matching = arguments.get("groups", 1), arguments.get("matching", "paper")
    p = check_problem(
        x, arguments.get("reference", "first"), arguments.get("reference_mask"), matching, groups
    )
    similarity, index = ops.match(
        x, p.reference, p.mask, p.pairing.mode, groups, p.pairing.per_item, matching, backend
    )
    Problem(x, arguments).check_match(similarity, index)


@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_in_place_equals_out_of_place(case: Case, backend: str) -> None:
    x, arguments = case.make(DEVICE)
    expected = nf.negtome(x, **arguments, backend=backend)
    returned = nf.negtome(x, **arguments, backend=backend, inplace=True)
    assert returned is x
    assert torch.equal(bits(x), bits(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("matching", ["paper", "official"])
def test_ties_go_to_the_lowest_index(backend: str, matching: str) -> None:
    x = torch.ones(3, 70, 16, device=DEVICE)
    _, _, pushed = guide_tokens(x, "others", matching=matching, backend=backend)
    assert torch.all(pushed == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reference_item_of_every_group_is_bit_identical(backend: str) -> None:
    x = tokens(torch.Generator().manual_seed(0), (6, 40, 16)).to(DEVICE)
    mask = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    mask[3] = True
    y = nf.negtome(x, groups=2, threshold=-1.0, reference_mask=mask, backend=backend)
    assert torch.equal(bits(y[[0, 3]]), bits(x[[0, 3]]))
    assert not torch.equal(y[1], x[1]) and not torch.equal(y[5], x[5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_never_see_each_other(backend: str) -> None:
    x = tokens(torch.Generator().manual_seed(0), (6, 40, 16)).to(DEVICE)
    for mode in ("first", "others"):
        whole = nf.negtome(x, mode, groups=2, backend=backend)
        parts = [nf.negtome(half, mode, backend=backend) for half in x.chunk(2)]
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_external_reference_that_is_item_zero_equals_first(backend: str) -> None:
    x = tokens(torch.Generator().manual_seed(0), (4, 40, 16)).to(DEVICE)
    y = nf.negtome(x, x[0], backend=backend)
    assert torch.equal(y[1:], nf.negtome(x, backend=backend)[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference", ["first", "others"])
def test_runs_are_identical(backend: str, reference: str) -> None:
    x = tokens(torch.Generator().manual_seed(0), (4, 90, 32)).to(DEVICE)
    outputs = [nf.negtome(x, reference, backend=backend) for _ in range(5)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_backends_drop_the_same_tokens() -> None:
    x = tokens(torch.Generator().manual_seed(0), (4, 90, 32)).to(DEVICE)
    spared = []
    for backend in BACKENDS:
        generator = torch.Generator(DEVICE).manual_seed(7)
        _, _, pushed = guide_tokens(
            x, threshold=-1.0, dropout=0.4, generator=generator, backend=backend
        )
        spared.append((pushed < 0)[1:])
    assert all(torch.equal(spared[0], other) for other in spared[1:])
    assert 0.3 < spared[0].float().mean() < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_round(backend: str) -> None:
    x = tokens(torch.Generator().manual_seed(0), (3, 60, 96)).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        result = guide_tokens(x, backend=backend)
    Problem(x, {}).check_guide(*result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_set_of_references_expanded_to_the_batch_equals_a_shared_one(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = tokens(generator, (3, 30, 16)).to(DEVICE)
    shared = tokens(generator, (2, 30, 16)).to(DEVICE)
    mask = (torch.rand(2, 30, generator=generator) < 0.5).to(DEVICE)
    expanded = shared.expand(3, -1, -1, -1)
    for own in (None, mask):
        expected = nf.negtome(x, shared, reference_mask=own, backend=backend)
        assert torch.equal(nf.negtome(x, expanded, reference_mask=own, backend=backend), expected)
    per_item = mask.expand(3, -1, -1)
    expected = nf.negtome(x, shared, reference_mask=mask, backend=backend)
    y = nf.negtome(x, expanded, reference_mask=per_item, backend=backend)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_one_spares_everything(backend: str) -> None:
    x = tokens(torch.Generator().manual_seed(0), (2, 30, 8)).to(DEVICE)
    assert torch.equal(nf.negtome(x, threshold=-1.0, dropout=1.0, backend=backend), x)


def test_match_tokens_numbers_tokens_as_documented() -> None:
    x = tokens(torch.Generator().manual_seed(0), (4, 30, 16)).to(DEVICE)
    similarity, index = nf.match_tokens(x)
    assert index.shape == similarity.shape == (4, 30)
    assert torch.all(index[0] == -1) and torch.all(similarity[0] == float("-inf"))
    assert torch.all((index[1:] >= 0) & (index[1:] < 30))
    _, index = nf.match_tokens(x, "others", groups=2)
    item = index // 30
    assert torch.equal(item, torch.tensor([1, 0, 3, 2], device=DEVICE)[:, None].expand(4, 30))
    references = torch.stack([x[2], x[3]])
    similarity, index = nf.match_tokens(x, references)
    assert torch.equal(index[2], torch.arange(30, device=DEVICE))
    assert torch.equal(index[3], 30 + torch.arange(30, device=DEVICE))
    assert torch.all((similarity[2:] - 1).abs() < 1e-6)
