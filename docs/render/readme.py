"""The table `results` of README.md: speed, cost and effect, one row each."""

from __future__ import annotations

from typing import Any

from bench.drawn.tables import interval_text, memory_text, time_text
from bench.results import end_to_end, micro

#: The case of the CPU benchmark that the row of speed shows.
SPEED_CASE = ("4x4096x640", "float32")
#: The precision at which the row of effect compares.
PRECISION = 0.3


def speed_row(record: dict[str, Any]) -> str:
    """Time and memory of one call of the operator beside the authors' function."""
    shape, dtype = SPEED_CASE
    cases = (micro(record) or {}).get("cases", ())
    case = next(one for one in cases if (one["shape"], one["dtype"]) == SPEED_CASE)
    times, extra = case["times"], case["extra_bytes"]
    ratio = times["authors"]["times_ours"]["median"]
    seconds = time_text(times["ours"]["seconds"]["median"])
    return (
        f"{shape} {dtype} on a CPU: {seconds}, {ratio:.1f} times as fast as the authors' function; "
        f"{memory_text(extra['ours'])} of extra memory instead of {memory_text(extra['authors'])}"
    )


def cost_row(record: dict[str, Any]) -> str:
    """Time that guidance adds to a step of the embedded model, beside the authors' function."""
    (model, *_) = end_to_end(record)
    ours, authors = (
        interval_text(model["step"][method]["added_share"]) for method in ("ours", "authors")
    )
    return (
        f"a guided step of the embedded model on a CPU: {ours} of its time (authors': {authors}); "
        f"{model['guided_steps']} of {model['steps']} steps are guided"
    )


def effect_row(record: dict[str, Any]) -> str:
    """Diversity at equal precision, against the best guidance scale without NegToMe."""
    (found,) = (
        one
        for one in record["frontiers"]
        if one["quality"] == "precision" and one["level"] == PRECISION
    )
    ratio, low, high = found["ratio"]
    return (
        f"embedded model, at a precision of {PRECISION} or more: entropy of open attributes "
        f"{found['off_entropy']:.2f} -> {found['entropy']:.2f} nats, "
        f"{ratio:.2f} times [{low:.2f}, {high:.2f}] the best of the unguided scales"
    )


FILES = ("cpu.json", "end-to-end-cpu.json", "eval/diversity.json")
"""Files below bench/results whose content `table` takes."""


def table(speed: dict[str, Any], cost: dict[str, Any], effect: dict[str, Any]) -> str:
    """The three rows, each with a link to its page."""
    rows = (
        ("speed", speed_row(speed), "[benchmarks](docs/benchmarks.md)"),
        ("cost", cost_row(cost), "[end to end](docs/benchmarks.md#a-whole-model)"),
        ("effect", effect_row(effect), "[studies](docs/evaluation.md)"),
    )
    header = ("| | measured | more |", "| --- | --- | --- |")
    return "\n".join((*header, *(f"| {' | '.join(row)} |" for row in rows)))
