"""Sheets, records and the command line do not call a run guided that was not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.interrupted import NoisePipeline
from helpers.pipelines_fixtures import flux_pipeline
from helpers.pipelines_fixtures import generate as drawn_latents
from negtome_fast import cli
from negtome_fast.generation import (
    GenerationResult,
    ReferenceFile,
    Settings,
    generate,
    load_pipeline,
    outcome,
    told,
)
from negtome_fast.generation import run as running
from negtome_fast.generation.outcome import GUIDED

WIDE = {"threshold": 0.1, "t_end": 0}
MEASURED, NOT_GUIDED = "measured only", "not guided"
EMBEDDED = Settings(prompts=("a pixel art person",), images=2, steps=2, guidance=WIDE)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(EMBEDDED)


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str]]:
    """Headings and captions of the sheets that are drawn."""
    seen: list[tuple[list[str], str]] = []
    real = running.sheet

    def sheet(title: str, rows: Any, footer: str) -> Image.Image:
        seen.append(([row.heading for row in rows], footer))
        return real(title, rows, footer)

    monkeypatch.setattr(running, "sheet", sheet)
    return seen


def run(settings: Settings, folder: Path, pipe: Any) -> GenerationResult:
    return generate(settings, folder, pipe=pipe, progress=False)


def lines(result: GenerationResult) -> list[str]:
    record = result.record
    return [line for one in record["summaries"] for line in told(one, record["warnings"])]


@pytest.mark.parametrize(
    ("guidance", "alphas", "expected", "heading", "line"),
    [
        (WIDE, (), GUIDED, "with NegToMe, same seeds", r"^guided 4 of 4 .* pushed, mean"),
        ({**WIDE, "t_start": 3, "t_end": 2}, (), NOT_GUIDED, "not guided, same seeds",
         r"^NegToMe did not guide: 0 of 4 model forwards lay in the window "),
        ({**WIDE, "alpha": 0}, (), MEASURED, "measured only (alpha 0), same seeds",
         r"^NegToMe measured only, because alpha is 0: 4 of 4 .*matched, mean"),
        ({**WIDE, "threshold": 1}, (), NOT_GUIDED, "not guided, same seeds",
         r"^NegToMe did not guide: in 4 of 4 .* no token was more similar"),
        (WIDE, (0.0, 0.0), MEASURED, "measured only (alpha 0), same seeds",
         r"^NegToMe measured only"),
        ({**WIDE, "alpha": 0}, (None, 0.0), MEASURED, "measured only (alpha 0), same seeds",
         r"^NegToMe measured only"),
        ({**WIDE, "alpha": 0}, (0.9, 0.0), GUIDED, "with NegToMe, same seeds", r"^guided 4 of 4"),
    ],
    ids=["guided", "window", "alpha", "threshold", "references", "reference and run", "one of two"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:no step of this run:UserWarning")
def test_sheet_record_and_line_agree(
    guidance: dict[str, Any],
    alphas: tuple[float | None, ...],
    expected: str,
    heading: str,
    line: str,
    pipe: Any,
    tmp_path: Path,
    sheets: list[tuple[list[str], str]],
) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "#c5281c").save(picture)
    files = tuple(ReferenceFile(str(picture), alpha=alpha) for alpha in alphas)
    settings = replace(EMBEDDED, guidance=guidance, references=files)
    result = run(settings, tmp_path / "run", pipe)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    for record in (result.record, stored):
        assert [summary["verdict"] for summary in record["summaries"]] == [expected]
    ((headings, caption),) = sheets
    assert headings[-1] == heading
    assert (expected in caption) == (expected != GUIDED)
    told_line = lines(result)[0]
    assert re.match(line, told_line)
    assert expected != MEASURED or "pushed" not in told_line


def test_the_command_exits_with_0_and_says_that_nothing_was_guided(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "load_pipeline", lambda settings: pipe)
    words = ["generate", "--prompt", "a pixel art person", "-n", "2", "--steps", "2", "--quiet"]
    window = ["--t-start", "3", "--t-end", "2"]
    assert cli.main([*words, *window, "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "NegToMe did not guide: 0 of 4 model forwards lay in the window" in out
    assert "\nguided" not in out and "pushed" not in out
    measured = ["--alpha", "0", "--threshold", "0.1", "--t-end", "0"]
    assert cli.main([*words, *measured, "--output", str(tmp_path / "zero")]) == 0
    assert "pushed" not in capsys.readouterr().out


class LaterStart(NoisePipeline):
    """An image-to-image pipeline: with `strength` the first steps are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = flux_pipeline()
        self.transformer, self.scheduler = self.inner.transformer, self.inner.scheduler

    def __call__(
        self,
        prompt: Any,
        generator: Any = None,
        num_images_per_prompt: int = 1,
        strength: float = 1.0,
        denoising_start: float | None = None,
    ) -> Any:
        start = 1 - strength if denoising_start is None else denoising_start
        with torch.no_grad():
            drawn_latents(self.inner, num_images_per_prompt, steps=4, sigmas=[
                (1 - start) * (1 - i / 4) for i in range(4)
            ])  # fmt: skip
        return super().__call__(prompt, generator, num_images_per_prompt)


@pytest.mark.parametrize("argument", [{"strength": 0.5}, {"denoising_start": 0.5}], ids=str)
def test_a_run_that_starts_below_the_window_is_not_called_guided(
    argument: dict[str, Any], tmp_path: Path, sheets: list[tuple[list[str], str]]
) -> None:
    settings = Settings(prompts=("x",), model="a/b", images=2, call=argument)
    with pytest.warns(UserWarning, match="nothing is guided"):
        result = run(settings, tmp_path / "run", LaterStart())
    assert any("nothing is guided" in warning for warning in result.record["warnings"])
    assert result.record["summaries"][0]["forwards"] == 4
    assert result.record["summaries"][0]["verdict"] == NOT_GUIDED
    assert sheets[0][0] == ["not guided, same seeds"] and "not guided" in sheets[0][1]
    whole = run(replace(settings, call={}), tmp_path / "whole", LaterStart())
    assert whole.record["summaries"][0]["guided"] > 0


def test_notes_of_a_summary_are_told() -> None:
    """Such as that images of a batch are equal, so that nothing can push them apart."""
    total = {"tokens": 8, "matched": 1.0, "pushed": 1.0, "similarity": 1.0}
    notes = ["a warning", "images are equal"]
    summary = {"guided": 1, "forwards": 1, "total": total, "notes": notes}
    summary |= {"verdict": GUIDED, "sentence": "NegToMe guided 1 of 1"}
    assert told(summary, ["a warning"])[1:] == ["images are equal"]


def test_a_prompt_of_several_batches_is_guided_if_one_is() -> None:
    assert outcome.label([NOT_GUIDED, GUIDED]) == outcome.label([GUIDED])
    assert outcome.caveat([NOT_GUIDED, GUIDED]) == "not guided: 1 of 2 batches"
    assert outcome.caveat([GUIDED]) == "" and outcome.caveat([MEASURED] * 2) == MEASURED
