"""A virtual environment with a few distributions of this one and nothing else, without downloads.

It holds links to the files of the distributions, and of all that they require; what is installed in
editable form here, this project above all, is not there.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def required(names: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """The distributions by name, and recursively what they require here, without extras.

    Raises:
        PackageNotFoundError: one of `names` is not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    wanted = list(names)
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        for text in found[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
    return found


def top_level(distribution: metadata.Distribution) -> dict[str, Path]:
    """Files and folders of a distribution directly in site-packages, by name."""
    folder = Path(str(distribution.locate_file("")))
    names = {file.parts[0] for file in distribution.files or ()}
    # Scripts lie elsewhere; .pth files run code in every start of Python.
    names = {n for n in names if n not in ("..", "__pycache__") and not n.endswith(".pth")}
    return {name: folder / name for name in names if (folder / name).exists()}


def build(folder: Path, *names: str) -> Path:
    """Makes the environment and returns its Python."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(folder)], check=True
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in required(names).values():
        for name, path in top_level(distribution).items():
            link = packages / name
            if not link.exists():
                link.symlink_to(path)
    return folder / "bin" / "python"
