"""The command `negtome-fast`; bad input: one line, exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import __version__

DEBUG_VARIABLE = "NEGTOME_FAST_DEBUG"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="negtome-fast",
        description="Steer diffusion models away from images, at inference time.",
        epilog=f"{DEBUG_VARIABLE}=1 shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="generate with and without guidance on the embedded model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--prompt", action="append", help="may be repeated; default: four prompts")
    demo.add_argument("--seed", type=int, default=0, help="of the first image")
    demo.add_argument("-n", "--images", type=int, default=8, help="images for each prompt")
    demo.add_argument("--alpha", type=float, help="push strength")
    demo.add_argument("--threshold", type=float, help="cosine similarity")
    demo.add_argument("--t-start", type=float, help="first timestep of the window, 1000 is noise")
    demo.add_argument("--t-end", type=float, help="last timestep of the window")
    demo.add_argument("--reference", choices=("first", "others"))
    demo.add_argument("--matching", choices=("paper", "official"))
    demo.add_argument("--backend", choices=("auto", "triton", "torch", "reference"))
    demo.add_argument("--guidance-scale", type=float, help="of classifier-free guidance")
    demo.add_argument("--steps", type=int, default=20, help="of the scheduler")
    demo.add_argument("--output", type=Path, default=Path("output/demo.png"), help="the picture")

    _add_generate(commands)
    _add_web(commands)

    tune = commands.add_parser(
        "tune",
        help="search launch configurations on this GPU and write its tuning table",
        description="Measures on the current GPU; needs one, except with --dry-run.",
    )
    tune.add_argument(
        "--shapes", nargs="+", metavar="BxNxD[/GROUPS]", help="default: FLUX, SDXL, SD3 and Wan"
    )
    tune.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    tune.add_argument("--quick", action="store_true", help="only the most promising ones")
    tune.add_argument("--seconds", type=float, help="stop after these; fewer than 300: --quick")
    tune.add_argument("--out", type=Path, help="the table; default: that of the package")
    tune.add_argument("--dry-run", action="store_true", help="compile and list, measure nothing")
    tune.add_argument("--arch", help="of --dry-run, such as sm_90 (default) or gfx942")

    _add_export(commands)

    _add_eval(commands)

    from .nudge import add_parsers

    add_parsers(commands, _argument)

    info = commands.add_parser("info", help="versions, devices, and the backend that is used")
    info.add_argument("--kernels", action="store_true", help="compile every kernel and report")
    info.add_argument("--json", action="store_true", help="as JSON")

    # Its words and options are those of `python -m bench`, which has its own parsers.
    commands.add_parser(
        "bench",
        help="run benchmarks, compare and report results (needs a checkout of the repository)",
        add_help=False,
    )
    return parser


class _OfReference(argparse.Action):
    """An option that belongs to the reference before it; the one that begins one has dest image."""

    def __init__(self, *args: Any, begun_by: str = "--reference", **options: Any) -> None:
        super().__init__(*args, **options)
        self.begun_by = begun_by

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        references = [*getattr(namespace, "references", [])]
        if self.dest == "image":
            references.append({"image": values})
        elif not references:
            parser.error(f"{option} belongs to a {self.begun_by}, which must come first")
        else:
            references[-1] = {**references[-1], self.dest: values}
        namespace.references = references


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="guided images of any diffusers text-to-image or text-to-video model",
        description="Images or videos with guidance, a labelled sheet, and run.json, from which "
        "--from repeats the run. A value that is not given is the model's or the preset's own.",
        argument_default=argparse.SUPPRESS,
    )
    run = generate.add_argument_group("what is made")
    run.add_argument(
        "--from",
        type=Path,
        metavar="RUN.JSON",
        help="repeat a run; other options replace its values",
    )
    run.add_argument("--model", help="folder or Hub id; default: the embedded tiny-flux-avatars")
    run.add_argument("--prompt", action="append", dest="prompts", help="may be repeated")
    run.add_argument("-n", "--images", type=int, help="for each prompt, default 4")
    run.add_argument("--seed", type=int, help="of the first image, default 0")
    run.add_argument("--negative-prompt")
    run.add_argument("--guidance-scale", type=float, help="of classifier-free guidance")
    run.add_argument("--true-cfg-scale", type=float, help="the same for distilled models")
    run.add_argument("--steps", type=int, help="of the scheduler")
    run.add_argument("--height", type=int, help="pixels")
    run.add_argument("--width", type=int, help="pixels")
    run.add_argument("--frames", type=int, help="of a video")
    run.add_argument("--fps", type=int, help="frames per second of a video file, default 16")
    run.add_argument(
        "--argument",
        action="append",
        type=_argument,
        dest="call",
        metavar="NAME=VALUE",
        help="any other argument of the pipeline",
    )
    run.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="also without guidance, from the same seeds",
    )

    guidance = generate.add_argument_group("guidance")
    guidance.add_argument("--preset", help="diversity, avoid, style, sharpen or interpolate")
    guidance.add_argument(
        "--reference",
        action=_OfReference,
        dest="image",
        metavar="IMAGE",
        help="push away from this image; may be repeated",
    )
    of_reference = {"action": _OfReference}
    guidance.add_argument(
        "--mask",
        **of_reference,
        metavar="IMAGE",
        help="white: what of the reference before may be matched",
    )
    guidance.add_argument(
        "--reference-alpha",
        **of_reference,
        dest="alpha_of",
        type=float,
        help="of the reference before",
    )
    guidance.add_argument(
        "--reference-threshold",
        **of_reference,
        dest="threshold_of",
        type=float,
        help="of the reference before",
    )
    guidance.add_argument(
        "--clean-reference",
        **of_reference,
        dest="noise",
        nargs=0,
        help="the reference before is not noised",
    )
    guidance.add_argument(
        "--in-batch",
        choices=("first", "others"),
        dest="reference",
        help="without --reference: away from the first or all others",
    )
    guidance.add_argument("--alpha", type=float, help="strength; negative pulls toward")
    guidance.add_argument("--threshold", type=float, help="cosine similarity of a match")
    guidance.add_argument("--t-start", type=float, help="first timestep of the window, 1000: noise")
    guidance.add_argument("--t-end", type=float, help="last timestep of the window")
    guidance.add_argument(
        "--steps-window",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="the window in fractions of the steps instead",
    )
    guidance.add_argument("--matching", choices=("paper", "official"))
    guidance.add_argument("--combine", choices=("nearest", "sum"), help="of several references")
    guidance.add_argument("--placement", choices=("output", "pre_projection"))
    guidance.add_argument("--dropout", type=float)
    guidance.add_argument("--blocks", action="append", help="of the model; may be repeated")
    guidance.add_argument("--exclude-blocks", action="append")
    guidance.add_argument("--groups", type=int, help="of the batch; default: found by itself")
    guidance.add_argument("--backend", choices=("auto", "triton", "torch", "reference"))
    guidance.add_argument("--blur", type=float, help="of the drafts of --preset sharpen, default 2")

    machine = generate.add_argument_group("machine and files")
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    machine.add_argument("--device", help="default: a GPU if there is one")
    machine.add_argument("--offload", choices=("model", "sequential", "group"))
    machine.add_argument("--vae-tiling", action=argparse.BooleanOptionalAction)
    machine.add_argument("--revision", help="of the model on the Hub")
    machine.add_argument("--variant", help="of the model's files, such as fp16")
    machine.add_argument("--output", type=Path, help="folder; default: output/run-NNN")
    machine.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    machine.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="compile the kernels for programs without Python; needs no GPU",
        description="Kernels, a C header that launches them, and a description in JSON: "
        "docs/export.md. The options fix what negtome_fast.negtome chooses at run time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    export.add_argument("--target", required=True, help="sm_80, sm_89, sm_90, sm_100 or gfx942")
    export.add_argument("--dtype", required=True, help="bf16, fp16 or fp32")
    export.add_argument("--channels", required=True, type=int, help="of the tokens")
    export.add_argument("--reference", choices=("first", "others", "external"), default="first")
    export.add_argument("--matching", choices=("paper", "official"), default="paper")
    export.add_argument("--combine", choices=("nearest", "sum"), default="nearest")
    export.add_argument("--inplace", action="store_true", help="write into the tokens")
    export.add_argument("--reference-mask", action="store_true", help="calls hand over one")
    export.add_argument("--source-mask", action="store_true", help="calls hand over one")
    export.add_argument(
        "--kind",
        choices=("auto", "rows", "tiles"),
        default="auto",
        help="how to launch; auto: as the tuning table says for --items of --tokens",
    )
    export.add_argument("--items", type=int, default=4, help="of the batch")
    export.add_argument("--tokens", type=int, default=4096, help="of an item")
    export.add_argument("--assembly", action="store_true", help="also write PTX or AMD assembly")
    export.add_argument("--out", type=Path, default=Path("output/export"), help="folder")


def export_command(options: argparse.Namespace) -> int:
    from ..integrations import export

    values = {f.name: getattr(options, f.name) for f in fields(export.Operator)}
    for path in export.export(export.Operator(**values), options.out, options.assembly):
        print(path)
    return 0


def _add_web(commands: Any) -> None:
    web = commands.add_parser(
        "web",
        help="a page in the browser: images without and with guidance",
        argument_default=argparse.SUPPRESS,
    )
    web.add_argument("--model", help="folder or Hub id; default: the embedded tiny-flux-avatars")
    web.add_argument("--host", help="address to listen at; default 127.0.0.1, this machine alone")
    web.add_argument("--port", type=int, help="default 7860; 0: a free one")
    web.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    web.add_argument("--device", help="default: a GPU if there is one")
    web.add_argument("--offload", choices=("model", "sequential", "group"))
    web.add_argument("--vae-tiling", action=argparse.BooleanOptionalAction)
    web.add_argument("--revision", help="of the model on the Hub")
    web.add_argument("--variant", help="of the model's files, such as fp16")


def web_command(options: argparse.Namespace) -> int:
    from .. import generation
    from . import web

    values = {name: value for name, value in vars(options).items() if name != "command"}
    place = {name: values.pop(name) for name in ("host", "port") if name in values}
    web.serve(generation.Settings(**values), **place)
    return 0


def _add_eval(commands: Any) -> None:
    names = (
        *("diversity", "conventions", "hyperparameters", "rivals", "protected", "applications"),
        *("nudging", "nudging-cost", "overheads"),
    )
    evaluation = commands.add_parser(
        "eval",
        help="studies of what guidance does to the embedded model, with intervals",
        description="Draws, measures, and writes a JSON file with every sample's scores, a table "
        "and figures. A run that is interrupted goes on where it was. 'report' makes one HTML page "
        "of the results in --out. 'own' measures a model of yours, on your prompts.",
    )
    evaluation.add_argument("study", choices=(*names, "own", "report"))
    evaluation.add_argument(
        "--samples", type=int, metavar="N", help="images of each condition; default: the study's"
    )
    evaluation.add_argument("--quick", action="store_true", help="a rehearsal with a few images")
    evaluation.add_argument(
        "--out",
        type=Path,
        default=Path("output/evaluation"),
        help="folder of the results, default: %(default)s",
    )
    evaluation.add_argument(
        "--store",
        type=Path,
        default=Path("output/eval"),
        help="folder of what was drawn, for all studies, default: %(default)s",
    )
    evaluation.add_argument("--threads", type=int, help="of torch, default: 1; own: torch's")
    _add_own(evaluation)


def _add_own(evaluation: argparse.ArgumentParser) -> None:
    own = evaluation.add_argument_group(
        "own",
        "every prompt without and with guidance from the same seeds, on any model; several values "
        "of an option, and a negative prompt, multiply the conditions",
    )

    def add(*names: str, **options: Any) -> None:
        # Absent where not given, so that another study can refuse them.
        own.add_argument(*names, default=argparse.SUPPRESS, **options)

    add("--model", help="folder or Hub id; needed")
    add("--prompt", action="append", dest="prompts", help="may be repeated; needed")
    add("-n", "--images", type=int, help="for each prompt, default 8")
    add("--group", type=int, help="images of a prompt that are guided together, default 4")
    add("--seed", type=int, help="of the first image, default 0")
    add("--metric", nargs="+", dest="metrics", help="embedded (default), dreamsim, clip, lpips")
    add("--guidance-scale", nargs="+", type=float, dest="scales", help="one or several")
    add("--true-cfg-scale", type=float, help="the same for distilled models, one value")
    add("--negative-prompt", metavar="TEXT", help="draw all without and with it")
    add("--alpha", nargs="+", type=float, help="strengths; negative pulls toward")
    add("--threshold", nargs="+", type=float, help="cosine similarities of a match")
    add("--reference", nargs="+", choices=("first", "others"), help="away from which of a group")
    add("--t-start", type=float, help="first timestep of the window, 1000: noise")
    add("--t-end", nargs="+", type=float, help="last timesteps of the window")
    add(
        "--steps-window",
        action="append",
        nargs=2,
        type=float,
        metavar=("START", "END"),
        help="fractions instead; may be repeated",
    )
    of_reference: dict[str, Any] = {"action": _OfReference, "begun_by": "--avoid"}
    add("--avoid", **of_reference, dest="image", metavar="IMAGE", help="in place of --reference")
    add("--mask", **of_reference, metavar="IMAGE", help="white: what of it may be matched")
    add("--clean-reference", **of_reference, dest="noise", nargs=0, help="it is not noised")
    add("--sharpen", type=float, metavar="BLUR", help="away from each image's own blurred draft")
    add("--steps", type=int, help="of the scheduler")
    add("--height", type=int, help="pixels")
    add("--width", type=int, help="pixels")
    add("--argument", action="append", type=_argument, dest="call", metavar="NAME=VALUE")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--device", help="default: a GPU if there is one")
    add("--offload", choices=("model", "sequential", "group"))


def eval_command(options: argparse.Namespace) -> int:
    import torch

    from ..studies import report
    from ..studies.sampler import Laboratory
    from ..studies.studies import STUDIES, own
    from ..studies.studies.study import Run, Sizes, perform

    common = {"command", "study", "samples", "quick", "out", "store", "threads"}
    of_own = {name: value for name, value in vars(options).items() if name not in common}
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    if options.study == "own":
        if options.quick or options.samples is not None:
            raise ValueError("eval own takes -n images for each prompt, not --samples or --quick")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if "references" in of_own:
            of_own["references"] = tuple(_reference(entry) for entry in of_own["references"])
        with warnings.catch_warnings():
            warnings.showwarning = _one_line_warning
            result = own.perform(own.request(of_own), options.out, options.store)
        print(f"{own.table(result)}\n{own.NAME}.json, figure and images in {options.out}")
        return 0
    if of_own:
        raise ValueError(f"{', '.join(of_own)}: options of eval own, not of {options.study}")
    if options.study == "report":
        print(f"written to {report.write(options.out)}")
        return 0
    if options.quick and options.samples is not None:
        raise ValueError("--quick has a number of samples of its own")
    study = STUDIES[options.study]
    sizes = Sizes.rehearsal() if options.quick else Sizes(options.samples or study.images)
    torch.set_num_threads(options.threads or 1)
    result = perform(study, Run(Laboratory(options.store), sizes, options.out))
    print(study.table(result))
    print(f"figures and {study.name}.json in {options.out}")
    return 0


def generate_command(options: argparse.Namespace) -> int:
    from .. import generation

    values = {name: value for name, value in vars(options).items() if name != "command"}
    record, folder = values.pop("from", None), values.pop("output", None)
    overwrite, quiet = values.pop("overwrite", False), values.pop("quiet", False)
    guidance = generation.take_guidance(values)
    for name, kind in (("prompts", tuple), ("call", dict)):
        if name in values:
            values[name] = kind(values[name])
    if "references" in values:
        values["references"] = tuple(_reference(entry) for entry in values["references"])
    if record is None:
        settings = generation.Settings(**values, guidance=guidance)
    else:
        settings = generation.Settings.from_record(record, **values, guidance=guidance)
    folder = folder or generation.new_folder()
    with warnings.catch_warnings():
        warnings.showwarning = _one_line_warning
        try:
            result = generation.generate(settings, folder, overwrite=overwrite, progress=not quiet)
        except KeyboardInterrupt:
            if (folder / generation.RECORD).is_file():
                print(f"what was finished is in {folder}", file=sys.stderr)
            raise
    for summary in result.record["summaries"]:
        total = summary["total"]
        print(
            f"guided {summary['guided']} of {summary['forwards']} model forwards: "
            f"{total['matched']:.1%} of the tokens matched, {total['pushed']:.1%} pushed, "
            f"mean similarity {total['similarity']:.3f}"
        )
    print(f"{len(result.record['files'])} files and {generation.RECORD} in {folder}")
    return 0


def _reference(entry: dict[str, Any]) -> Any:
    from ..generation import ReferenceFile

    renamed = {"alpha_of": "alpha", "threshold_of": "threshold"}
    values = {renamed.get(name, name): value for name, value in entry.items()}
    if "noise" in values:
        values["noise"] = False
    return ReferenceFile(**values)


def _one_line_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"negtome-fast: warning: {message}".replace("\n", " "), file=sys.stderr)


def nudge_command(options: argparse.Namespace) -> int:
    from . import nudge

    with warnings.catch_warnings():
        warnings.showwarning = _one_line_warning
        return nudge.nudge_command(options)


def bank_command(options: argparse.Namespace) -> int:
    from . import nudge

    with warnings.catch_warnings():
        warnings.showwarning = _one_line_warning
        return nudge.bank_command(options)


def demo_command(options: argparse.Namespace) -> int:
    from ..models import GUIDANCE_SCALE
    from ..studies import demo

    names = ("alpha", "threshold", "t_start", "t_end", "reference", "matching", "backend")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    if options.output.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, got {options.output}")
    results = demo.run(
        prompts=options.prompt or demo.PROMPTS,
        config=demo.CONFIG.with_overrides(**chosen),
        seed=options.seed,
        count=options.images,
        output=options.output,
        guidance_scale=GUIDANCE_SCALE if options.guidance_scale is None else options.guidance_scale,
        steps=options.steps,
    )
    print(demo.table(results))
    print(f"picture: {options.output}, figures: {options.output.with_suffix('.json')}")
    return 0


def info_command(options: argparse.Namespace) -> int:
    from . import info

    if options.kernels:
        from ..tuner import compile_report

        rows = compile_report.report()
        print(json.dumps(rows, indent=1) if options.json else compile_report.table(rows))
        return int(any(compile_report.problems(row) for row in rows))
    print(json.dumps(info.collect(), indent=1) if options.json else info.text())
    return 0


def bench_command(arguments: Sequence[str]) -> int:
    """`python -m bench` of the checkout that this package is installed from (`pip install -e`)."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        raise RuntimeError(
            "the benchmarks are not part of the installed package; in a checkout of the "
            "repository: pip install -e . and this command, or python -m bench"
        )
    # First, so that no other module of that name is found.
    sys.path.insert(0, str(root))
    from bench.__main__ import main as bench_main

    return bench_main(arguments, prog="negtome-fast bench")


