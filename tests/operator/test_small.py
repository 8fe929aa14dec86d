"""The small path of the torch backend: few operators, and results as exact as everywhere else.

Operators are counted, not timed: a count is the same on a busy machine.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.cases import CASES, Case, tokens
from helpers.counted import operators
from helpers.oracle import Problem, bits
from negtome_fast import arguments
from negtome_fast.backends import small, torch_backend
from negtome_fast.call import Call
from negtome_fast.config import NegToMeConfig
from negtome_fast.functional import guide_tokens, match_tokens, negtome
from negtome_fast.guidance import Guidance
from negtome_fast.pairing import Pairing
from negtome_fast.statistics import Statistics

VIEWS = {
    *("view", "slice", "select", "narrow", "transpose", "t", "permute", "expand", "alias"),
    "split_with_sizes",
}
"""Operators that move no data; they take a quarter of the time of others."""
WHOLE = [case for case in CASES if not case.slow]


STAYING: dict[str, dict[str, Any]] = {
    "first": {},
    "first, groups": {"groups": 2},
    "others": {"reference": "others"},
    "others, sum": {"reference": "others", "combine": "sum"},
    "others, several alphas": {"reference": "others", "alpha": torch.tensor([0.9, -0.4, 0.2])},
    "one reference": {"reference": 1},
    "two references, sum": {"reference": 2, "combine": "sum"},
    "official": {"matching": "official"},
}


def similar(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return tokens(torch.Generator().manual_seed(0), shape, dtype)


@pytest.mark.parametrize(
    ("mode", "groups", "inplace", "work", "views"),
    [
        ("first", 1, True, 19, 9),
        ("first", 1, False, 20, 14),
        ("first", 2, True, 20, 22),
        ("others", 1, True, 28, 10),
        ("others", 2, True, 24, 10),
    ],
)
def test_a_guided_block_takes_few_operators(
    mode: Any, groups: int, inplace: bool, work: int, views: int
) -> None:
    x = similar(4, 64, 160)
    scalars = torch.tensor(0.9), torch.tensor(0.3)
    out = x if inplace else torch.empty_like(x)
    call = Call(x, x, Pairing(mode, 4, groups), None, "paper", *scalars)
    torch_backend.guide(call, torch.empty_like(x))  # its constants
    calls = operators(lambda: torch_backend.guide(call, out)).calls
    looked = sum(calls[name] for name in VIEWS)
    assert calls.total() - looked <= work, calls
    assert looked <= views, calls


def test_a_step_is_counted_without_an_operator() -> None:
    x = similar(4, 64, 32)
    guidance = Guidance(NegToMeConfig(threshold=0.3))
    guidance.begin_step(1000.0)
    guidance.apply(x)
    assert not operators(guidance.end_step).calls
    assert guidance.summary().total.tokens == 3 * 64


@pytest.mark.parametrize("case", WHOLE, ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float16], ids=str)
def test_equals_the_oracle_in_and_out_of_place(case: Case, dtype: torch.dtype | None) -> None:
    x, arguments = case.make()
    if dtype is not None:
        if "huge" in str(case) or "beyond" in str(case):
            pytest.skip("no fp16 has such numbers, and fp64 no such norms")
        arguments = {
            name: value.to(dtype) if name == "reference" and isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        x = x.to(dtype)
    y, similarity, pushed = guide_tokens(x, **arguments, backend="torch")
    Problem(x, arguments).check_guide(y, similarity, pushed)
    again = guide_tokens(x, **arguments, backend="torch", inplace=True)
    assert again[0] is x
    assert torch.equal(bits(x), bits(y)) and torch.equal(again[2], pushed)


@pytest.mark.parametrize("name", ["first", "first, groups", "others", "three references"])
def test_the_cases_are_small_problems(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == name)
    calls = []
    entry = "guide_from_first" if name == "first" else "guide"
    original = getattr(small, entry)
    monkeypatch.setattr(small, entry, lambda *given: calls.append(1) or original(*given))
    x, arguments = case.make()
    guide_tokens(x, **arguments, backend="torch")
    assert calls


@pytest.mark.parametrize("shape", [(4, 64, 160), (4, 50, 24), (2, 200, 40), (6, 96, 32)])
@pytest.mark.parametrize("reference", ["first", "others"])
@pytest.mark.parametrize("matching", ["paper", "official"])
def test_chooses_as_the_large_path(
    shape: tuple[int, int, int], reference: str, matching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = similar(*shape)
    settings: dict[str, Any] = {"matching": matching, "groups": 2 if shape[0] > 2 else 1}
    y, similarity, pushed = guide_tokens(x, reference, **settings, backend="torch")
    monkeypatch.setattr(small, "SMALL", 0)
    expected = guide_tokens(x, reference, **settings, backend="torch")
    assert torch.equal(pushed, expected[2])
    torch.testing.assert_close(similarity, expected[1], rtol=0, atol=2e-6)
    torch.testing.assert_close(y, expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.9, -0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", list(STAYING.values()), ids=list(STAYING))
def test_a_token_that_stays_keeps_the_sign_of_zero(
    settings: dict[str, Any], dtype: torch.dtype, alpha: float
) -> None:
    x = similar(4, 50, 24, dtype=dtype)
    x[:, :, ::3] = -0.0
    x[:, :, 1::3] = 0.0
    given = {"alpha": alpha, "threshold": 0.5, **settings}
    if isinstance(given.get("reference"), int):
        given["reference"] = similar(4, 50, 24, dtype=dtype)[: given["reference"], :20]
    spared = torch.arange(50) % 3 > 0
    y, _, pushed = guide_tokens(x, **given, source_mask=spared, backend="torch")
    stays = (pushed < 0).all(dim=1)
    assert 0 < int(stays.sum()) < stays.numel()
    assert torch.equal(bits(y)[stays], bits(x)[stays])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("columns", [1, 7, 64, 100, 128, 192, 256, 1024])
def test_the_maximum_is_the_first_of_equal_ones(columns: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randint(0, 3, (2000, columns), generator=generator).float()
    scores[::5] = -torch.inf
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        value, index = small._maximum(scores, keepdim=False)
        down = scores.T.contiguous().max(dim=0)
    finally:
        torch.set_num_threads(before)
    best = scores.amax(dim=1)
    first = (scores == best[:, None]).int().argmax(dim=1)
    lowest = torch.where(scores == best[:, None], torch.arange(columns), columns).amin(dim=1)
    assert torch.equal(first, lowest)
    assert torch.equal(value, best) and torch.equal(index, lowest)
    assert torch.equal(down.values, best) and torch.equal(down.indices, lowest)


@pytest.mark.parametrize("copies", [1, 2, 3, 5])
@pytest.mark.parametrize("distinct", [1, 13, 31, 64])
@pytest.mark.parametrize("channels", [8, 100, 640])
@pytest.mark.parametrize("matching", ["paper", "official"])
def test_the_first_copy_of_a_token_is_chosen_both_ways(
    distinct: int, copies: int, channels: int, matching: str
) -> None:
    """The rows and the columns of one product are the candidates of its two items."""
    some = torch.randn(3, distinct, channels, generator=torch.Generator().manual_seed(0))
    x = some.repeat(1, copies, 1)
    _, _, pushed = guide_tokens(x, "others", threshold=-1.0, matching=matching, backend="torch")
    token = pushed[pushed >= 0] % x.shape[1]
    assert token.numel() > 0 and int(token.max()) < distinct


@pytest.mark.parametrize("reference", ["first", "others"])
def test_results_do_not_depend_on_threads_or_the_call(reference: str) -> None:
    x = similar(4, 256, 160)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            results.append(guide_tokens(x, reference, backend="torch"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
    assert torch.equal(results[0][2], results[1][2])


def test_dropout_spares_tokens_on_the_small_path() -> None:
    x = similar(4, 64, 32)
    generator = torch.Generator().manual_seed(3)
    y, _, pushed = guide_tokens(x, threshold=-1.0, dropout=0.5, generator=generator)
    kept = torch.rand(4, 64, generator=torch.Generator().manual_seed(3)) > 0.5
    kept[0] = False
    assert torch.equal(pushed[:, 0] >= 0, kept)
    assert torch.equal(y[~kept], x[~kept])


class TestWhatIsRemembered:
    """Checks are skipped only if they cannot fail again."""

    def test_equal_values_of_other_types_are_still_refused(self) -> None:
        x = similar(4, 64, 32)
        negtome(x, alpha=1.0, threshold=0.0, groups=1, dropout=0.0)
        for wrong in ({"groups": True}, {"groups": 1.0}, {"groups": 3}):
            with pytest.raises(ValueError, match="group"):
                negtome(x, **wrong)
        for wrong in ({"alpha": True}, {"threshold": False}):
            with pytest.raises(TypeError, match="must be a number"):
                negtome(x, **wrong)
        with pytest.raises(ValueError, match="matching"):
            negtome(x, matching=["paper"])
        with pytest.raises(TypeError, match="reference must be"):
            negtome(x, ["first"])
        with pytest.raises(ValueError, match="finite"):
            negtome(x, alpha=float("nan"))
        with pytest.raises(ValueError, match="finite"):
            negtome(x, alpha=1e300)
        assert negtome(x.double(), alpha=1e300).shape == x.shape

    def test_a_refusal_is_not_remembered_as_an_answer(self) -> None:
        x = similar(3, 64, 32)
        for _ in range(2):
            with pytest.raises(ValueError, match="does not divide"):
                negtome(x, groups=2)
            with pytest.raises(TypeError, match="must be one of"):
                negtome(x.int())

    def test_a_tensor_of_the_caller_is_looked_at_every_time(self) -> None:
        x, alpha = similar(4, 64, 32), torch.tensor(0.9)
        negtome(x, alpha=alpha)
        alpha.fill_(torch.nan)
        with pytest.raises(ValueError, match="finite"):
            negtome(x, alpha=alpha)

    def test_numbers_made_in_inference_mode_serve_outside_of_it(self) -> None:
        arguments._known_number.cache_clear()
        arguments._known_problem.cache_clear()
        small.places_of.cache_clear()
        x = similar(4, 64, 32)
        with torch.inference_mode():
            expected = negtome(x, alpha=0.7, threshold=0.2)
        differentiated = x.clone().requires_grad_()
        y = negtome(differentiated, alpha=0.7, threshold=0.2)
        y.sum().backward()
        assert torch.equal(y.detach(), expected)

    def test_the_environment_decides_at_every_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = similar(4, 64, 32)
        negtome(x)
        monkeypatch.setenv("NEGTOME_FAST_BACKEND", "no such")
        with pytest.raises(ValueError, match="backend"):
            negtome(x)


class TestStatisticsOfManySteps:
    """On a CPU, matches of many steps are kept and counted together."""

    def run(self, guidance: Guidance, steps: int) -> None:
        x = similar(4, 64, 32)
        for step in range(steps):
            guidance.begin_step(1000.0)
            for block in ("a", "b"):
                guidance.apply(x + step, block=block)
            guidance.end_step()

    def rows(self, steps: int, look: bool) -> Any:
        guidance = Guidance(NegToMeConfig(threshold=0.3))
        for _ in range(steps):
            self.run(guidance, 1)
            if look:
                guidance.summary()
        return guidance.summary().rows

    def test_looking_in_between_changes_nothing(self) -> None:
        often, once = self.rows(3, look=True), self.rows(3, look=False)
        assert often == once
        assert [row.calls for row in once] == [3, 3]
        assert [row.tokens for row in once] == [3 * 3 * 64] * 2
        assert 0 < once[0].pushed < 1

    def test_no_more_wait_than_allowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("negtome_fast.statistics.MAX_WAITING_TOKENS", 4 * 4 * 64)
        guidance = Guidance(NegToMeConfig(threshold=0.3))
        statistics = guidance._statistics
        for _ in range(5):
            self.run(guidance, 1)
            assert statistics._waiting_tokens <= 4 * 4 * 64
        assert guidance.summary().total.tokens == 5 * 2 * 3 * 64

    def test_a_copy_counts_for_itself(self) -> None:
        guidance = Guidance(NegToMeConfig(threshold=0.3))
        self.run(guidance, 2)
        copied = copy.deepcopy(guidance)
        self.run(guidance, 1)
        assert isinstance(copied._statistics, Statistics)
        assert copied.summary().total.tokens == 2 * 2 * 3 * 64
        assert guidance.summary().total.tokens == 3 * 2 * 3 * 64

    def test_matches_of_inference_mode_are_copied_too(self) -> None:
        guidance = Guidance(NegToMeConfig(threshold=0.3))
        with torch.inference_mode():
            self.run(guidance, 1)
        assert copy.deepcopy(guidance).summary() == guidance.summary()


def test_match_is_that_of_guide() -> None:
    for reference in ("first", "others"):
        x = similar(4, 64, 32)
        similarity, index = match_tokens(x, reference, backend="torch")
        _, expected, pushed = guide_tokens(x, reference, threshold=-1.0, backend="torch")
        torch.testing.assert_close(similarity, expected[:, 0], rtol=0, atol=2e-6)
        assert torch.equal(index < 0, pushed[:, 0] < 0)
        if reference == "first":
            assert torch.equal(index, pushed[:, 0])
