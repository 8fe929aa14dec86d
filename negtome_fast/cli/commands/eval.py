"""`negtome-fast eval`: studies of what guidance does to the embedded model, or to another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..options import OfReference, name_and_value, one_line_warnings, reference_file

STUDIES = (
    *("diversity", "conventions", "hyperparameters", "rivals", "protected", "applications"),
    *("nudging", "nudging-cost", "overheads"),
)

MOST_THREADS = 1024


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="studies of what guidance does to the embedded model, with intervals",
        description="Draws, measures, and writes a JSON file with every sample's scores, a table "
        "and figures. An interrupted run continues where it stopped. 'report' makes one HTML page "
        "of the results in --out. 'own' measures any model on your prompts.",
    )
    add = parser.add_argument
    add("study", choices=(*STUDIES, "own", "report"))
    add("--samples", type=int, metavar="N", help="images of each condition; default: the study's")
    add("--quick", action="store_true", help="a rehearsal with a few images")
    add(
        "--out",
        type=Path,
        default=Path("output/evaluation"),
        help="folder of the results, default: %(default)s",
    )
    add(
        "--store",
        type=Path,
        default=Path("output/eval"),
        help="folder of drawn images, shared by all studies, default: %(default)s",
    )
    add("--threads", type=int, help="threads of torch, default: 1; own: torch's default")
    _add_own(parser)


def _add_own(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group(
        "own",
        "every prompt without and with guidance from the same seeds, on any model; several values "
        "of an option, and a negative prompt, multiply the conditions",
    )

    def add(*names: str, **options: Any) -> None:
        # Absent where not given, so that another study can refuse them.
        own.add_argument(*names, default=argparse.SUPPRESS, **options)

    add("--model", help="folder or Hub id; needed")
    add("--prompt", action="append", dest="prompts", help="may be repeated; needed")
    add("-n", "--images", type=int, help="images of each prompt, default 8")
    add("--group", type=int, help="images of a prompt that are guided together, default 4")
    add("--seed", type=int, help="seed of the first image, default 0")
    add("--metric", nargs="+", dest="metrics", help="embedded (default), dreamsim, clip, lpips")
    add("--guidance-scale", nargs="+", type=float, dest="scales", help="one or several scales")
    add("--true-cfg-scale", type=float, help="guidance scale of distilled models, one value")
    add("--negative-prompt", metavar="TEXT", help="draw all without and with it")
    add("--alpha", nargs="+", type=float, help="strengths; negative pulls toward")
    add("--threshold", nargs="+", type=float, help="cosine similarities of a match")
    add("--reference", nargs="+", choices=("first", "others"), help="which images of a group")
    add("--t-start", type=float, help="first timestep of the window, 1000: noise")
    add("--t-end", nargs="+", type=float, help="last timesteps of the window")
    add(
        "--steps-window",
        action="append",
        nargs=2,
        type=float,
        metavar=("START", "END"),
        help="the window in fractions of the steps instead; may be repeated",
    )
    of_reference: dict[str, Any] = {"action": OfReference, "begun_by": "--avoid"}
    add("--avoid", **of_reference, dest="image", metavar="IMAGE", help="in place of --reference")
    add("--mask", **of_reference, metavar="IMAGE", help="white where the image may be matched")
    add(
        "--clean-reference", **of_reference, dest="noise", nargs=0, help="add no noise to the image"
    )
    add("--sharpen", type=float, metavar="BLUR", help="away from each image's own blurred draft")
    add("--steps", type=int, help="steps of the scheduler")
    add("--height", type=int, help="pixels")
    add("--width", type=int, help="pixels")
    add("--argument", action="append", type=name_and_value, dest="call", metavar="NAME=VALUE")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--device", help="default: a GPU if there is one")
    add("--offload", choices=("model", "sequential", "group"))


def run(options: argparse.Namespace) -> int:
    common = {"command", "study", "samples", "quick", "out", "store", "threads"}
    of_own = {name: value for name, value in vars(options).items() if name not in common}
    if options.threads is not None and not 1 <= options.threads <= MOST_THREADS:
        raise ValueError(f"--threads must be 1 to {MOST_THREADS}, got {options.threads}")
    if options.samples is not None and options.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {options.samples}")
    if options.study == "own":
        return _run_own(options, of_own)
    if of_own:
        raise ValueError(f"{', '.join(of_own)}: options of eval own, not of {options.study}")
    if options.study == "report":
        from ...studies import report

        with one_line_warnings():
            path = report.write(options.out)
        print(f"written to {path}")
        return 0
    return _run_study(options)


def _run_own(options: argparse.Namespace, values: dict[str, Any]) -> int:
    import torch

    from ...studies.studies import own

    if options.quick or options.samples is not None:
        raise ValueError("eval own takes -n images for each prompt, not --samples or --quick")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if "references" in values:
        values["references"] = tuple(reference_file(entry) for entry in values["references"])
    with one_line_warnings():
        result = own.perform(own.request(values), options.out, options.store)
    print(f"{own.table(result)}\n{own.NAME}.json, figure and images in {options.out}")
    return 0


def _run_study(options: argparse.Namespace) -> int:
    import torch

    from ...studies.sampler import Sampler
    from ...studies.studies import STUDIES
    from ...studies.studies.study import Sizes, StudyRun, perform

    if options.quick and options.samples is not None:
        raise ValueError("--quick has a number of samples of its own")
    study = STUDIES[options.study]
    try:
        sizes = Sizes.rehearsal() if options.quick else Sizes(options.samples or study.images)
    except ValueError as error:
        raise ValueError(f"--samples: {error}") from error
    torch.set_num_threads(options.threads or 1)
    with one_line_warnings():
        result = perform(study, StudyRun(Sampler(options.store), sizes, options.out))
    print(study.table(result))
    print(f"figures and {study.name}.json in {options.out}")
    return 0