def tune_command(options: argparse.Namespace) -> int:
    from ..kernels import aot
    from ..tuner import run as tune
    from ..tuner.space import SHAPES, parse_shape

    shapes = [parse_shape(text) for text in options.shapes or ()] or list(SHAPES)
    if options.dry_run:
        arch = options.arch or "sm_90"
        if arch not in aot.TARGETS:
            raise ValueError(f"--arch must be one of {', '.join(aot.TARGETS)}, got {arch!r}")
        print(tune.dry_run(shapes, options.dtype, arch, options.quick))
        return 0
    if options.arch:
        raise ValueError("--arch is for --dry-run; tuning is for the GPU that measures")

    def say(line: str) -> None:
        print(line, flush=True)

    path = tune.run(shapes, options.dtype, options.quick, options.out, options.seconds, say)
    print(f"written to {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a bad report, 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # What comes after "bench" is read by its own parsers.
    is_bench = arguments[:1] == ["bench"]
    options = build_parser().parse_args(arguments[:1] if is_bench else arguments)
    try:
        if is_bench:
            return bench_command(arguments[1:])
        run = {
            "demo": demo_command,
            "generate": generate_command,
            "web": web_command,
            "tune": tune_command,
            "eval": eval_command,
            "nudge": nudge_command,
            "bank": bank_command,
            "export": export_command,
            "info": info_command,
        }
        return run[options.command](options)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"negtome-fast: error: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("negtome-fast: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
