"""`python -m bench end-to-end`: time that guidance adds to a step and to an image.

The denoiser runs without guidance, with ours, and with the authors' function in the same places, in
turns in one process on the same inputs. Differences are taken within a round; the median has an
interval. On a CPU the embedded model is timed; on a GPU also FLUX.1-dev, SDXL and Wan at full size
with random weights. Needs diffusers.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from negtome_fast import provenance

from .. import results
from ..compared import baselines
from ..compared.denoisers import WORKLOADS, Workload
from ..drawn import tables
from ..drawn.tables import METHODS
from ..timing import clock

if TYPE_CHECKING:
    from negtome_fast.guidance import Guidance

MIN_ROUNDS = 3
MAX_ROUNDS = 40


class AuthorsFunction:
    """The authors' function in place of `Guidance.apply`, without statistics."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance
        self.calls = 0

    def __call__(
        self, image_tokens: Tensor, *, block: str = "", grid: Any = None, **place: Any
    ) -> Tensor:
        guidance, step = self.guidance, self.guidance._step
        if step is None or not step.active:
            return image_tokens
        config = guidance.config
        if not guidance._includes_block(block) or not config.includes_grid(grid or step.grid):
            step.skipped_blocks += 1
            return image_tokens
        step.guided_blocks += 1
        self.calls += 1
        return baselines.authors(image_tokens, step.groups, config.alpha, config.threshold)


@contextmanager
def guided(workload: Workload, method: str) -> Iterator[Any]:
    """Apply a method to the workload's model; give the handle, or None without guidance."""
    if method == "without":
        yield None
        return
    from negtome_fast.pipelines import apply_negtome

    handle = apply_negtome(workload.model, workload.config)
    try:
        if method == "authors":
            vars(handle.guidance)["apply"] = AuthorsFunction(handle.guidance)
        yield handle
    finally:
        handle.remove()


def blocks_guided(handle: Any) -> int:
    """Number of attention outputs that were guided since guidance was applied."""
    replaced = vars(handle.guidance).get("apply")
    return int(replaced.calls if replaced else handle.summary().total.calls)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _sampler(
    workload: Workload, method: str, call: Callable[[], Any], device: torch.device, seen: Any
) -> clock.Sampler:
    """Sampler of one `call` under `method`, after a call that is not counted.

    The first call does what a run does once: it finds groups and image tokens, and allocates.
    """

    def sample() -> float:
        with guided(workload, method) as handle, torch.no_grad():
            call()
            taken = _seconds(call, device)
            if handle is not None:
                seen[method] = blocks_guided(handle) // 2
                if method == "ours":
                    seen["pushed"] = handle.summary().total.pushed
        return taken

    return sample


