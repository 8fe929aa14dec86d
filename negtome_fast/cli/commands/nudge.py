"""`negtome-fast nudge`: images that filters pass, generated again where they are flagged."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..options import add_call_argument, add_files, add_loading, one_line_warnings, printable

METHODS = ("nudge", "negtome", "both", "reseed")
FILTERS = ("pixels", "latents", "features", "hash", "reader")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "nudge",
        help="images that filters pass: what they flag is generated again, steered away",
        description="Generates, judges, and generates again what a filter flags. Without "
        "arguments: the protected characters of the embedded model. Exit code 1: some images are "
        "still flagged after the last attempt.",
    )
    _add_images(parser.add_argument_group("what is made"))
    _add_steering(parser.add_argument_group("filters and steering"))
    machine = parser.add_argument_group("machine and files")
    add_loading(machine, tiling=False)
    add_files(machine)


def _add_images(group: Any) -> None:
    add = group.add_argument
    add("--model", help="folder or Hub id; default: the embedded tiny-flux-avatars")
    add("--prompt", action="append", dest="prompts", help="may be repeated")
    add("-n", "--images", type=int, default=4, help="images of each prompt, default 4")
    add("--seed", type=int, default=0, help="seed of the first image, default 0")
    add("--negative-prompt")
    add("--guidance-scale", type=float, help="scale of classifier-free guidance")
    add("--true-cfg-scale", type=float, help="guidance scale of distilled models")
    add("--steps", type=int, help="steps of the scheduler")
    add("--height", type=int, help="pixels")
    add("--width", type=int, help="pixels")
    add_call_argument(group)


def _add_steering(group: Any) -> None:
    add = group.add_argument
    add("--undesired", type=Path, metavar="DIR", help="images, or a bank")
    add("--desired", type=Path, metavar="DIR", help="images to steer toward, or a bank")
    add(
        "--filter",
        action="append",
        dest="filters",
        metavar="NAME:THRESHOLD",
        help=f"{', '.join(FILTERS)}; may be repeated, cheapest first; default: pixels:0.1, and "
        "reader:0.5 for the embedded model",
    )
    add("--method", choices=METHODS, default="nudge")
    add("--max-attempts", type=int, default=4, help="attempts at an image, the plain one included")


def run(options: argparse.Namespace) -> int:
    from ...generation import RECORD, Settings, numbered_folder
    from ...generation.nudged import NudgeRun, nudge_images

    given = {name: value for name, value in vars(options).items() if value is not None}
    values = {f.name: given[f.name] for f in fields(Settings) if f.name in given}
    values["prompts"] = tuple(values.get("prompts", ()))
    values["call"] = dict(values.get("call", ()))
    run = NudgeRun(
        Settings(**values),
        options.undesired,
        options.desired,
        tuple(options.filters or ()),
        options.method,
        options.max_attempts,
    )
    with numbered_folder(options.output) as folder, one_line_warnings():
        try:
            record = nudge_images(
                run, folder, overwrite=options.overwrite, progress=not options.quiet
            )
        except KeyboardInterrupt:
            if (folder / RECORD).is_file():
                print(printable(f"what was finished is in {folder}"), file=sys.stderr)
            raise
    for one in record["prompts"]:
        images = len(one["passed"])
        told = (
            f'"{one["prompt"]}": {one["flagged_before"]} of {images} flagged before, '
            f"{one['flagged_after']} after"
        )
        print(printable(told))
    print(printable(f"{len(record['files'])} files and {RECORD} in {folder}"))
    return int(any(one["flagged_after"] for one in record["prompts"]))
