"""`python docs/make_pictures.py [NAME ...]`: the pictures and figures of docs/applications.md.

Runs the commands that the page shows, on the embedded model, copies their sheets to docs/pictures/
and writes what the attribute reader sees between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.
With --check nothing is made: exits with 1 where the page's commands are not those of this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "applications.md"
PICTURES = DOCS / "pictures"

Reading = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A picture of the page.

    Attributes:
        commands: of `negtome-fast`; the last one makes the sheet, in output/NAME.
        measure: (readings, images (H, W, 3) in [0, 1]) -> figure.
        says: what the figure is, with its unit.
        lower: whether guidance should make it smaller.
    """

    commands: tuple[str, ...]
    measure: Callable[[list[Reading], list[np.ndarray]], float]
    says: str
    lower: bool


def share(head: str, value: str) -> Callable[[list[Reading], list[np.ndarray]], float]:
    def measure(readings: list[Reading], images: list[np.ndarray]) -> float:
        return sum(reading[head] == value for reading in readings) / len(readings)

    return measure


def diversity(readings: list[Reading], images: list[np.ndarray]) -> float:
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
    """As the page shows them: the last one writes to output/NAME."""
    *before, last = EXAMPLES[name].commands
    return [f"negtome-fast {command}" for command in (*before, f"{last} --output output/{name}")]


def shell(name: str) -> str:
    """The commands as a block of markdown, with long lines broken."""
    lines = [re.sub(r" (--(?:reference|output|compare)\b)", r" \\\n    \1", c, count=1)
             if len(c) > 90 else c for c in commands(name)]  # fmt: skip
    return "```bash\n" + "\n".join(lines) + "\n```"


def make(name: str) -> str:
    """Runs an example and returns its part of the page."""
    from negtome_fast.cli import main

    for command in commands(name):
        print(command, flush=True)
        if main([*shlex.split(command)[1:], "--quiet", "--overwrite"]):
            raise SystemExit(f"{command} failed")
    folder = Path("output") / name
    PICTURES.mkdir(exist_ok=True)
    shutil.copy(folder / "sheet.png", PICTURES / f"{name}.png")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    plain, guided = (figure(name, folder, kind) for kind in ("plain", "guided"))
    example = EXAMPLES[name]
    gained = plain - guided if example.lower else guided - plain
    words = (
        "the intended direction" if gained > 0 else "no change" if gained == 0 else "the other way"
    )
    pushed = np.mean([summary["total"]["pushed"] for summary in record["summaries"]])
    return (
        f"{shell(name)}\n\n![{name}](pictures/{name}.png)\n\n"
        f"Measured on these {record['settings']['images']} images: {example.says}: "
        f"{plain:.2f} without guidance, {guided:.2f} with it ({words}); {pushed:.0%} of the tokens "
        "in the window were pushed."
    )


def figure(name: str, folder: Path, kind: str) -> float:
    from negtome_fast.models.reader import load_reader

    files = sorted(folder.glob(f"{kind}-*.png"))
    images = [np.asarray(Image.open(file).convert("RGB")) / 255 for file in files]
    batch = torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2) * 2 - 1
    return EXAMPLES[name].measure(load_reader()[0].read(batch), images)


def replaced(page: str, name: str, body: str) -> str:
    pattern = rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)"
    if not re.search(pattern, page, re.DOTALL):
        raise SystemExit(f"{PAGE.name} has no place for {name}")
    return re.sub(pattern, lambda found: f"{found[1]}{body}\n{found[2]}", page, flags=re.DOTALL)


def problems(page: str) -> list[str]:
    """What of the page is not this file's: commands and pictures."""
    found = [f"{name}: its commands" for name in EXAMPLES if shell(name) not in page]
    found += [
        f"{name}: its picture" for name in EXAMPLES if not (PICTURES / f"{name}.png").is_file()
    ]
    return found


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python docs/make_pictures.py", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXAMPLES))
    parser.add_argument("--check", action="store_true", help="make nothing")
    options = parser.parse_args(argv)
    unknown = set(options.names) - EXAMPLES.keys()
    if unknown:
        parser.error(f"no example {', '.join(sorted(unknown))}; there are {', '.join(EXAMPLES)}")
    if options.check:
        wrong = problems(PAGE.read_text(encoding="utf-8"))
        for line in wrong:
            print(f"{PAGE.name}: {line}: run make pictures", file=sys.stderr)
        return int(bool(wrong))
    for name in options.names or EXAMPLES:
        with tempfile.TemporaryDirectory() as folder, inside(folder):
            body = make(name)
        page = replaced(PAGE.read_text(encoding="utf-8"), name, body)
        PAGE.write_text(page, encoding="utf-8")
        print(body.split("\n\n")[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
