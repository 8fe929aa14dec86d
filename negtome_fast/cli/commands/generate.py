"""`negtome-fast generate`: guided images or videos of any diffusers model, and a record."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..options import (
    OfReference,
    add_call_argument,
    add_files,
    add_loading,
    one_line_warnings,
    printable,
    reference_file,
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="guided images of any diffusers text-to-image or text-to-video model",
        description="Images or videos with guidance, a labelled sheet, and run.json, from which "
        "--from repeats the run. Values that are not given are the model's or the preset's.",
        argument_default=argparse.SUPPRESS,
    )
    _add_images(parser.add_argument_group("what is made"))
    guidance = parser.add_argument_group("guidance")
    _add_references(guidance)
    _add_guidance(guidance)
    machine = parser.add_argument_group("machine and files")
    add_loading(machine)
    add_files(machine)


def _add_images(group: Any) -> None:
    add = group.add_argument
    add("--from", type=Path, metavar="RUN.JSON", help="repeat a run; other options replace values")
    add(
        "--trust-paths",
        action="store_true",
        help="with --from: also read references that lie outside of the record's folder",
    )
    add("--model", help="folder or Hub id; default: the embedded tiny-flux-avatars")
    add("--prompt", action="append", dest="prompts", help="may be repeated")
    add("-n", "--images", type=int, help="images of each prompt, default 4")
    add("--seed", type=int, help="seed of the first image, default 0")
    add("--negative-prompt")
    add("--guidance-scale", type=float, help="scale of classifier-free guidance")
    add("--true-cfg-scale", type=float, help="guidance scale of distilled models")
    add("--steps", type=int, help="steps of the scheduler")
    add("--height", type=int, help="pixels")
    add("--width", type=int, help="pixels")
    add("--frames", type=int, help="frames of a video")
    add("--fps", type=int, help="frames per second of a video file, default 16")
    add_call_argument(group)
    add(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="also without guidance, from the same seeds",
    )


def _add_references(group: Any) -> None:
    add = group.add_argument
    add("--preset", help="diversity, avoid, style, sharpen or interpolate")
    add(
        "--reference",
        action=OfReference,
        dest="image",
        metavar="IMAGE",
        help="push away from this image; may be repeated",
    )
    add(
        "--mask",
        action=OfReference,
        metavar="IMAGE",
        help="white where the reference before it may be matched",
    )
    add(
        "--reference-alpha",
        action=OfReference,
        dest="alpha_of",
        type=float,
        help="alpha of the reference before it",
    )
    add(
        "--reference-threshold",
        action=OfReference,
        dest="threshold_of",
        type=float,
        help="threshold of the reference before it",
    )
    add(
        "--clean-reference",
        action=OfReference,
        dest="noise",
        nargs=0,
        help="add no noise to the reference before it",
    )
    add(
        "--in-batch",
        choices=("first", "others"),
        dest="reference",
        help="without --reference: push away from the first image or from all others",
    )


def _add_guidance(group: Any) -> None:
    add = group.add_argument
    add("--alpha", type=float, help="strength; negative pulls toward")
    add("--threshold", type=float, help="cosine similarity of a match")
    add("--t-start", type=float, help="first timestep of the window, 1000: noise")
    add("--t-end", type=float, help="last timestep of the window")
    add(
        "--steps-window",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="the window in fractions of the steps instead",
    )
    add("--first-steps", type=int, help="the window as a number of steps instead")
    add("--matching", choices=("paper", "official"))
    add("--combine", choices=("nearest", "sum"), help="how several references are combined")
    add("--placement", choices=("output", "pre_projection"))
    add("--dropout", type=float)
    add("--blocks", action="append", help="blocks of the model to guide; may be repeated")
    add("--exclude-blocks", action="append")
    add("--groups", type=int, help="groups in each guidance part; default: one for each prompt")
    add("--backend", choices=("auto", "triton", "torch", "reference"))
    add("--blur", type=float, help="blur of the drafts of --preset sharpen, default 2")


def run(options: argparse.Namespace) -> int:
    from ... import generation

    values = {name: value for name, value in vars(options).items() if name != "command"}
    record, folder = values.pop("from", None), values.pop("output", None)
    overwrite, quiet = values.pop("overwrite", False), values.pop("quiet", False)
    guidance = generation.take_guidance(values)
    for name, kind in (("prompts", tuple), ("call", dict)):
        if name in values:
            values[name] = kind(values[name])
    if "references" in values:
        values["references"] = tuple(reference_file(entry) for entry in values["references"])
    trusted = values.pop("trust_paths", False)
    if record is None:
        settings = generation.Settings(**values, guidance=guidance)
    else:
        settings = generation.Settings.from_record(
            record, trust_paths=trusted, **values, guidance=guidance
        )
    settings.check()
    with generation.numbered_folder(folder) as folder, one_line_warnings():
        try:
            result = generation.generate(settings, folder, overwrite=overwrite, progress=not quiet)
        except KeyboardInterrupt:
            if (folder / generation.RECORD).is_file():
                print(printable(f"what was finished is in {folder}"), file=sys.stderr)
            raise
    for summary in result.record["summaries"]:
        print(*generation.told(summary, result.record["warnings"]), sep="\n")
    print(printable(f"{len(result.record['files'])} files and {generation.RECORD} in {folder}"))
    return 0
