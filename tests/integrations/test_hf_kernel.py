"""The Hugging Face kernel: its layout, and the operator loaded by the package `kernels` itself.

From a local folder; nothing was published or downloaded, and kernel-builder, which needs Nix, did
not run.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from helpers.cases import CASES
from negtome_fast.integrations import hf_kernel
from negtome_fast.integrations.hf_kernel.__main__ import main

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "helpers"
PAGE = ROOT / "docs" / "hf-kernels.md"
REPO = "owner/negtome-fast"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("hf") / "kernel"
    hf_kernel.assemble(result, REPO)
    return result


def python_in(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder where `kernels` cannot be the folder of this repository."""
    environment = {k: v for k, v in os.environ.items() if k != "LOCAL_KERNELS"}
    environment |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(HERE.parent)
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def has_kernels() -> bool:
    """Return True if the package from PyPI is installed; this process may see the folder."""
    code = "import sys, kernels; sys.exit(not hasattr(kernels, 'get_local_kernel'))"
    return python_in(ROOT / "docs", ["-c", code]).returncode == 0


@pytest.fixture(scope="module")
def loaded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    if not has_kernels():
        pytest.skip("the package kernels is not installed")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "hf-kernel").symlink_to(folder)  # as the page has it
    done = python_in(elsewhere, [str(HERE / "hf_kernel_run.py"), str(folder), str(PAGE)])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("check"): line for line in lines}


def test_kernels_loads_it_from_a_local_folder(
    loaded: dict[str, dict[str, Any]], folder: Path
) -> None:
    facts = loaded["loaded"]
    assert facts["public"] == ["layers", "match_tokens", "negtome"]
    variant = Path(facts["file"]).parent
    assert variant.parent == folder / "build"
    metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
    assert facts["name"] == metadata["id"]
    assert loaded["by name"]["same"]


def test_all_cases_of_the_operator_run_through_it(loaded: dict[str, dict[str, Any]]) -> None:
    assert loaded["cases"]["passed"] == sum(not case.slow for case in CASES)


def test_it_lives_beside_the_package_with_operators_of_its_own(
    loaded: dict[str, dict[str, Any]],
) -> None:
    assert loaded["beside"] == {"same": True, "own": True, "has": True}
    assert loaded["gradient"]["same"]


def test_its_layer_replaces_the_layer_of_a_model(loaded: dict[str, dict[str, Any]]) -> None:
    assert loaded["layer"] == {"replaced": True, "same": True, "compiled": True}


def test_nested_package_of_older_versions_has_the_same_names(
    loaded: dict[str, dict[str, Any]],
) -> None:
    assert loaded["nested"] == {"public": ["layers", "match_tokens", "negtome"], "same": True}


def test_code_of_the_page_runs(loaded: dict[str, dict[str, Any]]) -> None:
    assert loaded["page"]["blocks"] == 2
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8")):
        assert target.startswith("http") or (PAGE.parent / target).is_file()


@pytest.mark.parametrize("backend", hf_kernel.BACKENDS)
def test_build_variant_is_described_and_complete(backend: str, folder: Path) -> None:
    variant = folder / "build" / f"torch-{backend}"
    metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["backend"] == {"type": backend} and metadata["name"] == "negtome-fast"
    assert metadata["id"].isidentifier() and f"_{backend}_" in metadata["id"]
    files = {str(p.relative_to(variant)) for p in variant.rglob("*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert set(metadata["digest"]["files"]) == files - {"metadata.json"}
    for name, expected in metadata["digest"]["files"].items():
        digest = hashlib.sha256((variant / name).read_bytes()).digest()
        assert base64.b64encode(digest).decode() == expected
    source = folder / "torch-ext" / "negtome_fast"
    for path in source.rglob("*"):
        if path.is_file():
            assert (variant / path.relative_to(source)).read_bytes() == path.read_bytes()


def test_build_toml_is_of_the_current_edition(folder: Path) -> None:
    build = tomllib.loads((folder / "build.toml").read_text(encoding="utf-8"))
    general = build["general"]
    assert general["edition"] == 5 and general["version"] == hf_kernel.VERSION
    assert tuple(general["backends"]) == hf_kernel.BACKENDS
    assert general["hub"] == {"repo-id": REPO}
    # All kinds of files that the package has, or kernel-builder would leave them behind.
    source = folder / "torch-ext" / general["name"].replace("-", "_")
    kinds = {path.suffix[1:] for path in source.rglob("*") if path.is_file()}
    assert kinds == set(build["torch-noarch"]["pyext"])
    card = (folder / "CARD.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: kernels\n") and f'get_kernel("{REPO}"' in card


def test_it_imports_itself_torch_triton_and_the_standard_library_only(folder: Path) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    package = folder / "build" / "torch-cuda"
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, path
            # Relative imports stay inside.
            if isinstance(node, ast.ImportFrom) and node.level:
                depth = len(path.relative_to(package).parts)
                assert node.level <= depth, path


def test_every_operator_is_registered_under_the_name_of_the_build(folder: Path) -> None:
    text = (folder / "torch-ext" / "negtome_fast" / "ops.py").read_text(encoding="utf-8")
    assert text.count("custom_op(") == text.count("    add_op_namespace_prefix(") == 3
    assert '"negtome_fast::' not in text


def test_assembling_again_gives_the_same_files(tmp_path: Path) -> None:
    first = {path: path.read_bytes() for path in hf_kernel.assemble(tmp_path, REPO)}
    stale = tmp_path / "torch-ext" / "negtome_fast" / "stale.py"
    stale.write_text("")
    again = {path: path.read_bytes() for path in hf_kernel.assemble(tmp_path, REPO)}
    assert again == first and not stale.exists()


def test_bad_input_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(tmp_path / "a"), "--repo-id", "no name"]) == 2
    assert "repo_id must be owner/name, got 'no name'" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("")
    assert main([str(tmp_path)]) == 2
    assert "has files of something else" in capsys.readouterr().err
    other = tmp_path / "other"
    (other / "tests").mkdir(parents=True)
    (other / "build.toml").write_text('[general]\nname = "another-kernel"\n')
    assert main([str(other)]) == 2
    assert "has files of something else" in capsys.readouterr().err and (other / "tests").is_dir()
    assert main([str(tmp_path / "b")]) == 0
    assert "files in" in capsys.readouterr().out
    monkeypatch.setattr(hf_kernel, "_OPERATORS", 4)
    assert main([str(tmp_path / "c")]) == 2
    assert "ops.py has changed: 3 operators, expected 4" in capsys.readouterr().err
