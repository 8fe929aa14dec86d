"""The command `negtome-fast tune`: bad input, and the dry run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from negtome_fast.cli import main
from negtome_fast.kernels import tuning
from negtome_fast.kernels.tuning import Config
from negtome_fast.tuner import predict, run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4x4096"], "is not ITEMSxTOKENSxCHANNELS"),
        (["--shapes", "4x16x8/3"], "2 or more items in each"),
        (["--dry-run", "--arch", "sm_1"], "--arch must be one of sm_80"),
        (["--arch", "sm_90"], "--arch is for --dry-run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--out", str(tmp_path / "table.json")]) == 2
    error = capsys.readouterr().err.strip()
    assert (
        "PyTorch finds none" in error and "dry_run" in error.replace("-", "_") and "\n" not in error
    )
    assert not list(tmp_path.iterdir())


def test_dry_run_lists_the_pruned_space(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = Config(64, 64, 32, 4, 2)
    monkeypatch.setattr(tuning, "TUNED", ("tiles",))
    for module in (run, predict):
        monkeypatch.setattr(module, "space", lambda kernel: [some, Config(256, 256, 128, 4, 5)])
    predict.ordered.cache_clear()
    try:
        assert main(["tune", "--dry-run", "--arch", "sm_80", "--shapes", "2x256x64"]) == 0
    finally:
        predict.ordered.cache_clear()
    printed = capsys.readouterr().out
    assert "2x256x64 bfloat16, tiles: 1 to measure of 2" in printed
    assert "64x64x32" in printed and "256x256" not in printed
