"""Exports appear whole or not at all, and sizes that no model has are refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from helpers.interrupted import kill_self, killed
from negtome_fast.cli import main
from negtome_fast.integrations.export import Operator, export, export_all
from negtome_fast.integrations.export import run as exporting
from negtome_fast.kernels import aot

OPERATOR = Operator("sm_90", "bf16", 64)
FILES = ("scale.cubin", "tiles.cubin", "negtome.h", "negtome.json")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A compiler that writes files at once, and calls `at` after `after` of them."""
    state: dict[str, Any] = {"after": len(FILES), "content": "first", "at": lambda: None}

    def compile_all(module: str, arguments: Sequence[str], given: str) -> str:
        written = []
        for _, folder in json.loads(given):
            for name in FILES[: state["after"]]:
                Path(folder, name).write_text(state["content"])
            state["at"]()
            written.append([str(Path(folder, name)) for name in FILES])
        return json.dumps(written)

    monkeypatch.setattr(aot, "run_compiling", compile_all)
    return state


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_export_is_written_whole(tmp_path: Path) -> None:
    folders = [tmp_path / "deep" / "a", tmp_path / "b"]
    written = export_all([(OPERATOR, folder) for folder in folders])
    assert written == [[folder / name for name in FILES] for folder in folders]
    assert names(tmp_path) == {"deep", "b"} and names(folders[0]) == set(FILES)


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize("stop", ["killed", "full"])
def test_a_stopped_export_changes_nothing(
    stop: str, there: bool, tmp_path: Path, compiler: dict[str, Any]
) -> None:
    folder = tmp_path / "export"
    if there:
        export(OPERATOR, folder)
        (folder / "mine.c").write_text("kept")
    compiler.update(after=2, content="second", at=kill_self if stop == "killed" else full_disk)
    if stop == "killed":
        killed(lambda: export(OPERATOR, folder))
    else:
        with pytest.raises(OSError, match="No space left"):
            export(OPERATOR, folder)
    assert folder.is_dir() == there
    if there:
        kept = [path.read_text() for path in folder.iterdir() if path.is_file()]
        assert sorted(kept) == [*["first"] * len(FILES), "kept"]
    compiler.update(after=len(FILES), at=lambda: None)
    export(OPERATOR, folder)
    assert names(tmp_path) == {"export"}
    assert names(folder) == {*FILES, *(["mine.c"] if there else [])}
    assert {(folder / name).read_text() for name in FILES} == {"second"}


def test_a_description_never_lies_beside_the_kernels_of_another_export(
    tmp_path: Path, compiler: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    export(OPERATOR, folder)
    compiler["content"] = "second"
    monkeypatch.setattr(exporting.os, "replace", lambda *_: full_disk())
    with pytest.raises(OSError, match="No space left"):
        export(OPERATOR, folder)
    assert names(folder) == set(FILES) - {"negtome.json"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"--channels {2**70}", "--channels must be at most 65536, got 1180591620717411303424"),
        (
            "--channels 64 --tokens 99999999999",
            "--tokens must be at most 16777216, got 99999999999",
        ),
        ("--channels 64 --items 65536", "--items must be at most 65535, got 65536"),
    ],
)
def test_sizes_that_no_model_has_are_refused(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "export"
    command = ["export", "--target", "sm_90", "--dtype", "bf16", *words.split(), "--out", str(out)]
    assert main(command) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_a_place_that_is_no_folder_is_refused_before_anything_is_compiled(
    tmp_path: Path, compiler: dict[str, Any]
) -> None:
    compiler["at"] = lambda: pytest.fail("compiled")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"`folder` .*file.* cannot be made"):
        export(OPERATOR, tmp_path / "file" / "x")
