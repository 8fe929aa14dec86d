"""Choose the configurations that compile well, by compile reports made here or shipped.

    python -m negtome_fast.tuner.candidates [--targets sm_90] [--quick] [--also FOLDER]

writes `compiled/<arch>.json`: the compile report of every configuration that tuning the shapes of
space.py would meet, by the installed Triton and by the one in each FOLDER. On a GPU the tuner then
skips the bad ones without compiling them. A file is valid until the code of the kernels changes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..kernels import aot, tuning
from ..kernels.tuning import Config, Problem
from . import compile_report
from .predict import RATES, ordered
from .space import SHAPES

FOLDER = Path(__file__).parent / "compiled"
SCHEMA = 2
#: Number of configurations of a kernel that are measured; the second if quick or short of time.
MEASURED, QUICK = 24, 6
#: Files of the kernels that are tuned.
SOURCES = ("division.py", "fused.py", "match.py", "push.py", "shared.py")
#: Fields of the compile report that a file keeps, for each Triton.
FOUND = (
    *("registers", "spills", "shared", "matrix_instructions", "narrow_offsets", "programs"),
    *("nan_maxima", "error"),
)

#: (kernel, dtype, config).
Key = tuple[str, str, Config]
#: Rows of the compile report.
Rows = dict[Key, dict[str, Any]]
Compile = Callable[[Sequence[Key]], list[dict[str, Any]]]


def wanted(
    kernel: str,
    problem: Problem,
    arch: str,
    multiprocessors: int,
    keep: int,
    reports: Rows,
    spare: bool = False,
) -> list[Key]:
    """The `keep` most promising configurations of a kernel that are not known to be bad.

    A configuration is bad if its row of `reports` has a problem (`compile_report.problems`): an
    error, spills, too much shared memory, no tensor cores, or fewer than CTAS_PER_SM programs on a
    multiprocessor. With `spare`, one more is added for each bad one, as the next ones may be bad
    too.
    """
    found: list[Key] = []
    count = keep
    for config in ordered(kernel, problem, arch, multiprocessors, keep):
        key = (kernel, problem.dtype, config)
        if key not in reports or not compile_report.problems(reports[key]):
            found.append(key)
        elif spare:
            count += 1
        if len(found) == count:
            break
    return found


def pruned(
    kernel: str,
    problem: Problem,
    arch: str,
    multiprocessors: int,
    keep: int,
    reports: Rows,
    compiled: Compile,
) -> list[dict[str, Any]]:
    """Rows of the compile report of the `keep` most promising good configurations, in that order.

    reports: known rows. Missing rows come from `compiled`, and are added to it.
    """
    while True:
        keys = wanted(kernel, problem, arch, multiprocessors, keep, reports)
        missing = [key for key in keys if key not in reports]
        if not missing:
            return [reports[key] for key in keys]
        reports.update(zip(missing, compiled(missing), strict=True))


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------
def fingerprint(texts: Iterable[str]) -> str:
    """A hash of Python sources without comments, docstrings and layout, 16 characters."""
    digest = hashlib.sha256()
    layout = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT)
    for text in texts:
        starts = True
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if not (starts and token.type == tokenize.STRING) and token.type not in layout:
                digest.update(f"{token.string}\0".encode())
            if token.type not in (tokenize.NL, tokenize.COMMENT):
                starts = token.type in layout or token.string == ""
    return digest.hexdigest()[:16]


def sources() -> str:
    """Fingerprint of the installed kernels."""
    folder = Path(aot.__file__).parent
    return fingerprint((folder / name).read_text(encoding="utf-8") for name in SOURCES)


def _row(arch: str, version: str, key: Key, found: Sequence[Any]) -> dict[str, Any]:
    kernel, dtype, config = key
    target = aot.TARGETS[arch]
    row: dict[str, Any] = {"triton": version, "target": arch, "kernel": kernel, "dtype": dtype}
    row |= {"variant": next(iter(aot.variants_of(kernel, dtype, config))), "config": list(config)}
    row |= {"shared_limit": target.shared_limit, **dict(zip(FOUND, found, strict=True))}
    programs = row["programs"]
    share = None if programs is None else round(programs * config.num_warps / target.warps, 2)
    return row | {"occupancy": share}


def listed(arch: str, version: str, path: Path | None = None) -> Rows:
    """Rows of the file of `arch` (or `path`) for a version of Triton.

    Empty if there is no file, or if the kernels have changed since it was made.
    """
    path = path or FOLDER / f"{arch}.json"
    if not path.is_file():
        return {}
    table = json.loads(path.read_text(encoding="utf-8"))
    current = (SCHEMA, list(Config._fields), list(FOUND), sources())
    if (table["schema"], table["fields"], table["found"], table["sources"]) != current:
        return {}
    rows = {}
    for entry in table["candidates"]:
        if version in entry:
            key = (entry["kernel"], entry["dtype"], Config(*entry["config"]))
            rows[key] = _row(arch, version, key, entry[version])
    return rows


def text_of(arch: str, keeps: Sequence[int], reports: dict[str, Rows]) -> str:
    """Text of the file of `arch`: a line for each configuration, with a row for each Triton."""
    head = {"schema": SCHEMA, "arch": arch, "fields": list(Config._fields), "found": list(FOUND)}
    head |= {"sources": sources(), "kept": list(keeps)}
    lines = []
    for key in dict.fromkeys(key for rows in reports.values() for key in rows):
        kernel, dtype, config = key
        entry = {"kernel": kernel, "dtype": dtype, "config": list(config)}
        for version, rows in reports.items():
            if key in rows:
                entry[version] = [rows[key][name] for name in FOUND]
        lines.append("  " + json.dumps(entry))
    body = ",\n".join(lines)
    return f'{json.dumps(head, indent=1)[:-2]},\n "candidates": [\n{body}\n ]\n}}\n'


# ---------------------------------------------------------------------------------------------
# Making files
# ---------------------------------------------------------------------------------------------
def met(arch: str, dtype: str, keeps: Sequence[int], reports: Rows, compiled: Compile) -> None:
    """Add to `reports` all rows that tuning every shape on `arch` would need.

    keeps: numbers of configurations of a kernel that are measured, one for each way of tuning.
    """
    for shape in SHAPES:
        for kernel in shape.kernels:
            problem = shape.problem(dtype, others=kernel == "pairs")
            for keep in keeps:
                count = RATES[arch].multiprocessors
                pruned(kernel, problem, arch, count, keep, reports, compiled)


def made(
    arch: str, dtypes: Sequence[str], keeps: Sequence[int], folders: Sequence[Path | None]
) -> Iterator[dict[str, Rows]]:
    """Yield all rows so far, by version of Triton, after each folder; None: the installed one."""
    reports: dict[str, Rows] = {}
    by_version: dict[str, Compile] = {}
    for folder in folders:
        rows: Rows = {}

        def compiled(keys: Sequence[Key], folder: Path | None = folder) -> list[dict[str, Any]]:
            return compile_report.report_configurations(arch, keys, folder)

        for dtype in dtypes:
            met(arch, dtype, keeps, rows, compiled)
        version = next(iter(rows.values()))["triton"]
        reports[version], by_version[version] = rows, compiled
        # Every version gets all configurations, so that the versions can be compared.
        every = dict.fromkeys(key for rows in reports.values() for key in rows)
        for version, rows in reports.items():
            missing = [key for key in every if key not in rows]
            if missing:
                rows.update(zip(missing, by_version[version](missing), strict=True))
            reports[version] = {key: rows[key] for key in every}
        yield reports


def summary(reports: dict[str, Rows]) -> str:
    """Markdown table: number of good configurations by kernel and Triton, and the differences."""
    versions = sorted(reports, reverse=True)
    rows: dict[str, Rows] = {version: reports[version] for version in versions}
    heads = ["kernel", "dtype", "compiled", *(f"good by {version}" for version in versions)]
    heads += ["other registers", "good by one only"]
    lines = [heads, ["---"] * len(heads)]
    groups = dict.fromkeys(key[:2] for key in rows[versions[0]])
    for group in groups:
        keys = [key for key in rows[versions[0]] if key[:2] == group]
        good = {v: {k for k in keys if not compile_report.problems(rows[v][k])} for v in versions}
        registers = sum(len({rows[v][key]["registers"] for v in versions}) > 1 for key in keys)
        one = [key for key in keys if len({key in good[v] for v in versions}) > 1]
        told = "; ".join(_told(key, {v: rows[v][key] for v in versions}) for key in one) or "none"
        counts = [str(len(good[version])) for version in versions]
        lines.append([*group, str(len(keys)), *counts, str(registers), told])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _told(key: Key, rows: dict[str, dict[str, Any]]) -> str:
    """A configuration in words, with its problems by version of Triton."""
    config = key[2]
    parts = [f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K}", f"{config.num_warps} warps"]
    parts += [f"{config.num_stages} stages"]
    parts += [f"{config.CTAS_PER_SM} resident"] if config.CTAS_PER_SM > 1 else []
    parts += [name.lower() for name in ("DESCRIPTORS", "FLATTEN") if getattr(config, name)]
    wrong = {version: ", ".join(compile_report.problems(row)) for version, row in rows.items()}
    told = "; ".join(f"{version}: {text}" for version, text in wrong.items() if text)
    return f"{', '.join(parts)} ({told})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files; returns the exit code: 0, or 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="negtome_fast.tuner.candidates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=aot.TARGETS, default=["sm_90"])
    parser.add_argument("--dtypes", nargs="+", choices=tuning.DTYPES, default=["bfloat16"])
    parser.add_argument(
        "--quick", action="store_true", help="only the configurations of quick tuning"
    )
    parser.add_argument("--also", nargs="+", type=Path, metavar="FOLDER", default=[])
    options = parser.parse_args(arguments)
    try:
        keeps = [QUICK] if options.quick else [QUICK, MEASURED]
        for arch in options.targets:
            for reports in made(arch, options.dtypes, keeps, [*options.also, None]):
                FOLDER.mkdir(exist_ok=True)
                file = FOLDER / f"{arch}.json"
                file.write_text(text_of(arch, keeps, reports), encoding="utf-8")
    except (RuntimeError, ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
