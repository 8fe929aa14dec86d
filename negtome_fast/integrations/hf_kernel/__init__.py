"""Assemble a Hugging Face kernel from this package, for `kernels.get_kernel`.

`assemble` copies the operator (Triton kernels, their tables, the launcher, the torch fallback, the
functions) into the layout that kernel-builder reads, and into the build variants that
kernel-builder would make. docs/hf-kernels.md says how to use and publish them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

from ... import kernels
from ...kernels import tuning

FILES = Path(__file__).parent / "files"
PACKAGE = Path(__file__).parents[2]
KERNELS = Path(kernels.__file__).parent
#: Name of the kernel on the Hub, its major version, and its license.
NAME, VERSION, LICENSE = "negtome-fast", 0, "Apache-2.0"
PYTHON_NAME = NAME.replace("-", "_")
BACKENDS = ("cpu", "cuda", "rocm")
#: Files that are copied unchanged, and the one file whose operators are renamed in every build.
MODULES = ("arguments.py", "call.py", "functional.py", "module.py", "naive.py", "pairing.py")
BACKEND_MODULES = tuple(sorted(path.name for path in (PACKAGE / "backends").glob("*.py")))
KERNEL_MODULES = (
    *("__init__.py", "tuning.py"),
    *(
        "division.py",
        "shared.py",
        "match.py",
        "push.py",
        "fused.py",
        "coarse.py",
        "coarse_scores.py",
    ),
)
_OPERATOR = re.compile(r'"negtome_fast::(\w+)"')
_OPERATORS = 3


def sources(repo_id: str) -> dict[str, str]:
    """Text of the files of the Python package, by their path in the layout of kernel-builder."""
    found = {name: (PACKAGE / name).read_text(encoding="utf-8") for name in MODULES}
    for name in BACKEND_MODULES:
        found[f"backends/{name}"] = (PACKAGE / "backends" / name).read_text(encoding="utf-8")
    for name in KERNEL_MODULES:
        found[f"kernels/{name}"] = (KERNELS / name).read_text(encoding="utf-8")
    for path in sorted(tuning.FOLDER.glob("*.json")):
        found[f"kernels/tuned/{path.name}"] = path.read_text(encoding="utf-8")
    found["ops.py"] = _with_own_names((PACKAGE / "ops.py").read_text(encoding="utf-8"))
    for name in ("__init__.py", "layers.py"):
        found[name] = _filled(f"{name}.in", repo_id)
    return found


def _with_own_names(text: str) -> str:
    """Text of ops.py with its operators registered under the namespace of the build."""
    text, count = _OPERATOR.subn(r'add_op_namespace_prefix("\1")', text)
    anchor = "from .backends import torch_backend\n"
    if count != _OPERATORS or text.count(anchor) != 1:
        raise RuntimeError(f"ops.py has changed: {count} operators, expected {_OPERATORS}")
    return text.replace(anchor, f"from ._ops import add_op_namespace_prefix\n{anchor}")


def _filled(name: str, repo_id: str, **values: str) -> str:
    text = (FILES / name).read_text(encoding="utf-8")
    values |= {"repo_id": repo_id, "version": str(VERSION), "name": NAME, "license": LICENSE}
    values |= {"module": PYTHON_NAME}
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], text)


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _variant(files: dict[str, str], backend: str, repo_id: str) -> dict[str, str]:
    """Files of a build variant: the package, its namespace and metadata.json."""
    content = json.dumps(files, sort_keys=True).encode()
    identifier = f"_{PYTHON_NAME}_{backend}_{hashlib.sha256(content).hexdigest()[:7]}"
    built = files | {
        "_ops.py": _filled("_ops.py.in", repo_id, identifier=identifier),
        f"{PYTHON_NAME}/__init__.py": _filled("nested.py.in", repo_id),
    }
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in sorted(built.items())
    }
    metadata = {
        "name": NAME,
        "id": identifier,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return built | {"metadata.json": json.dumps(metadata, indent=2) + "\n"}


def _is_ours(folder: Path) -> bool:
    """Return True if the build.toml of a folder names this kernel, not another one."""
    path = folder / "build.toml"
    if not path.is_file():
        return False
    general: dict[str, object] = tomllib.loads(path.read_text(encoding="utf-8")).get("general", {})
    return general.get("name") == NAME


def assemble(folder: Path | str, repo_id: str = f"OWNER/{NAME}") -> list[Path]:
    """Write the kernel into `folder`: sources for kernel-builder, and complete build variants.

    Args:
        folder: created if missing; files of an earlier call are replaced.
        repo_id: repository that it will be published in, `owner/name`, for the card and build.toml.

    Returns:
        The files, sorted.

    Raises:
        ValueError: repo_id is not `owner/name`, or the folder has other files.
        RuntimeError: ops.py has changed, so that its operators cannot be renamed.
    """
    folder = Path(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"repo_id must be owner/name, got {repo_id!r}")
    if folder.exists() and any(folder.iterdir()) and not _is_ours(folder):
        raise ValueError(f"{folder} has files of something else; use an empty folder")
    for name in ("torch-ext", "build", "tests"):
        shutil.rmtree(folder / name, ignore_errors=True)
    files = sources(repo_id)
    top = {name: _filled(name, repo_id) for name in ("build.toml", "flake.nix", "CARD.md")}
    _write(folder, top | {f"tests/test_{PYTHON_NAME}.py": _filled("test.py.in", repo_id)})
    _write(folder / "torch-ext" / PYTHON_NAME, files)
    # On the Hub the card is the README.
    _write(folder / "build", {"CARD.md": top["CARD.md"]})
    for backend in BACKENDS:
        _write(folder / "build" / f"torch-{backend}", _variant(files, backend, repo_id))
    return sorted(path for path in folder.rglob("*") if path.is_file())
