"""`--first-steps`: the window of the command line as a number of steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from negtome_fast import cli
from negtome_fast.config import NegToMeConfig
from negtome_fast.generation import Settings, take_guidance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--first-steps", "2", "--t-end", "3"], "--first-steps and --t-start or --t-end are two"),
        (["--first-steps", "2", "--steps-window", "0", "1"], "--first-steps and --steps-window"),
        (["--first-steps", "0"], "--first-steps must be at least 1, not 0"),
    ],
)
def test_two_windows_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = ["generate", "--prompt", "a red captain", *options, "--output", str(folder)]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err and not folder.exists()


def test_a_window_replaces_the_others() -> None:
    chosen = take_guidance({"first_steps": 3})
    assert chosen == {"first_steps": 3}
    settings = Settings(prompts=("x",), preset="diversity", guidance=chosen)
    assert NegToMeConfig().with_overrides(**settings.overrides()).window == "first_steps=3"


@pytest.mark.parametrize(
    ("recorded", "changed", "window"),
    [
        ({"first_steps": 3}, {}, "first_steps=3"),
        ({"first_steps": 3}, {"t_end": 700.0}, "t_start=1000 to t_end=700"),
        ({"first_steps": 3}, {"steps": (0.0, 0.5)}, "steps=(0, 0.5)"),
        ({"steps": (0.0, 0.5)}, {"first_steps": 2}, "first_steps=2"),
        ({}, {"first_steps": 2}, "first_steps=2"),
    ],
)
def test_a_run_again_with_another_window(
    recorded: dict[str, Any], changed: dict[str, Any], window: str, tmp_path: Path
) -> None:
    config = NegToMeConfig(**recorded)
    before = Settings(prompts=("x",), guidance=recorded)
    record = {"settings": before.to_dict(), "config": config.to_dict()}
    (tmp_path / "run.json").write_text(json.dumps(record))
    again = Settings.from_record(tmp_path, guidance=changed)
    assert NegToMeConfig().with_overrides(**again.overrides()).window == window
