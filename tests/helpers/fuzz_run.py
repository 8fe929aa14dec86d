"""Run a problem of the fuzzer and check everything that it returns."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from helpers.fuzz_oracle import NOTHING, Decision, Oracle, Scores, same_bits
from helpers.fuzz_problems import Fuzzed, circumstances, draw
from negtome_fast.functional import guide_tokens, match_tokens


def check_seed(seed: int, triton: bool = False) -> None:
    """Draw a problem, run it and check it; the error names the seed."""
    problem = draw(seed, triton)
    try:
        check(problem)
    except Exception as error:
        kind = "--triton " if triton else ""
        raise AssertionError(
            f"{error}\nreproduce: python -m tests.fuzz {kind}--only {seed}\n{_described(problem)}"
        ) from error


def _described(problem: Fuzzed) -> str:
    def short(value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() > 4:
            return f"{tuple(value.shape)} {value.dtype} strides {value.stride()}"
        return value

    fields = {name: short(value) for name, value in vars(problem).items() if name != "arguments"}
    return f"{fields} { ({name: short(value) for name, value in problem.arguments.items()}) }"


def check(problem: Fuzzed) -> None:
    """Run a problem and compare it with the oracle."""
    oracle = Oracle(problem)
    with circumstances(problem), _launches(problem), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = _run(problem)
    if problem.entry == "match":
        _check_match(problem, oracle, *results)
    else:
        _check_guide(problem, oracle, *results)


def _launches(problem: Fuzzed) -> AbstractContextManager[None]:
    if problem.backend == "torch":
        return nullcontext()
    from negtome_fast.tuner.measure import forced

    return forced(problem.path)


def _run(problem: Fuzzed) -> tuple[Tensor, ...]:
    x, arguments = problem.x, dict(problem.arguments)
    if problem.entry == "match":
        allowed = ("reference", "reference_mask", "groups")
        kept = {name: value for name, value in arguments.items() if name in allowed}
        return match_tokens(x, **kept, backend=problem.backend)
    if "dropout" in arguments:
        arguments["generator"] = torch.Generator("cpu").manual_seed(problem.seed)
    inplace = problem.entry == "inplace"
    before, table = x.clone(), problem.arguments["reference"]
    references = table.clone() if isinstance(table, Tensor) else None
    results = guide_tokens(x, **arguments, inplace=inplace, backend=problem.backend)
    if inplace:
        assert results[0] is x, "another tensor was returned"
    else:
        assert same_bits(x, before), "x has changed"
    assert references is None or same_bits(table, references), "the references have changed"
    return results


def _parameter(value: float | Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """A parameter of each slot, in the precision that a call reads it with."""
    return torch.as_tensor(value, dtype=dtype).reshape(-1).expand(slots)


def _check_guide(
    problem: Fuzzed, oracle: Oracle, y: Tensor, similarity: Tensor, pushed: Tensor
) -> None:
    arguments, (items, tokens) = problem.arguments, problem.x.shape[:2]
    may = torch.ones(items, tokens, dtype=torch.bool)
    if "source_mask" in arguments:
        may &= arguments["source_mask"]
    if arguments.get("dropout", 0.0) > 0:
        generator = torch.Generator("cpu").manual_seed(problem.seed)
        may &= torch.rand(items, tokens, generator=generator) > arguments["dropout"]
    assert y.shape == oracle.x.shape and y.dtype == oracle.dtype
    assert similarity.dtype == oracle.compute and pushed.dtype == torch.int64
    assert similarity.shape == pushed.shape == (items, similarity.shape[1], tokens)
    for item in range(items):
        slots = len(oracle.met(item))
        if not slots:
            oracle.check_same(y[item], oracle.x[item])
            assert bool((similarity[item] == NOTHING).all() and (pushed[item] == -1).all())
            continue
        alpha = _parameter(arguments["alpha"], slots, oracle.compute)
        threshold = _parameter(arguments["threshold"], slots, oracle.compute)
        scores, decisions = oracle.scores(item), []
        assert len(similarity[item]) == (slots if oracle.sum else 1)
        for line in range(len(similarity[item])):
            number, here = pushed[item, line], slice(line, line + 1)
            moved, slot, token = number >= 0, number // oracle.length, number % oracle.length
            found = Decision(similarity[item, line], moved, slot, token)
            decisions.append(found)
            if oracle.sum:
                assert bool((slot[moved] == line).all()), "another slot than its own"
                found = found._replace(slot=torch.zeros_like(slot))
                one = Scores(*(part[here] for part in scores[:3]), scores.above[here, here])
                oracle.check_decision(one, threshold[here], may[item], found)
            else:
                oracle.check_decision(scores, threshold, may[item], found)
        oracle.check_output(item, y[item], alpha, decisions)


def _check_match(problem: Fuzzed, oracle: Oracle, similarity: Tensor, index: Tensor) -> None:
    items, tokens = problem.x.shape[:2]
    assert similarity.shape == index.shape == (items, tokens)
    for item in range(items):
        met = oracle.met(item)
        if not met:
            assert bool((similarity[item] == NOTHING).all() and (index[item] == -1).all())
            continue
        found = index[item] >= 0
        slot, token = index[item] // oracle.length, index[item] % oracle.length
        if oracle.mode == "others":
            place = torch.full((items,), -1)
            place[met] = torch.arange(len(met))
            slot = place[slot.clamp_min(0)]
        decision = Decision(similarity[item], found, slot, token)
        nothing = torch.full((len(met),), NOTHING, dtype=oracle.compute)
        may = torch.ones(tokens, dtype=torch.bool)
        oracle.check_decision(oracle.scores(item), nothing, may, decision)
