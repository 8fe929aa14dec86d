"""The command line: its output, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import negtome_fast
from negtome_fast.backends import coarse
from negtome_fast.cli import main
from negtome_fast.studies.demo import Measures, PromptResult, table


def test_demo_writes_a_picture_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "demo.png"
    prompt = "a pixel art person"
    arguments = ["demo", "--prompt", prompt, "-n", "3", "--steps", "4", "--output", str(output)]
    assert main([*arguments, "--alpha", "0.8", "--reference", "others"]) == 0
    printed = capsys.readouterr().out
    assert prompt in printed and "pairwise cosine" in printed and str(output) in printed
    with Image.open(output) as sheet:
        assert sheet.width > 3 * 128
    record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["config"]["alpha"] == 0.8
    (result,) = record["results"]
    assert result["pushed"] > 0
    assert result["without"]["cosine"] != result["guided"]["cosine"]


def test_demo_without_push_changes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "demo.png"
    arguments = ["demo", "--prompt", "baron gold", "-n", "2", "--steps", "2", "--alpha", "0"]
    assert main([*arguments, "--output", str(output)]) == 0
    (result,) = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["results"]
    assert result["without"]["cosine"] == result["guided"]["cosine"]
    assert result["verdict"] == "no change seen"


def measures(cosine: float, agreement: float = 1.0) -> Measures:
    return Measures(seconds=1.0, cosine=cosine, entropy=0.5, agreement=agreement)


@pytest.mark.parametrize(
    ("guided", "words"),
    [
        (measures(0.7), "more diverse"),
        (measures(0.895), "no change seen"),
        (measures(0.95), "less diverse"),
        (measures(0.7, 0.5), "more diverse, off the prompt more often"),
    ],
)
def test_verdict_also_says_where_guidance_does_not_help(guided: Measures, words: str) -> None:
    result = PromptResult("captain red", measures(0.9), guided, pushed=0.5, similarity=0.8)
    assert result.verdict == words
    assert words in table([result])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--prompt", "a pixel art dragon"], "does not know 'dragon'"),
        (["demo", "-n", "1"], "--images must be 2, to differ"),
        (["demo", "--steps", "0"], "--steps must be 1 to 1000, got 0"),
        (["demo", "--alpha", "nan"], "alpha"),
        (["demo", "--threshold", "1.5"], "threshold"),
        (["demo", "--t-start", "100", "--t-end", "500"], "t_"),
        (["demo", "--output", "demo.gif"], "must end in .png"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("negtome-fast: error: ") and message in error
    assert "\n" not in error


def test_triton_by_name_without_a_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from negtome_fast.backends import triton_runtime

    monkeypatch.setattr(triton_runtime, "available", lambda device: (False, "no GPU was found"))
    output = tmp_path / "demo.png"
    assert main(["demo", "--backend", "triton", "--output", str(output)]) == 2
    assert "backend='triton' cannot run here: no GPU was found" in capsys.readouterr().err
    assert not output.exists()


def test_unwritable_output_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["demo", "--output", str(blocked / "demo.png")]) == 2
    assert "negtome-fast: error: " in capsys.readouterr().err


def test_unknown_option_exits_with_2() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--no-such-option"])
    assert stop.value.code == 2


def test_info_says_what_would_be_used_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert negtome_fast.__version__ in printed and 'backend "auto" uses' in printed
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["devices"][0]["device"] == "cpu"
    assert facts["devices"][0]["auto"] == "torch"
    assert facts["packages"]["torch"]


@pytest.mark.parametrize("there", [False, True])
def test_info_says_whether_the_cpu_multiplies_int8_first(
    there: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coarse, "has_int8_products", lambda: there)
    assert main(["info"]) == 0
    assert ("in int8 first" in capsys.readouterr().out) == there


def test_info_shows_the_override(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEGTOME_FAST_BACKEND", "reference")
    assert main(["info"]) == 0
    assert 'backend "auto" uses reference' in capsys.readouterr().out
    monkeypatch.setenv("NEGTOME_FAST_BACKEND", "abacus")
    assert main(["info"]) == 2


def test_info_says_why_an_override_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from negtome_fast.backends import triton_runtime

    monkeypatch.setattr(triton_runtime, "available", lambda device: (False, "no GPU was found"))
    monkeypatch.setenv("NEGTOME_FAST_BACKEND", "triton")
    assert main(["info"]) == 0
    assert "no GPU was found" in capsys.readouterr().out
