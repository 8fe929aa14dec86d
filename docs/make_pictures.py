"""`python -m docs.make_pictures [NAME ...]`: the pictures that the pages of docs/ show.

Runs the commands that the pages show, on the embedded model, and copies their sheets to
docs/pictures/. What the attribute reader sees goes to bench/results/pictures.json, and what the
nudging demonstration did to bench/results/eval/nudging-demo.json; then `make pages` writes both
into the pages.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import results
from bench._path import ROOT

PICTURES = ROOT / "docs" / "pictures"
RECORD = results.FOLDER / "pictures.json"
DEMONSTRATION = "nudging-demo"

Reading = dict[str, str]
Measure = Callable[[list[Reading], list[np.ndarray]], float]


@dataclass(frozen=True)
class Example:
    """A picture of docs/applications.md.

    Attributes:
        commands: `negtome-fast` with these words; the last one makes the sheet, in output/NAME.
        measure: (readings, images (H, W, 3) in [0, 1]) -> figure.
        says: name of the figure, with its unit.
        lower: True if guidance should make the figure smaller.
    """

    commands: tuple[str, ...]
    measure: Measure
    says: str
    lower: bool


def share(head: str, value: str) -> Measure:
    """Measure the share of images whose attribute `head` reads `value`."""

    def measure(readings: list[Reading], images: list[np.ndarray]) -> float:
        return sum(reading[head] == value for reading in readings) / len(readings)

    return measure


def diversity(readings: list[Reading], images: list[np.ndarray]) -> float:
    """Entropy of the open attributes, in nats."""
    from negtome_fast.studies.measures import attribute_entropy

    return attribute_entropy(readings)


def contrast(readings: list[Reading], images: list[np.ndarray]) -> float:
    """Mean difference of neighbouring pixels, in 256ths of the full scale."""
    grey = [image.mean(axis=2) * 255 for image in images]
    steps = [abs(np.diff(g, axis=axis)).mean() for g in grey for axis in (0, 1)]
    return float(np.mean(steps))


EXAMPLES: dict[str, Example] = {
    "diversity": Example(
        ('generate --preset diversity --prompt "a pixel art person" -n 6 --compare',),
        diversity,
        "entropy of skin, hair colour and hair shape, in nats",
        lower=False,
    ),
    "avoid": Example(
        (
            'generate --prompt "captain red" -n 2 --alpha 0 --seed 100 --output output/captain',
            'generate --preset avoid --prompt "captain red" -n 6 --compare '
            "--reference output/captain/guided-0-000.png",
        ),
        share("character", "captain red"),
        "share of the images that the reader takes for captain red",
        lower=True,
    ),
    "style": Example(
        (
            'generate --prompt "a voxel art person" -n 2 --alpha 0 --seed 100 '
            "--output output/voxel",
            'generate --preset style --prompt "a person with red hair" -n 6 --compare '
            "--reference output/voxel/guided-0-000.png",
        ),
        share("style", "voxel art"),
        "share of the images that the reader takes for voxel art",
        lower=True,
    ),
    "sharpen": Example(
        (
            'generate --preset sharpen --prompt "an adventurer person with long hair" '
            "-n 6 --compare",
        ),
        contrast,
        "mean difference of neighbouring pixels, in 256ths of the full scale",
        lower=False,
    ),
    "interpolate": Example(
        (
            'generate --prompt "a pixel art person with blue hair and dark skin" -n 2 --alpha 0 '
            "--seed 100 --output output/blue",
            'generate --preset interpolate --prompt "a pixel art person" -n 6 --compare '
            "--reference output/blue/guided-0-000.png",
        ),
        share("skin", "fair"),
        "share of the images with fair skin, which the reference has not",
        lower=True,
    ),
}


def commands(name: str) -> list[str]:
    """Commands of an example as its page shows them: the last one writes to output/NAME."""
    *before, last = EXAMPLES[name].commands
    return [f"negtome-fast {command}" for command in (*before, f"{last} --output output/{name}")]


def make(name: str) -> dict[str, Any]:
    """Run an example, keep its sheet, and return its entry of the record."""
    from negtome_fast.cli import main

    for command in commands(name):
        print(command, flush=True)
        if main([*shlex.split(command)[1:], "--quiet", "--overwrite"]):
            raise SystemExit(f"{command} failed")
    folder = Path("output") / name
    PICTURES.mkdir(exist_ok=True)
    shutil.copy(folder / "sheet.png", PICTURES / f"{name}.png")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    example = EXAMPLES[name]
    pushed = [summary["total"]["pushed"] for summary in record["summaries"]]
    return {
        "commands": commands(name),
        "measure": example.says,
        "lower_is_meant": example.lower,
        "images": record["settings"]["images"],
        "plain": figure(name, folder, "plain"),
        "guided": figure(name, folder, "guided"),
        "pushed": float(np.mean(pushed)),
    }


def figure(name: str, folder: Path, kind: str) -> float:
    """Measure the images of an example; `kind` is "plain" or "guided"."""
    from negtome_fast.models.reader import load_reader

    files = sorted(folder.glob(f"{kind}-*.png"))
    images = [np.asarray(Image.open(file).convert("RGB")) / 255 for file in files]
    batch = torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2) * 2 - 1
    return EXAMPLES[name].measure(load_reader()[0].read(batch), images)


def demonstrate() -> None:
    """Run `negtome-fast nudge`; keep its sheet, and as much of its record as the page shows."""
    from negtome_fast.cli import main

    if main(["nudge", "--quiet", "--overwrite", "--output", "output"]) == 2:
        raise SystemExit("negtome-fast nudge failed")
    shutil.copy("output/sheet.png", PICTURES / f"{DEMONSTRATION}.png")
    record = json.loads(Path("output/run.json").read_text(encoding="utf-8"))
    prompts = [
        {
            "prompt": one["prompt"],
            "flagged_before": one["flagged_before"],
            "flagged_after": one["flagged_after"],
            "attempts": [len(rows) for rows in one["attempts"]],
        }
        for one in record["prompts"]
    ]
    kept = {"filters": record["filters"], "versions": record["versions"], "prompts": prompts}
    results.save(results.FOLDER / "eval" / f"{DEMONSTRATION}.json", kept)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the named pictures, default all of them, and return 0."""
    names = (*EXAMPLES, DEMONSTRATION)
    parser = argparse.ArgumentParser(prog="python -m docs.make_pictures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    options = parser.parse_args(argv)
    unknown = set(options.names) - set(names)
    if unknown:
        parser.error(f"no picture {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for name in options.names or names:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            if name == DEMONSTRATION:
                demonstrate()
                continue
            made = make(name)
        record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        results.save(RECORD, record | {name: made})
        print(f"{name}: {made['plain']:.2f} -> {made['guided']:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
