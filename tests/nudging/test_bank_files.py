"""Saved banks: killed and full disks, checksums, names with escapes, and what is no bank."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.interrupted import at_call, files_of_at_most, kill_self, killed
from negtome_fast.cli import main
from negtome_fast.nudging import (
    CallableFilter,
    ImageEncoder,
    LatentDistance,
    NudgeSchedule,
    PerceptualHash,
    PixelDistance,
    ReferenceBank,
    nudge,
)
from negtome_fast.nudging import bank as banks
from negtome_fast.nudging.images import MOST_PIXELS


def bank(name: str, count: int = 2, **values: Any) -> ReferenceBank:
    images = torch.full((count, 3, 16, 16), len(name), dtype=torch.uint8)
    return ReferenceBank(tuple(f"{name} {i}" for i in range(count)), images, **values)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [2, 3], ids=["as many", "more"])
def test_a_bank_killed_between_its_two_files_is_not_opened(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank("old").save(tmp_path)
    monkeypatch.setattr(banks.os, "replace", at_call(2, os.replace, kill_self))
    killed(lambda: bank("newer", count).save(tmp_path))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"two files of the bank .* do not belong together"):
        ReferenceBank.load(tmp_path)
    (tmp_path / "bank.json.partial").write_text("left by version 0.1.0")
    bank("newest").save(tmp_path)
    assert names(tmp_path) == {"bank.json", "bank.safetensors"}
    assert ReferenceBank.load(tmp_path).names[0] == "newest 0"


def test_a_bank_killed_before_its_files_are_renamed_is_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank("old").save(tmp_path)
    monkeypatch.setattr(banks.os, "replace", kill_self)
    killed(lambda: bank("newer").save(tmp_path))
    monkeypatch.undo()
    assert ReferenceBank.load(tmp_path).names[0] == "old 0"


def test_a_bank_on_a_full_disk_is_one_line_and_the_earlier_bank_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "bank"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    words = ["bank", "build", str(pictures), "--out", str(out), "--quiet", "--size"]
    assert main([*words, "8"]) == 0
    capsys.readouterr()
    with files_of_at_most(4096):
        assert main([*words, "64"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"negtome-fast: error: the bank {out} cannot be written: ")
    assert names(out) == {"bank.json", "bank.safetensors"}
    assert ReferenceBank.load(out).images.shape[-1] == 8


def test_banks_without_a_checksum_still_open(tmp_path: Path) -> None:
    bank("old").save(tmp_path)
    path = tmp_path / "bank.json"
    description = json.loads(path.read_text())
    assert len(description.pop("sha256")) == 64
    path.write_text(json.dumps(description))
    assert ReferenceBank.load(tmp_path).names == bank("old").names


@pytest.mark.parametrize(
    "changes",
    [{"names": [1, 2]}, {"names": 5}, {"encoder": 5}, {"skipped": 5}, [], 5],
    ids=str,
)
def test_a_description_of_wrong_types_is_named(changes: Any, tmp_path: Path) -> None:
    bank("old").save(tmp_path)
    path = tmp_path / "bank.json"
    if isinstance(changes, dict):
        changes = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(changes))
    with pytest.raises(ValueError, match=r"bank\.json is corrupt"):
        ReferenceBank.load(tmp_path)


def test_names_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07"
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    features = torch.ones(1, 2)
    ReferenceBank((evil,), images, features, evil, ((evil, evil),)).save(tmp_path / "bank")
    assert main(["bank", "info", str(tmp_path / "bank")]) == 0
    told = capsys.readouterr().out
    assert told.count(r"\x1b[2J\x1b]0;owned\x07") == 4 and "\x1b" not in told
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / f"{evil}.png").write_bytes(b"broken")
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "ok.png")
    words = ["bank", "build", str(tmp_path / "pictures"), "--out", str(tmp_path / "other")]
    assert main([*words, "--size", "4", "--quiet"]) == 0
    told = "".join(capsys.readouterr())
    assert r"skipped \x1b[2J" in told and "\x1b" not in told


# --------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": torch.zeros(1, 3, 0, 0, dtype=torch.uint8)}, "images must have pixels, got 0"),
        ({"features": torch.ones(1, 0)}, "features must be floating-point numbers, at least one"),
        ({"features": torch.ones(1, 2, dtype=torch.int64)}, "features must be floating-point"),
        ({"features": torch.tensor([[1.0, float("nan")]])}, "features of 'a' are not finite"),
        ({"features": torch.tensor([[float("inf")]])}, "features of 'a' are not finite"),
    ],
    ids=str,
)
def test_banks_that_cannot_be_compared_are_refused(values: dict[str, Any], message: str) -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        ReferenceBank(**{"names": ("a",), "images": images, **values})


def test_an_encoder_that_returns_nan_is_named() -> None:
    broken = ImageEncoder("broken", lambda images: images.mean((2, 3)) / 0)
    with pytest.raises(ValueError, match="features of 'b 0' are not finite"):
        bank("b").with_features(ImageEncoder("nan", lambda i: i.mean((2, 3)) * float("nan")))
    with pytest.raises(ValueError, match="are not finite"):
        bank("b").with_features(broken)


@pytest.mark.parametrize("size", [0, -1, MOST_PIXELS + 1, 10**30, 2.5, True])
def test_the_side_of_images_has_limits(
    size: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    for make in (
        lambda: ReferenceBank.build([picture], size=size),
        lambda: PixelDistance(bank("a"), 0.1, size=size),
        lambda: LatentDistance(bank("a"), 0.1, lambda images: images, size=size),
        lambda: PerceptualHash(bank("a"), 0, hash_size=size),
    ):
        with pytest.raises(ValueError, match=f"size` must be 1 to {MOST_PIXELS} pixels, got"):
            make()
    if isinstance(size, int) and size is not True:
        out = tmp_path / "out"
        words = ["bank", "build", str(tmp_path), "--out", str(out), "--size", str(size)]
        assert main(words) == 2
        assert f"--size must be 1 to {MOST_PIXELS} pixels" in capsys.readouterr().err
        assert not out.exists()


def test_large_and_damaged_pictures_are_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "ok.png")
    Image.new("RGB", (30, 30)).save(tmp_path / "large.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "large.png").read_bytes()[:60])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.warns(UserWarning, match=r"left out of the bank: cut\.png"):
        built = ReferenceBank.build(tmp_path, size=4)
    assert built.names == ("ok.png",)
    assert "large.png is too large: 900 pixels" in dict(built.skipped)["large.png"]
    with (
        pytest.warns(UserWarning, match="the image has no pixels: 4 x 0"),
        pytest.raises(ValueError, match="no image in it"),
    ):
        ReferenceBank.build([np.zeros((0, 4, 3), np.uint8)])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("threshold", [NAN, INF, "0.5", True])
def test_thresholds_are_finite_numbers(threshold: Any) -> None:
    for make in (
        lambda: CallableFilter(lambda images: [0.0], threshold),
        lambda: PixelDistance(bank("a"), threshold),
        lambda: LatentDistance(bank("a"), threshold, lambda images: images),
    ):
        with pytest.raises((ValueError, TypeError), match=r"^threshold must "):
            make()
    with pytest.raises(TypeError, match="function must be callable"):
        CallableFilter(5, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "x"}, "objective must be one of paper, squared, cosine, got 'x'"),
        ({"alpha": NAN}, "alpha must be finite, got nan"),
        ({"beta": -INF}, "beta must be finite"),
        ({"escalation": INF}, "escalation must be finite"),
        ({"max_distance": NAN}, "max_distance must be finite"),
        ({"step_size": 0.0}, "step_size must be positive, got 0"),
        ({"steps": 0}, "steps must be at least 1 and whole, got 0"),
        ({"steps": 2.5}, "steps must be at least 1 and whole, got 2.5"),
        ({"nearest": True}, "nearest must be at least 1 and whole, got True"),
        ({"alpha": "1"}, "alpha must be a number, not str"),
        ({"window": 0.5}, "window must be two values"),
        ({"window": (0.1, NAN)}, "window must be finite"),
    ],
    ids=str,
)
def test_schedules_that_cannot_move_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        NudgeSchedule(**changes)
    assert NudgeSchedule(max_distance=INF).max_distance == INF


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"max_distance": torch.tensor(-1.0)}, "max_distance must be positive, got -1"),
        ({"max_distance": torch.tensor([1.0, 0.0])}, r"max_distance must be positive, got \[1.0"),
        ({"max_distance": torch.tensor(NAN)}, "max_distance must be positive, got nan"),
        ({"alpha": torch.tensor(NAN)}, "alpha must be finite, got nan"),
        ({"beta": torch.tensor([INF, 1.0])}, r"beta must be finite, got \[inf"),
    ],
    ids=str,
)
def test_weights_that_are_tensors_are_checked_as_numbers_are(
    weights: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        nudge(torch.randn(2, 4), undesired=torch.randn(3, 4), **weights)


def test_an_unread_radius_that_is_not_positive_moves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on an accelerator, where reading the values would wait for it."""
    monkeypatch.setattr("negtome_fast.nudging.objective.can_skip_dispatcher", lambda *_: False)
    latents, points = torch.randn(4, 8), 9 * torch.randn(3, 8)
    radius = torch.tensor([-1.0, 0.0, NAN, 2.0])
    for backend in ("torch", "reference"):
        result = nudge(latents, undesired=points, max_distance=radius, backend=backend)
        assert torch.equal(result.latents[:3], latents[:3])
        assert not torch.equal(result.latents[3], latents[3])
