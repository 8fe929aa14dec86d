"""Packaging: every module and data file is installed, and only pinned versions are."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def files_in(folder: Path) -> set[Path]:
    return {
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_a_normal_install_has_every_module_and_data_file(tmp_path: Path) -> None:
    built = tmp_path / "built"
    command = [sys.executable, str(ROOT / "setup.py"), "-q", "build_py", "--build-lib", str(built)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    package, kernels = built / "negtome_fast", built / "negtome_fast" / "kernels"
    assert files_in(kernels) == files_in(ROOT / "kernels")
    without_kernels = {path for path in files_in(package) if path.parts[0] != "kernels"}
    assert without_kernels == files_in(ROOT / "negtome_fast")
    assert [path.name for path in built.iterdir()] == ["negtome_fast"]


def test_every_dependency_that_tests_run_on_is_pinned() -> None:
    try:
        required = metadata.requires("negtome-fast") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the project is not installed here")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins)
    pinned = {canonical(name) for name, _ in pins}
    # Extras outside of "all" need what cannot be installed beside it.
    tested = [line for line in required if "extra ==" not in line or 'extra == "all"' in line]
    assert len(tested) > 10
    wanted = {canonical(re.match(r"[\w.-]+", line).group()) for line in tested}  # type: ignore[union-attr]
    assert wanted <= pinned
    assert "torchvision" not in pinned


def test_the_folder_of_kernels_is_not_taken_for_the_package_of_that_name() -> None:
    # diffusers and transformers ask for the version of a module `kernels`; from the root of a
    # checkout they find this folder, which must not answer.
    import negtome_fast.kernels

    assert not hasattr(negtome_fast.kernels, "__version__")
