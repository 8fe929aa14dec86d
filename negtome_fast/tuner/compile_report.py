"""The compile report: every shipped configuration, compiled for every target without a GPU.

    python -m negtome_fast.tuner.compile_report [--targets sm_90 gfx942] [--kernels tiles]
    python -m negtome_fast.tuner.compile_report --save FILE       (or --check FILE)

`--also FOLDER` also compiles with the Triton in that folder, and shows where the two differ.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..kernels import aot, tuning
from ..kernels.aot import KIB, TARGETS, run_compiling

MATCHING = ("fused", "tiles", "pairs", "score")


# ---------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------
def compile_all(
    targets: Iterable[str] = tuple(TARGETS), kernels: Iterable[str] = tuning.KERNELS
) -> list[dict[str, Any]]:
    """Compile every shipped configuration; returns one row each, see `aot.row_of`.

    Needs kernels that are not interpreted.

    Raises:
        RuntimeError: Triton is not installed.
    """
    aot.require_triton()
    kernels = set(kernels)
    return [
        aot.compile_row(name, kernel, dtype, config, variant, constants)
        for name in targets
        for kernel, dtype, config in tuning.shipped_configurations(name)
        if kernel in kernels
        for variant, constants in aot.variants_of(kernel, dtype, config).items()
    ]


def _compile_given(target: str, text: str) -> list[dict[str, Any]]:
    rows = []
    for kernel, dtype, fields in json.loads(text):
        config = tuning.Config(*fields)
        variant, constants = next(iter(aot.variants_of(kernel, dtype, config).items()))
        rows.append(aot.compile_row(target, kernel, dtype, config, variant, constants))
    return rows


def _in_process(
    arguments: Sequence[str], given: str | None = None, triton: Path | None = None
) -> list[dict[str, Any]]:
    """Rows that `main` prints with `--json`, in a process whose kernels are not interpreted."""
    module = f"{__package__}.compile_report"
    rows: list[dict[str, Any]] = json.loads(
        run_compiling(module, ["--json", *arguments], given, triton)
    )
    return rows


def report(
    targets: Sequence[str] | None = None,
    kernels: Sequence[str] | None = None,
    triton: Path | None = None,
) -> list[dict[str, Any]]:
    """Compile every shipped configuration, in one process for each target.

    Unlike `compile_all` it also works in a process whose kernels are interpreted. triton: a folder
    with the Triton to compile with; default: the installed one.

    Raises:
        ValueError: a target or kernel is unknown.
        RuntimeError: Triton is not installed, or a process failed.
    """
    aot.require_triton()
    targets = list(TARGETS) if targets is None else list(targets)
    kernels = list(tuning.KERNELS) if kernels is None else list(kernels)
    for names, known in ((targets, tuple(TARGETS)), (kernels, tuning.KERNELS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")

    def compiled(target: str) -> list[dict[str, Any]]:
        return _in_process(["--targets", target, "--kernels", *kernels], triton=triton)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return [row for rows in pool.map(compiled, targets) for row in rows]


def report_configurations(
    target: str,
    configurations: Sequence[tuple[str, str, tuning.Config]],
    triton: Path | None = None,
) -> list[dict[str, Any]]:
    """Compile each (kernel, dtype, config), shipped or not, in its first variant; rows in order.

    Compiles in as many processes as there are processors. Raises as `report`.
    """
    aot.require_triton()
    if target not in TARGETS:
        raise ValueError(f"unknown {target}; known: {', '.join(TARGETS)}")
    workers = max(1, min(os.cpu_count() or 1, len(configurations)))
    shares = [configurations[number::workers] for number in range(workers)]

    def compiled(share: Sequence[tuple[str, str, tuning.Config]]) -> list[dict[str, Any]]:
        return _in_process(["--targets", target, "--given"], json.dumps(share), triton)

    with ThreadPoolExecutor(max_workers=workers) as pool:
        parts = list(pool.map(compiled, shares))
    return [parts[number % workers][number // workers] for number in range(len(configurations))]


def problems(row: dict[str, Any]) -> list[str]:
    """Faults of one row of the report, in words; empty if the configuration may ship."""
    if row["error"]:
        return [row["error"]]
    found = []
    if row["spills"]:
        found.append(f"spills {row['spills']}")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory exceed {row['shared_limit']}")
    if row["nan_maxima"]:
        found.append(f"{row['nan_maxima']} maxima that do not pass over NaN")
    if row["kernel"] == "bound" and not row["matrix_instructions"]:
        found.append("no tensor-core instruction")
    if row["kernel"] in MATCHING:
        if row["dtype"] != "float32" and not row["matrix_instructions"]:
            found.append("no tensor-core instruction")
        resident = tuning.Config(*row["config"]).CTAS_PER_SM if row["kernel"] != "fused" else 1
        if row["programs"] is not None and row["programs"] < resident:
            found.append(f"{row['programs']} programs fit a multiprocessor, not {resident}")
        # Elsewhere matrix instructions are exact in fp32; on NVIDIA they would round to TF32.
        exact = row["dtype"] == "float32" and row["target"].startswith("sm_")
        if exact and row["matrix_instructions"]:
            found.append("fp32 rounded to TF32")
    if row["narrow_offsets"]:
        found.append(f"{row['narrow_offsets']} offsets of 32 bits into tokens")
    return found


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------
_NAMED = ("kernel", "dtype", "M x N x K", "warps", "stages")
_FOUND = ("registers", "spills", "shared", "matrix", "programs", "occupancy", "verdict")
_HEADER = ("target", *_NAMED, *_FOUND)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row as text, in the order of the table's header."""
    config = tuning.Config(*row["config"])
    blocks = (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K)
    values = (
        row["target"],
        f"{row['kernel']} ({row['variant']})",
        row["dtype"],
        "x".join(str(block) for block in blocks if block),
        config.num_warps,
        config.num_stages,
        row["registers"],
        row["spills"],
        None if row["shared"] is None else f"{row['shared'] / KIB:.0f} KiB",
        row["matrix_instructions"],
        row["programs"],
        None if row["occupancy"] is None else f"{row['occupancy']:.0%}",
        "; ".join(problems(row)) or "ok",
    )
    return tuple("-" if value is None else str(value) for value in values)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The report as aligned text, one line a kernel and configuration."""
    lines = [_HEADER, *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    """Lines of cells, the first of them the header, as a Markdown table without first column."""
    header, *others = (line[1:] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *others))


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The rows of one target as a Markdown table, without the target's column."""
    return _markdown([_HEADER, *map(cells, rows)])


