"""Commands of `negtome-fast eval own`, with the embedded model's folder as anybody's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from negtome_fast.cli import main
from negtome_fast.models import model_folder
from negtome_fast.studies.store import digest, load

PROMPTS = ("a pixel art person", "a voxel art person")
COMMAND = [
    *("eval", "own", "--model", str(model_folder())),
    *("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "-n", "4", "--group", "2"),
    *("--steps", "2", "--height", "64", "--width", "64", "--argument", "max_sequence_length=16"),
    *("--alpha", "0.9", "--threshold", "0.2", "--reference", "others", "--t-end", "0"),
    *("--device", "cpu", "--threads", "1"),
]
CONDITIONS = ["unguided", "negative prompt", "NegToMe", "NegToMe + negative prompt"]
"""All conditions with a reference and a negative prompt."""


def run(out: Path, *words: str, code: int = 0) -> None:
    assert main([*COMMAND, *words, "--out", str(out), "--store", str(out / "store")]) == code


def run_alone(out: Path, *words: str, store: Path | None = None, code: int = 0) -> dict[str, Any]:
    """One prompt, and no reference within the batch."""
    command = [*COMMAND[:5], PROMPTS[0], *COMMAND[8:]]
    at = command.index("--reference")
    del command[at : at + 2]
    where = ["--out", str(out), "--store", str(store or out / "store")]
    assert main([*command, *words, *where]) == code
    return json.loads((out / "own.json").read_text(encoding="utf-8")) if code == 0 else {}


def stored(out: Path, **parts: Any) -> list[np.ndarray]:
    """Images of the first group, of the conditions whose identity has these parts."""
    found = []
    for path in sorted((out / "store").rglob("condition.json")):
        identity = json.loads(path.read_text(encoding="utf-8"))
        identity |= {f"call {name}": value for name, value in identity["call"].items()}
        if all(identity.get(name) == value for name, value in parts.items()):
            name = digest([PROMPTS[0], 0, 1])
            found.append(load(path.with_name(f"{name}.npz"))["images"])
    return found
