"""Wrong values of every option of the commands that study, tune and serve.

Each option is found in the parser and given every wrong value of its kind. The command answers with
one line that names the option and with exit code 2, or it comes to the point where a model would be
loaded. It never ends in a traceback.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="the extra 'eval' is not installed")
pytest.importorskip("dicebear", reason="the extra 'eval' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'eval' is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from negtome_fast import generation
from negtome_fast.cli import build_parser, main
from negtome_fast.cli.commands.eval import STUDIES
from negtome_fast.cli.web import page
from negtome_fast.models import model_folder
from negtome_fast.studies.sampler import Sampler
from negtome_fast.studies.studies import own
from negtome_fast.tuner import run as tuning

OWN = ["eval", "own", "--model", str(model_folder()), "--prompt", "a pixel art person"]
COMMANDS = {
    "demo": ["demo"],
    "diversity": ["eval", "diversity"],
    "own": OWN,
    "tune": ["tune", "--dry-run"],
    "web": ["web", "--port", "0"],
    "info": ["info"],
}
HUGE = str(10**30)
NEVER = {int: ("x", "", "1.5", "nan", "1e3"), float: ("x", "")}
"""Values that argparse refuses for the type of an option."""
COUNTS = {"images", "samples", "steps", "threads", "group", "height", "width"}
"""Destinations of options that count: from 1 on, and not more than a machine holds."""
LIMITED = COUNTS - {"height", "width"}
UNBOUNDED_FLOATS = ("nan", "inf", "-inf", "1e39", "1e400")
REFUSED_FLOATS = {"alpha", "threshold", "t_start", "t_end", "sharpen", "scales", "guidance_scale"}


class Loaded(BaseException):
    """The command came to the point where a model would be loaded."""


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    def loaded(*_: Any, **__: Any) -> Any:
        raise Loaded

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "load_pipeline", loaded)
    monkeypatch.setattr(Sampler, "draw", loaded)
    monkeypatch.setattr(Sampler, "_measured", loaded)
    monkeypatch.setattr(own.run, "Meter", lambda wanted: None)
    monkeypatch.setattr(tuning, "dry_run", loaded)
    monkeypatch.setattr(page, "load_gradio", lambda: SimpleNamespace())
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    yield


def options(words: list[str]) -> dict[str, argparse.Action]:
    """The options of a command that take a value, by name."""
    actions = build_parser()._actions
    commands = next(one for one in actions if isinstance(one, argparse._SubParsersAction))
    return {
        next(name for name in reversed(action.option_strings)): action
        for action in commands.choices[words[0]]._actions
        if action.option_strings and action.nargs != 0
    }


def answer(words: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """The line that refuses a command; None if it would load a model or does its work."""
    try:
        code = main(words)
    except Loaded:
        capsys.readouterr()
        return None
    except SystemExit as stop:
        assert stop.code == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("negtome-fast ") and ": error: " in line
        return line
    printed = capsys.readouterr()
    if code == 0:
        return None
    assert code == 2 and printed.err.count("\n") == 1, printed.err
    return printed.err.strip()


def values(action: argparse.Action) -> list[tuple[str, bool]]:
    """Values for an option, with True for those that must be refused."""
    kind: Any = action.type
    if action.choices is not None:
        return [("nope", True), ("", True)]
    found = [(value, True) for value in NEVER.get(kind, ())]
    if kind is int:
        counts = action.dest in COUNTS
        found += [("0", counts), ("-1", counts or action.dest in ("seed", "port"))]
        found += [(HUGE, action.dest in {*LIMITED, "seed", "port"})]
    elif kind is float:
        found += [(value, action.dest in REFUSED_FLOATS) for value in UNBOUNDED_FLOATS]
        found += [("-1", False), ("0", False)]
    elif kind is Path:
        found += [("file/below", True), ("/proc/none", True)]
    elif action.dest != "help":
        found += [("", False), ("\u200b", False), ("x" * 10_000, False)]
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_named_by_the_line_that_refuses_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    words = COMMANDS[name]
    own_options = {"study", "samples", "quick"} if name == "own" else set()
    for option, action in options(words).items():
        if name == "diversity" and action.default is argparse.SUPPRESS:
            continue  # options of eval own
        if action.dest in own_options:
            continue
        for value, refused in values(action):
            several = action.nargs if isinstance(action.nargs, int) else 1
            given = [*words, f"{option}={value}"] if several == 1 else [*words, option]
            given += [value] * several if several > 1 else []
            line = answer(given, capsys)
            told = f"{name} {option}={value[:40]!r}: {line}"
            unused = name == "tune" and action.dest == "out"  # a dry run writes nothing
            assert line is not None or not refused or unused, told
            if line is not None:
                also = {"prompt": "does not know", "prompts": "does not know", "model": "Hub id"}
                also["steps_window"] = "steps=(start, end)"
                named = (option, action.dest, also.get(action.dest, option))
                itself = len(value) > 1000 and value in line  # the name of a file
                assert any(word in line for word in named) or itself, told
                assert "Traceback" not in line and len(line) < 12_000, told
    assert not list(tmp_path.glob("output/*"))


@pytest.mark.parametrize("study", STUDIES)
def test_no_study_begins_with_no_images(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("0", "-1", HUGE):
        assert value in (answer(["eval", study, "--samples", value], capsys) or "")


@pytest.mark.parametrize(
    "shape",
    [
        *(
            "4x99999999999x16",
            "0x16x16",
            "4x-1x16",
            "4x16",
            "4x16x",
            "x16x8",
            "4x16x8/0",
            "4x16x8/x",
        ),
        *("4x16x8/4", "1x16x8", "4x16x8x2", "4 x 16 x 8", "1e3x16x8", "", HUGE, f"{HUGE}x1x1"),
        *("9" * 5000 + "x1x1", "16777216x16777216x2", "2x16777217x1"),
    ],
    ids=lambda value: value[:20],
)
def test_shapes_are_refused_before_anything_is_compiled(
    shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = answer(["tune", "--dry-run", "--shapes", "4x256x64", shape], capsys)
    assert line is not None and "shape" in line and len(line) < 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--output", "."], "--output must end in .png"),
        (["demo", "--output", "file/x.png"], "file is a file; give a folder"),
        (["demo", "-n", "100000"], "--images must be 2, to differ from each other, to 256"),
        (["demo", "--prompt", ""], "prompt"),
        (["tune", "--seconds", "nan"], "--seconds must be a time above 0, got nan"),
        (["tune", "--seconds", "-3"], "--seconds must be a time above 0, got -3"),
        (["tune", "--out", "."], "--out . is a folder"),
        (["eval", "diversity", "--threads", "100000"], "--threads must be 1 to 1024"),
        (["eval", "report", "--out", "none"], "no results of studies in none"),
        (["eval", "report", "--out", "file"], "no results of studies in file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_else_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    line = answer(words, capsys)
    if message == "prompt":
        assert line is None or message in line
    else:
        assert line is not None and message in line


def test_memory_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Sampler, "draw", draw)
    line = answer(["demo"], capsys)
    assert line == "negtome-fast: error: not enough memory for this request"
