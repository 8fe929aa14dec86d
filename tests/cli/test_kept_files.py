"""Runs that are killed, interrupted, out of disk or started together lose and mix no files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.interrupted import NoisePipeline, at_call, files_of_at_most, kill_self, killed
from negtome_fast import files
from negtome_fast.generation import ReferenceFile, Settings, generate, new_folder, numbered_folder
from negtome_fast.generation import run as running
from negtome_fast.generation.nudged import NudgeRun, nudge_images
from negtome_fast.generation.run_folder import RunFolder
from negtome_fast.nudging import NudgedImages

SETTINGS = Settings(prompts=("one", "two"), model="a/b", images=2)
SMALLER = Settings(prompts=("one",), model="a/b", images=2)


@pytest.fixture
def pipe() -> NoisePipeline:
    return NoisePipeline()


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    folder = tmp_path / "bank"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    return folder


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def whole(folder: Path) -> bool:
    """True if the record lists exactly what is in the folder."""
    return names(folder) == {*record_of(folder)["files"], "run.json"}


def draw(kind: str, pipe: Any, folder: Path, bank: Path, **options: Any) -> dict[str, Any]:
    """A run of `generate` or `nudge` with two prompts, or with one if it overwrites."""
    settings = SMALLER if options.get("overwrite") else SETTINGS
    if kind == "generate":
        return generate(settings, folder, pipe=pipe, progress=False, **options).record
    run = NudgeRun(settings, bank, max_attempts=1)
    return nudge_images(run, folder, pipe=pipe, progress=False, **options)


def stop_at(name: str, monkeypatch: pytest.MonkeyPatch, then: Callable[..., None]) -> None:
    """Call `then` in place of the write of this file of a run."""
    real = RunFolder.write

    def write(self: RunFolder, written: str, content: bytes) -> None:
        (then if written == name else real)(self, written, content)

    monkeypatch.setattr(RunFolder, "write", write)


KINDS = pytest.mark.parametrize(
    ("kind", "last"), [("generate", "guided-1-001.png"), ("nudge", "after-1-001.png")]
)


# --------------------------------------------------------------------------------------------
# Killed, interrupted, out of disk
# --------------------------------------------------------------------------------------------
@KINDS
def test_a_killed_run_has_a_record_of_what_was_finished_and_is_replaced_whole(
    kind: str, last: str, pipe: Any, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    stop_at(last, monkeypatch, kill_self)
    killed(lambda: draw(kind, pipe, folder, bank))
    monkeypatch.undo()
    record = record_of(folder)
    assert record["status"] == "running"
    first = "guided-0-001.png" if kind == "generate" else "after-0-001.png"
    assert first in record["files"] and last not in names(folder)
    # An image of the batch that was being saved may not be listed yet: its name tells.
    assert names(folder) - record["files"].keys() <= {"run.json", "guided-1-000.png"} | {
        "before-1-001.png"
    }
    draw(kind, pipe, folder, bank, overwrite=True)
    assert record_of(folder)["status"] == "complete" and whole(folder)


@KINDS
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")], ids=str)
def test_an_interrupted_run_says_so_and_is_replaced_whole(
    kind: str,
    last: str,
    stop: BaseException,
    pipe: Any,
    bank: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raised(*_: Any) -> None:
        raise stop

    folder = tmp_path / "run"
    stop_at(last, monkeypatch, raised)
    with pytest.raises(type(stop)):
        draw(kind, pipe, folder, bank)
    monkeypatch.undo()
    interrupted = isinstance(stop, KeyboardInterrupt)
    assert record_of(folder)["status"] == ("interrupted" if interrupted else "failed")
    assert whole(folder) and len(record_of(folder)["files"]) >= 3
    with pytest.raises(FileExistsError, match="holds another run"):
        draw(kind, pipe, folder, bank)
    draw(kind, pipe, folder, bank, overwrite=True)
    assert whole(folder)


@pytest.mark.parametrize("kind", ["generate", "nudge"])
def test_a_run_that_never_fits_on_the_disk_leaves_nothing(
    kind: str, pipe: Any, bank: Path, tmp_path: Path
) -> None:
    with files_of_at_most(8192), pytest.raises(OSError, match="File too large"):  # images have 12 K
        draw(kind, pipe, tmp_path / "run", bank)
    assert names(tmp_path) == {"bank"}


def test_partial_files_of_dead_processes_go_with_the_next_run(
    pipe: Any, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(files.os, "replace", at_call(4, os.replace, kill_self))
    killed(lambda: draw("generate", pipe, folder, bank))
    monkeypatch.undo()
    (left,) = folder.glob(".*.partial")
    foreign = folder / left.name.replace("@", "elsewhere@")
    living = files.partial_of(folder / "guided-0-000.png")
    for path in (foreign, living):
        path.write_bytes(b"another process writes this")
    old = folder / ".sheet.png.999999999.partial"  # without the machine's name, of version 0.1.0
    old.write_bytes(b"")
    draw("generate", pipe, folder, bank, overwrite=True)
    # The file that this process has open is replaced by its own, and no other is touched.
    assert set(folder.glob(".*.partial")) == {foreign}


# --------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------
def test_runs_that_start_together_take_a_folder_each(pipe: Any, tmp_path: Path) -> None:
    folders = [new_folder(tmp_path) for _ in range(3)]
    assert [folder.name for folder in folders] == ["run-001", "run-002", "run-003"]
    with numbered_folder(None, tmp_path / "more") as first:
        assert first.is_dir()
    assert not (tmp_path / "more").exists()  # nothing was written
    with numbered_folder(None, tmp_path / "more") as first:
        generate(SMALLER, first, pipe=pipe, progress=False)
    assert record_of(tmp_path / "more" / "run-001")["status"] == "complete"


def test_two_runs_in_one_chosen_folder_are_not_mixed(tmp_path: Path) -> None:
    one, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with one.recording({}):
        with (
            pytest.raises(FileExistsError, match="was taken by another run meanwhile"),
            other.recording({}),
        ):
            raise AssertionError("both have the folder")
        one.write("guided-0-000.png", b"x")
    assert whole(tmp_path / "run")


def test_a_failed_run_takes_no_files_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="stop"), RunFolder(folder).recording({}):
        (folder / "mine.txt").write_text("kept")
        raise ValueError("stop")
    assert names(folder) == {"mine.txt"}


def test_a_failed_run_gives_an_earlier_one_its_record_back(pipe: Any, tmp_path: Path) -> None:
    """A run that overwrites may be refused by the pipeline only when it draws."""
    picture = tmp_path / "red.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    folder, pipe.vae = tmp_path / "run", object()
    settings = Settings(("one",), "a/b", references=(ReferenceFile(str(picture)),))
    generate(settings, folder, pipe=pipe, progress=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    Image.new("RGB", (8, 8), "blue").save(picture)
    more = replace(settings, references=2 * settings.references)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.GenerationRun, "one_prompt", failing)
        with pytest.raises(RuntimeError, match="late"):
            generate(more, folder, pipe=pipe, progress=False, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def failing(*_: Any) -> None:
    raise RuntimeError("late")


def test_references_in_the_folder_that_is_replaced_are_read_first(
    pipe: Any, tmp_path: Path
) -> None:
    """Two references of the earlier run in the other order: each is copied over the other."""
    pictures = {}
    for colour in ("red", "blue"):
        pictures[colour] = tmp_path / f"{colour}.png"
        Image.new("RGB", (8, 8), colour).save(pictures[colour])
    given = tuple(ReferenceFile(str(path)) for path in pictures.values())
    folder, pipe.vae = tmp_path / "run", object()
    generate(Settings(("one",), "a/b", references=given), folder, pipe=pipe, progress=False)
    turned = tuple(ReferenceFile(str(folder / f"reference-{i}.png")) for i in (1, 0))
    settings = Settings(("one",), "a/b", references=turned)
    generate(settings, folder, pipe=pipe, progress=False, overwrite=True)
    for number, colour in enumerate(("blue", "red")):
        copied = (folder / f"reference-{number}.png").read_bytes()
        assert copied == pictures[colour].read_bytes()
    assert whole(folder)


def test_the_command_says_where_an_interrupted_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from negtome_fast import generation
    from negtome_fast.cli import main

    def stopped(settings: Settings, folder: Path, **_: Any) -> None:
        (folder / "run.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "generate", stopped)
    assert main(["generate", "--prompt", "a pixel art person"]) == 130
    assert "what was finished is in output/run-001" in capsys.readouterr().err


def test_saved_nudged_images_replace_an_earlier_save(tmp_path: Path) -> None:
    from negtome_fast.nudging import Attempt, Verdict

    def made(*passed: bool) -> NudgedImages:
        rows = tuple((Attempt(0, (Verdict("f", 0.5, 0.5, not ok),)),) for ok in passed)
        return NudgedImages([Image.new("RGB", (4, 4)) for _ in passed], rows)

    made(True, True, True).save(tmp_path, "a")
    (tmp_path / "a-note.png").write_bytes(b"kept")
    made(False, True).save(tmp_path, "a")
    assert names(tmp_path) == {"a-0.flagged.png", "a-1.png", "a.json", "a-note.png"}
