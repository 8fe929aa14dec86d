"""A virtual environment that links a few distributions of this one, without downloads.

It links the files of these distributions and of all that they require. Editable installs, such as
this project, are not in it.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def required(names: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """Distributions by name, with all that they require here, without extras.

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
    """Name -> path of a distribution's files and folders directly in site-packages."""
    folder = Path(str(distribution.locate_file("")))
    names = {file.parts[0] for file in distribution.files or ()}
    # Scripts lie elsewhere; .pth files run code at every start of Python.
    names = {n for n in names if n not in ("..", "__pycache__") and not n.endswith(".pth")}
    return {name: folder / name for name in names if (folder / name).exists()}


def build(folder: Path, *names: str) -> Path:
    """Make the environment in `folder`, and return the path of its Python."""
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
