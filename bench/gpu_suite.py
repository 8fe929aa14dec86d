"""Two commands for a machine with a GPU; `python bench/gpu_suite.py smoke --out DIR` comes first.

smoke, at most 180 seconds:
kernels     every kind of kernel and dtype against fp64, each kind in its own process
times       the main shapes against the bare matmul, beside the predictions
each        the time of every kernel by itself
ncu         the profiler's report of the tile kernel, if `ncu` is installed

full, at most 450 seconds:
tune        searches launch configurations for the main shapes: DIR/<arch>.json
tuned       the shapes of models with that table, against what a user would take instead
tests       the tests of the kernels, then the others that run on a GPU
end-to-end  time that guidance adds to FLUX.1-dev, SDXL and Wan, if diffusers is installed
coarse      int8 bounds and exact scores against tiles, and the columns in question a row
growth      tokens, batch and channels
sanitizer   a small run of every kernel under compute-sanitizer, if that is installed
compiled    the main shapes against the rivals under `torch.compile`

Every stage can run alone (`--stages`). It has its share of the limit, and the time that earlier
stages left. A kind of kernel that fails is named and left out of later stages. After each stage
`DIR/smoke.json` or `DIR/full.json` is replaced and holds all results so far; `cut_short` in it says
that time ran out. `DIR/smoke.log` or `DIR/full.log` holds all outputs. To show `full.json` in the
tables of the docs, copy it to `bench/results/gpu.json` and run `make pages`. The suite needs torch,
triton and numpy, pytest for the tests, and no installation of the project. `--rehearse` goes
through the same stages on a CPU, with Triton's interpreter and tiny sizes.

Exit code: 0 nothing failed, 1 something did, 2 no GPU or bad input.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

LIMITS = {"smoke": 180.0, "full": 450.0}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_suite.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("call", choices=LIMITS, help="smoke first, then full")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--limit", type=float, help="seconds in all; default: 180 or 450")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="default: all of the call")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    return parser


def refusal(rehearse: bool) -> str | None:
    """Reason why the suite cannot run here, or None."""
    if not importlib.util.find_spec("torch"):
        return "torch is not installed here"
    import torch

    if rehearse:
        return interpreter_refusal()
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use here; --rehearse runs on a CPU"
    return None


def interpreter_refusal() -> str | None:
    """Reason for no rehearsal, or None: Triton's interpreter before 3.7 fails with numpy 2.5."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = [version(name) for name in ("triton", "numpy")]
    except PackageNotFoundError as error:
        return f"{error} is not installed here, which a rehearsal needs"
    triton, numpy = (tuple(int(part) for part in text.split(".")[:2]) for text in found)
    if triton < (3, 7) and numpy >= (2, 5):
        return f"the interpreter of triton {found[0]} fails with numpy {found[1]}: no rehearsal"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; the module's docstring tells the exit codes."""
    arguments = build_parser().parse_args(argv)
    reason = refusal(arguments.rehearse)
    if reason:
        print(f"gpu_suite.py: {reason}", file=sys.stderr)
        return 2

    from bench.gpu import full, smoke

    stages = {"smoke": smoke.STAGES, "full": full.STAGES}[arguments.call]
    unknown = [name for name in arguments.stages or () if name not in stages]
    limit = arguments.limit or LIMITS[arguments.call]
    if unknown or not 0 < limit < 1e6:
        known = f"unknown {', '.join(unknown)}; known: {', '.join(stages)}"
        bad = known if unknown else f"--limit must be seconds above 0, got {limit}"
        print(f"gpu_suite.py: {bad}", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu_suite.py: {error}", file=sys.stderr)
        return 2
    names = [name for name in stages if name in (arguments.stages or stages)]
    return run(arguments.call, stages, names, out, limit, arguments.rehearse)


def run(
    call: str, stages: dict[str, Any], names: Sequence[str], out: Path, limit: float, rehearse: bool
) -> int:
    """Run the stages and print the summary; return 1 if a stage failed."""
    from bench.gpu.processes import Log, SuiteRun
    from bench.gpu.suite import final_lines, run_stages
    from bench.results import SCHEMA
    from negtome_fast import provenance

    results: dict[str, Any] = {"schema": SCHEMA, "call": call, **provenance.describe()}
    results |= {"rehearsal": rehearse, "limit_seconds": limit, "cut_short": False, "stages": {}}
    path = out / f"{call}.json"
    with tempfile.TemporaryDirectory() as work:
        setting = SuiteRun(out, Path(work), rehearse, Log(out / f"{call}.log"))
        run_stages(stages, names, setting, limit, results, path)
    print("\n".join(final_lines(results)))
    print(f"written to {path}" + (", cut short" if results["cut_short"] else ""))
    failed = [name for name, stage in results["stages"].items() if stage["failed_here"]]
    if failed:
        print(f"failed: {', '.join(failed)}")
    sys.stdout.flush()
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