def differences(
    lines: Iterable[tuple[str, ...]], others: Iterable[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Lines of `cells` that differ between two compilers; a cell that differs is `this -> other`.

    Raises:
        ValueError: the two are not lines of the same kernels in the same order.
    """
    found = []
    named = 1 + len(_NAMED)
    for line, other in zip(lines, others, strict=True):
        if line[:named] != other[:named]:
            raise ValueError(f"rows of different kernels: {line[:named]} and {other[:named]}")
        if line != other:
            pairs = zip(line, other, strict=True)
            found.append(tuple(a if a == b else f"{a} -> {b}" for a, b in pairs))
    return found


def comparison(
    lines: Sequence[tuple[str, ...]], others: Sequence[tuple[str, ...]], versions: str
) -> str:
    """Sentence on two versions of Triton, and `differences` as a Markdown table."""
    different = differences(lines, others)
    text = f"Triton {versions}: {len(different)} of {len(lines)} differ."
    return f"{text}\n\n{_markdown([_HEADER, *different])}" if different else text


def saved(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]] = ()) -> str:
    """Text of the file that holds the rows of both compilers, as JSON with a row on each line."""

    def lines(kept: Sequence[dict[str, Any]]) -> str:
        told = ({k: v for k, v in row.items() if k != "seconds"} for row in kept)
        return ",\n".join(f"  {json.dumps(row)}" for row in told)

    return f'{{"rows": [\n{lines(rows)}\n], "others": [\n{lines(others)}\n]}}\n'


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="negtome_fast.tuner.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=tuning.KERNELS, default=tuning.KERNELS)
    parser.add_argument("--json", action="store_true", help="rows as JSON, always exit code 0")
    parser.add_argument("--also", type=Path, metavar="FOLDER", help="holds another Triton")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the rows, as JSON")
    parser.add_argument("--check", type=Path, metavar="FILE", help="exit code 1 if its rows differ")
    parser.add_argument("--given", action="store_true", help=argparse.SUPPRESS)
    return parser


def _print(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> None:
    print(table(rows))
    if others:
        print(f"\nTriton {rows[0]['triton']} -> {others[0]['triton']}, where they differ:")
        lines = differences(map(cells, rows), map(cells, others))
        print("\n".join("  ".join(line) for line in lines) or "nowhere")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report, save it, or compare it with a saved one.

    Returns:
        The exit code: 0; 1 if a configuration may not ship or the saved one is out of date; 2 for
        an error.
    """
    options = _parser().parse_args(arguments)
    file = options.save or options.check
    others: list[dict[str, Any]] = []
    try:
        if options.given:
            rows = _compile_given(options.targets[0], sys.stdin.read())
        elif options.json:
            rows = compile_all(options.targets, options.kernels)
        else:
            rows = report(options.targets, options.kernels)
        if options.also:
            others = report(options.targets, options.kernels, options.also)
        if options.save:
            options.save.write_text(saved(rows, others), encoding="utf-8")
        elif options.check and saved(rows, others) != options.check.read_text(encoding="utf-8"):
            print(f"{options.check} is out of date; --save updates it", file=sys.stderr)
            return 1
    except (RuntimeError, ValueError, OSError) as error:
        print(f"{_parser().prog}: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(rows))
        return 0
    if not file:
        _print(rows, others)
    wrong = [row for row in (*rows, *others) if problems(row)]
    for row in wrong if file else ():
        print(f"Triton {row['triton']}: {'  '.join(cells(row))}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
