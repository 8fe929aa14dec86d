"""The study of nudging: its rehearsal, its store, and the page that is made of its results."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
pytest.importorskip("dicebear", reason="needs the extra 'eval'")

from bench.results import FOLDER
from docs.render.pages import render
from negtome_fast.cli import build_parser
from negtome_fast.models import avatars as world
from negtome_fast.models.reader import load_reader
from negtome_fast.studies.sampler import Sampler
from negtome_fast.studies.studies import STUDIES, nudging
from negtome_fast.studies.studies.nudging import cost, drawing, subjects
from negtome_fast.studies.studies.nudging.run import run as run_study
from negtome_fast.studies.studies.study import Sizes, StudyRun

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "nudging.md").read_text(encoding="utf-8")
RESULT = FOLDER / "eval" / "nudging.json"


def result_of(memorised: float, frechet: list[float], agreement: float) -> dict[str, Any]:
    """As much of a result as the goal looks at."""
    compared = {"frechet": frechet, "agreement": [agreement, 0, 0]}
    method = {
        "name": "nudge",
        "measures": {"memorised": [memorised, 0, 0]},
        "against_reseeding": compared,
    }
    return {"subjects": [{"label": "one", "methods": [method]}]}


# --------------------------------------------------------------------------------------------
# The study
# --------------------------------------------------------------------------------------------
def test_ordinary_avatars_show_what_the_prompt_names_and_differ() -> None:
    images = subjects.fitting("a voxel art person with blue hair", 6, 3)
    readings = load_reader()[0].read(images.float() / 127.5 - 1)
    assert all(r["style"] == "voxel art" and r["hair_color"] == "blue" for r in readings)
    assert len({tuple(reading.values()) for reading in readings}) > 1
    assert torch.equal(images, subjects.fitting("a voxel art person with blue hair", 6, 3))


def test_a_rehearsal_measures_every_method_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in set(subjects.METHODS) - {"reseed", "nudge"}:
        monkeypatch.delitem(subjects.METHODS, name)
    sampler = Sampler(tmp_path / "store")
    run = StudyRun(
        sampler, Sizes(images=16, group=2, steps=3, quick=True), tmp_path, progress=False
    )
    result = run_study(run)
    (subject,) = result["subjects"]
    assert subject["images"] == 4 and subject["prompts"] == list(world.CHARACTERS)[:2]
    names = [one["name"] for one in subject["methods"]]
    assert names == ["plain", "reseed", "nudge"]
    plain, reseed, moved = (one["measures"] for one in subject["methods"])
    assert plain["generations"][0] == 1.0
    assert plain["memorised"][0] == reseed["memorised"][0] == 1.0
    # Steered away: farther from the memorised image than other noise of the same prompt.
    assert moved["pixels"][0] > 1.5 * reseed["pixels"][0]
    assert set(subject["projection"]) == {"explained", "real", "targets", *names}
    assert all(len(values) == 4 for values in subject["pixels"].values())
    assert set(run.pictures) == {"characters"}

    def never(*_: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(drawing.SubjectDrawing, "_generated", never)
    assert run_study(run) == result


@pytest.mark.parametrize(
    ("measured", "answers"),
    [
        ((0.0, [-2, -3, -1], -0.01), ["yes", "yes (-2)", "yes"]),
        ((0.01, [2, 1, 3], -0.02), ["no", "no (+2)", "no"]),
        ((0.0, [2, -1, 5], 0.02), ["yes", "no change seen (+2)", "yes"]),
    ],
    ids=str,
)
def test_the_goal_asks_for_all_three(measured: Any, answers: list[str]) -> None:
    (found,) = nudging.goal(result_of(*measured)).values()
    assert list(found.values()) == answers


def test_samples_must_divide_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects.overfit, "main", None)
    for samples in (10, 12):
        with pytest.raises(ValueError, match="must be a multiple of 12, at least 24"):
            run_study(StudyRun(Sampler(None), Sizes(images=samples), tmp_path))


def test_cost_is_measured_in_turns(tmp_path: Path) -> None:
    order: list[str] = []
    work = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    times = cost.interleaved(work, 2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    found = cost.added({"base": [1.0, 2.0, 1.0], "other": [1.1, 2.2, 1.1]}, "base", 2)
    assert found["base"] == {"seconds_per_image": 0.5}
    assert found["other"]["added"] == [0.1, 0.1, 0.1]
    sizes = Sizes(images=1, group=1, steps=2, quick=True)
    result = cost.run(StudyRun(Sampler(None), sizes, tmp_path, progress=False))
    assert set(result["untriggered"]) == {"filters alone", "loop"}
    assert set(result["triggered"]) == {"plain", "reseed", "negtome", "nudge", "both"}


# --------------------------------------------------------------------------------------------
# docs/nudging.md
# --------------------------------------------------------------------------------------------
def test_the_page_is_that_of_the_results() -> None:
    assert render("docs/nudging.md", PAGE) == PAGE
    stale = PAGE.replace("| --- |", "| --- | --- |", 1)
    assert render("docs/nudging.md", stale) == PAGE != stale


def test_figures_of_the_page_come_from_the_files(tmp_path: Path) -> None:
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    record["subjects"][0]["methods"][1]["measures"]["cosine"][0] = 0.1234
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "nudging.json").write_text(json.dumps(record))
    marked = "<!-- begin: study -->\n<!-- end: study -->"
    assert " 0.12 " in render("docs/nudging.md", marked, tmp_path)
    assert "not measured" in render("docs/nudging.md", marked, tmp_path / "nowhere")


def test_pictures_exist_and_can_be_drawn_from_the_result() -> None:
    for target in re.findall(r"\]\((pictures/[^)]+)\)", PAGE):
        assert (DOCS / target).is_file(), target
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert set(nudging.figures(result)) == {"distances", "arrows"}


def test_commands_and_examples_of_the_page_are_understood() -> None:
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        compile(block, "nudging.md", "exec")
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    for line in filter(None, shell.splitlines()):
        program, *arguments = shlex.split(line, comments=True)
        assert program == "negtome-fast"
        build_parser().parse_args(arguments)
    for name in re.findall(r"negtome-fast eval ([\w-]+)", PAGE):
        assert name in STUDIES
