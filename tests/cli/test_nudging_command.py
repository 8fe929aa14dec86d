"""`negtome-fast nudge` and `negtome-fast bank`: files, records, exit codes, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from negtome_fast import cli
from negtome_fast.cli.commands import bank, nudge
from negtome_fast.generation import Settings, nudge_filters
from negtome_fast.generation.nudged import NudgeRun, nudge_images
from negtome_fast.nudging import CallableFilter, ReferenceBank

RED, GREEN = (np.full((20, 30, 3), c, np.uint8) for c in ([255, 0, 0], [0, 255, 0]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two pictures and a file that cannot be read as one."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(RED).save(pictures / "red.png")
    Image.fromarray(GREEN).save(pictures / "green.png")
    (pictures / "broken.png").write_bytes(b"nothing")
    return pictures


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


# --------------------------------------------------------------------------------------------
# bank
# --------------------------------------------------------------------------------------------
def test_a_bank_is_built_and_described(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bank"
    assert run("bank", "build", folder, "--out", out, "--size", "16", "--quiet") == 0
    told = capsys.readouterr()
    assert f"2 images in {out}" in told.out and "skipped broken.png" in told.out
    assert "warning: left out of the bank: broken.png" in told.err
    assert ReferenceBank.load(out).names == ("green.png", "red.png")
    assert run("bank", "info", out) == 0
    text = capsys.readouterr().out
    assert "2, 16 x 16 pixels" in text and "green.png, red.png" in text and "broken.png" in text
    assert run("bank", "info", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 2 and found["encoder"] is None
    assert list(found["skipped"]) == ["broken.png"]


def test_a_bank_keeps_features_of_the_embedded_encoder(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason='the extra "demo" is not installed')
    build = ("bank", "build", folder, "--out", tmp_path / "bank", "--size", "16", "--quiet")
    assert run(*build, "--encoder", "efficientnet") == 0
    assert bank.describe(tmp_path / "bank")["features"] == 1280


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bank", "build", "{tmp}/nowhere", "--out", "{tmp}/out"], "no folder"),
        (["bank", "build", "{tmp}", "--out", "{tmp}/pictures/red.png"], "is a file"),
        (["bank", "build", "{tmp}", "--out", "{tmp}/out", "--size", "0"], "--size must be"),
        (["bank", "info", "{tmp}"], "is not a reference bank"),
        (["nudge", "--model", "{tmp}"], "needs --undesired: images"),
        (["nudge", "--model", "{tmp}", "--undesired", "{tmp}"], "needs --prompt: what"),
        (["nudge", "--undesired", "{tmp}/nowhere", "--prompt", "a person"], "no folder"),
        (["nudge", "--filter", "taste:3"], "no filter 'taste'; there are pixels, latents"),
        (["nudge", "--filter", "pixels"], "--filter pixels is not NAME:THRESHOLD"),
        (["nudge", "--filter", "pixels:7"], "threshold must lie between 0 and 1"),
        (["nudge", "--prompt", "a unicorn"], "does not know 'unicorn'"),
        (["nudge", "-n", "0"], "--images must be at least 1, got 0"),
        (["nudge", "--max-attempts", "0"], "--max-attempts must be at least 1"),
        (["nudge", "--steps", "0"], "--steps must be at least 1"),
        (["nudge", "--seed", "-1"], "--seed must be between"),
        (["nudge", "--output", "{tmp}"], "holds files, but no run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = ReferenceBank(("one",), torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    monkeypatch.setattr(nudge_filters, "own_characters", lambda pipe: empty)
    assert run(*(argument.format(tmp=folder.parent) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("negtome-fast: error: ") and message in error


def test_another_models_filters_are_checked_before_it_is_loaded(tmp_path: Path) -> None:
    settings = Settings(prompts=("x",), model="somebody/model")
    with pytest.raises(ValueError, match="embedded model only"):
        NudgeRun(settings, tmp_path, filters=("reader:0.5",))
    assert NudgeRun(settings, tmp_path).parsed == (("pixels", 0.1),)


# --------------------------------------------------------------------------------------------
# nudge
# --------------------------------------------------------------------------------------------
def test_the_demonstration_nudges_what_the_filters_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One character in few steps: the flagged images before and after, and all recorded files."""
    monkeypatch.setattr(nudge_filters, "DESCRIBED", 2)
    out = tmp_path / "run"
    arguments = ["nudge", "--prompt", "captain red", "-n", "2", "--steps", "4", "--output", out]
    code = run(*arguments, "--max-attempts", "2", "--quiet")
    record = json.loads((out / "run.json").read_text())
    (one,) = record["prompts"]
    assert one["flagged_before"] == 2 and code == int(one["flagged_after"] > 0)
    assert f'"captain red": 2 of 2 flagged before, {one["flagged_after"]} after' in (
        capsys.readouterr().out
    )
    for rows in one["attempts"]:
        assert rows[1]["undesired"] == ["captain red"]
        assert rows[1]["desired"][0].startswith("a pixel art person with a red mohawk and tan skin")
        assert rows[1]["distance"] > 0
    names = {path.name for path in out.iterdir()}
    assert names == {*record["files"], "run.json"}
    after = "after-0-001.png" if one["passed"][1] else "after-0-001.flagged.png"
    assert {"sheet.png", "before-0-000.png", after} <= names
    before, moved = (np.asarray(Image.open(out / n)) for n in ("before-0-001.png", after))
    assert not np.array_equal(before, moved)