def added(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds of each method, and its difference to the same round without guidance."""
    plain = samples["without"]
    found: dict[str, Any] = {}
    for method, taken in samples.items():
        found[method] = {"seconds": clock.summarize(taken).as_dict()}
        if method != "without":
            pairs = list(zip(taken, plain, strict=True))
            found[method]["added_seconds"] = clock.median_interval([a - b for a, b in pairs])
            found[method]["added_share"] = clock.median_interval([a / b - 1 for a, b in pairs])
    return found


def _timed(
    workload: Workload,
    call: Callable[[], Any],
    methods: Sequence[str],
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    samplers = {name: _sampler(workload, name, call, device, seen) for name in methods}
    samples = clock.interleave(samplers, seconds, MIN_ROUNDS, MAX_ROUNDS)
    for method in methods:
        if method != "without" and not seen[method]:
            raise RuntimeError(f"{workload.name}: {method} guided no block")
    return added(samples) | {"blocks": seen.get("ours"), "pushed": seen.get("pushed")}


def _peaks(workload: Workload, call: Callable[[], Any], methods: Sequence[str]) -> dict[str, int]:
    """Peak CUDA memory of one call under each method, minus the memory in use before it."""
    peaks = {}
    for method in methods:
        with guided(workload, method), torch.no_grad():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            peaks[method] = torch.cuda.max_memory_allocated() - before
    return peaks


def measure(
    workload: Workload,
    device: torch.device,
    seconds: float,
    methods: Sequence[str] = METHODS,
) -> dict[str, Any]:
    """Measure a step inside the window and a whole run, which may be added up from its steps."""

    def step() -> Any:
        return workload.forward(workload.guided_timestep)

    whole = workload.run
    share = 0.3 if whole else 1.0
    result: dict[str, Any] = {
        "name": workload.name,
        "images": workload.images,
        "steps": len(workload.timesteps),
        "guided_steps": workload.guided_steps,
        "config": workload.config.to_dict(),
        # A pipeline knows its step only inside a run.
        "step": _timed(_bare(workload), step, methods, seconds * share, device),
    }
    if device.type == "cuda":
        result["step"]["extra_bytes"] = _peaks(_bare(workload), step, methods)
    if whole:
        result["run"] = _timed(workload, whole, methods, seconds * (1 - share), device)
        result["run"]["measured"] = True
    else:
        result["run"] = added_up(result["step"], result["steps"], result["guided_steps"])
    return result


def _bare(workload: Workload) -> Workload:
    """The workload with the denoiser instead of its pipeline."""
    model = getattr(workload.model, "transformer", workload.model)
    config = workload.config if workload.config.groups else workload.config.with_overrides(groups=1)
    return Workload(
        workload.name, model, workload.forward, config, workload.timesteps, workload.images
    )


def added_up(step: dict[str, Any], steps: int, guided_steps: int) -> dict[str, Any]:
    """Times of a run, added up from equal steps and the time added to each step in the window.

    Text encoders and the VAE are left out, so the shares are a little too large.
    """
    run: dict[str, Any] = {"measured": False}
    for method, figures in step.items():
        if method not in METHODS:
            continue
        run[method] = {}
        if method != "without":
            run[method] = {
                "added_seconds": {
                    key: value if key in ("rounds", "confidence") else value * guided_steps
                    for key, value in figures["added_seconds"].items()
                },
                "added_share": {
                    key: value if key in ("rounds", "confidence") else value * guided_steps / steps
                    for key, value in figures["added_share"].items()
                },
            }
    run["without"]["seconds"] = {"median": step["without"]["seconds"]["median"] * steps}
    return run


def lines(model: dict[str, Any]) -> list[str]:
    """Text of one model's measurement."""
    head = (
        f"{model['name']}: {model['images']} images, {model['guided_steps']} of {model['steps']} "
        f"steps in the window, {model['step']['blocks']} blocks guided in each"
    )
    peaks = model["step"].get("extra_bytes", {})
    rows = [
        [*cells, tables.memory_text(peaks.get(method))]
        for method, cells in tables.method_rows(model)
    ]
    header = ["", "a step", "added to it", "", "added to an image", "", "extra peak"]
    how = "timed" if model["run"]["measured"] else "added up from the steps"
    table = tables.aligned([header, *rows])
    return [head, *table, f"  (the whole run is {how}; medians [interval])", ""]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=WORKLOADS,
        help="default: embedded on a CPU; flux, sdxl, wan, embedded on a GPU",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--seconds", type=float, default=40.0, help="time of a model; default: 40")
    parser.add_argument("--deadline", type=float, help="begin no model after this time, in seconds")
    parser.add_argument("--tiny", action="store_true", help="rehearse with models of kilobytes")
    parser.add_argument("--name", help="the result is bench/results/NAME.json")
    parser.add_argument("--out", type=Path, help="the JSON file to write instead")
    return parser


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    names = arguments.models or (["flux", "sdxl", "wan", "embedded"] if on_gpu else ["embedded"])
    if not on_gpu and not arguments.tiny and set(names) - {"embedded"}:
        raise ValueError(f"{', '.join(names)}: full size needs a GPU; --tiny rehearses on a CPU")
    result = {"schema": results.SCHEMA, **provenance.describe(), "device": device.type}
    result |= {"tiny": arguments.tiny, "models": [], "skipped": {}}
    if not on_gpu:
        result["gpu"] = None
    name = arguments.name or f"end-to-end-{'gpu' if on_gpu else 'cpu'}"
    out = arguments.out or results.FOLDER / f"{name}.json"
    print(tables.machine_line(result) + "\n")
    started = time.perf_counter()
    for name in names:
        if arguments.deadline and time.perf_counter() - started > arguments.deadline:
            result["skipped"][name] = f"the deadline of {arguments.deadline:.0f} s is over"
        else:
            try:
                workload = WORKLOADS[name](device, dtype, tiny=arguments.tiny)
                model = measure(workload, device, arguments.seconds)
                result["models"].append(model)
                print("\n".join(lines(model)), flush=True)
                del workload
            except Exception as error:
                # One model must not end the run: memory or diffusers may not allow it.
                result["skipped"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
            _release(device)
        if name in result["skipped"]:
            print(f"{name}: skipped: {result['skipped'][name]}\n", flush=True)
        results.save(out, result)
    print(f"written to {out}")
    return result


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench end-to-end") -> int:
    """Return 0, 1 if no model could be measured, 2 for bad input."""
    arguments = build_parser(prog).parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(f"{prog}: there is no CUDA device here", file=sys.stderr)
        return 2
    try:
        import diffusers  # noqa: F401

        result = run(arguments)
    except ModuleNotFoundError as error:
        print(f"{prog}: {error.name} is missing: pip install 'negtome-fast[demo]'", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 0 if result["models"] else 1