def test_images_that_pass_are_the_plain_ones_and_a_run_is_replaced(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ["nudge", "--prompt", "a pixel art person", "-n", "1", "--steps", "2", "--quiet"]
    arguments += ["--undesired", folder, "--output", out]
    with pytest.warns(UserWarning, match=r"broken\.png"):
        settings = Settings(("a pixel art person",), images=2, steps=2)
        nudge_images(NudgeRun(settings, folder), out, progress=False)
    assert (out / "after-0-001.png").is_file()
    assert run(*arguments) == 2
    assert run(*arguments, "--overwrite") == 0
    assert not (out / "after-0-001.png").exists()
    assert (out / "before-0-000.png").read_bytes() == (out / "after-0-000.png").read_bytes()
    record = json.loads((out / "run.json").read_text())
    assert record["undesired"] == str(folder) and record["filters"][0] == ["pixels", 0.1]


def test_what_stays_flagged_is_marked_and_is_exit_code_1(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(*_: Any) -> CallableFilter:
        return CallableFilter(lambda images: [1.0] * len(images), 0.5, "always")

    monkeypatch.setattr(nudge_filters, "build_filter", always)
    arguments = ["nudge", "--prompt", "captain red", "-n", "1", "--steps", "2", "--quiet"]
    arguments += ["--undesired", folder, "--output", tmp_path / "run", "--max-attempts", "1"]
    assert run(*arguments) == 1
    assert (tmp_path / "run" / "after-0-000.flagged.png").is_file()


@pytest.mark.parametrize("name", nudge.FILTERS)
def test_every_filter_of_the_command_line_knows_its_own_images(name: str) -> None:
    from negtome_fast import models

    if name == "hash":
        pytest.importorskip("imagehash", reason='the extra "nudge" is not installed')
    pipe = models.load_pipeline()
    images = models.generate(pipe, "captain red", [0, 1], steps=8)
    known = nudge_filters.bank_of(("captain", "again"), images)
    threshold = {"pixels": 0.05, "latents": 0.2, "features": 0.9, "hash": 8, "reader": 0.5}[name]
    one = nudge_filters.build_filter(name, threshold, known, pipe)
    assert one.name == name
    assert [verdict.triggered for verdict in one.judge(images)] == [True, True]
    other = models.generate(pipe, "a big smile person", [0], steps=8)
    assert [verdict.triggered for verdict in one.judge(other)] == [False]
