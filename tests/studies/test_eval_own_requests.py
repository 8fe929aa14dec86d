"""`negtome-fast eval own`: the conditions of a request, and requests that are refused."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="the extra 'eval' is not installed")
pytest.importorskip("dicebear", reason="the extra 'eval' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'eval' is not installed")

from helpers.eval_own import COMMAND, run, run_alone
from negtome_fast import generation
from negtome_fast.cli import build_parser, main
from negtome_fast.cli.options import reference_file
from negtome_fast.studies.external import METRICS, Metric
from negtome_fast.studies.studies import own


def test_settings_that_are_nearly_equal_are_two_conditions() -> None:
    request = own.request({"model": "a/b", "prompts": ["x"], "alpha": [0.1234567, 0.1234568]})
    assert len(request.conditions()) == 3


def test_every_combination_of_settings_is_a_condition(tmp_path: Path) -> None:
    words = ("--alpha", "0.3", "0.9", "--reference", "first", "others", "--guidance-scale", "2.5")
    result = run_alone(tmp_path, *words)
    (part,) = result["scales"]
    found = {
        name: one["config"] and (one["config"]["alpha"], one["config"]["reference"])
        for name, one in part["conditions"].items()
    }
    assert found == {
        "unguided": None,
        "NegToMe, alpha 0.3, reference first": (0.3, "first"),
        "NegToMe, alpha 0.3, reference others": (0.3, "others"),
        "NegToMe, alpha 0.9, reference first": (0.9, "first"),
        "NegToMe, alpha 0.9, reference others": (0.9, "others"),
    }
    assert all(
        one["config"]["threshold"] == 0.2 and one["config"]["t_end"] == 0
        for one in part["conditions"].values()
        if one["config"]
    )
    # Each against unguided, by hand.
    off = [g["measures"]["Vendi score"] for g in part["conditions"]["unguided"]["groups"]]
    rows = (tmp_path / "own.md").read_text(encoding="utf-8").splitlines()
    for name, one in part["conditions"].items():
        if name != "unguided":
            own_values = [g["measures"]["Vendi score"] for g in one["groups"]]
            difference = one["compared"]["Vendi score"]["difference"][0]
            assert difference == pytest.approx(np.mean(own_values) - np.mean(off), abs=1e-4)
            assert sum(f"| {name} | " in row for row in rows) == 3, "two measures and the cost"
    measures = own.figures(result)["measures"].axes
    assert [len(axes.containers) for axes in measures] == [5, 5]
    assert [label.get_text() for label in measures[0].get_yticklabels()] == list(part["conditions"])


def test_windows_thresholds_and_their_names() -> None:
    options = {"model": "a/b", "prompts": ["x"], "threshold": [0.5, 0.7]}
    request = own.request({**options, "steps_window": [[0, 0.25], [0.5, 1.0]], "alpha": [0.4]})
    assert request.settings.guidance == {"alpha": 0.4}
    assert request.guidances == {
        "NegToMe, threshold 0.5, steps 0 to 0.25": {"threshold": 0.5, "steps": (0, 0.25)},
        "NegToMe, threshold 0.5, steps 0.5 to 1": {"threshold": 0.5, "steps": (0.5, 1.0)},
        "NegToMe, threshold 0.7, steps 0 to 0.25": {"threshold": 0.7, "steps": (0, 0.25)},
        "NegToMe, threshold 0.7, steps 0.5 to 1": {"threshold": 0.7, "steps": (0.5, 1.0)},
    }
    assert "--steps-window 0 0.25 --steps-window 0.5 1.0" in request.command
    several = own.request({**options, "t_end": [900, 700], "t_start": 950})
    assert several.settings.guidance == {"t_start": 950}
    assert [one["t_end"] for one in several.guidances.values()] == [900, 700, 900, 700]


def asked(words: list[str], picture: Path | None = None) -> own.Request:
    """The request of a command's options, `picture` in place of the files that it names."""
    found = vars(build_parser().parse_args(["eval", "own", *words]))
    common = ("command", "study", "samples", "quick", "out", "store", "threads")
    values = {name: value for name, value in found.items() if name not in common}
    references = [reference_file(entry) for entry in values.get("references", ())]
    if picture is not None:
        files = {"image": str(picture), "mask": str(picture.with_name("top.png"))}
        references = [replace(entry, **files) for entry in references]
    if references:
        values["references"] = tuple(references)
    return own.request(values)


def test_the_recorded_command_asks_for_the_same(picture: Path) -> None:
    words = [*COMMAND[2:12], "--avoid", str(picture), "--clean-reference", "--avoid", str(picture)]
    words += ["--mask", str(picture), "--negative-prompt", "a b", "--alpha", "-0.5", "0.5"]
    words += ["--argument", 'a="1"', "--true-cfg-scale", "3", "--t-end", "700"]
    request = asked(words)
    assert [one.noise for one in request.settings.references] == [False, True]
    assert request.settings.call == {"a": "1"}
    assert asked(shlex.split(request.command)[3:]) == request


def test_the_commands_of_the_page_can_be_run(picture: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "measures.md").read_text(encoding="utf-8")
    commands = re.findall(r"^negtome-fast eval own (.*?[^\\])$", page, re.M | re.S)
    requests = [
        asked(shlex.split(text.replace("\\\n", " ").replace("PATH_OR_HUB_ID", "a/b")), picture)
        for text in commands
    ]
    counts = [len(request.conditions()) for request in requests]
    assert counts == [2, 17, 4, 5, 3], "as the page says"
    assert len(requests[1].groups()) * 4 * counts[1] == 544
    presets = [request.settings.preset for request in requests]
    assert presets == [None, None, "avoid", "avoid", "sharpen"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metric", "nope"), "'nope' is unknown, choose from embedded, dreamsim, clip, lpips"),
        (("--metric", "fid"), "take thousands of images"),
        (("-n", "3"), " must divide into groups of 2, got 3"),
        (("-n", "20000"), " must be 10000 or fewer for each prompt, got 20000"),
        (("--guidance-scale", "nan", "1"), " must be finite numbers"),
        (("--group", "1"), " must be 2 or more images, got 1"),
        (("--samples", "8"), "takes -n images for each prompt"),
        (("--steps-window", "0", "0.5"), "two ways to say one thing"),
        (("--guidance-scale", "2", "2"), " has a value twice"),
        (("--model", "./none"), "there is no model at ./none"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    run(tmp_path / "out", *words, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["nope"]}, "^`metrics`: 'nope' is unknown"),
        ({"images": 3}, "^`images` must divide into groups of 2"),
        ({"images": 20_000}, "^`images` must be 10000 or fewer for each prompt"),
        ({"group": 1}, "^`group` must be 2 or more images"),
        ({"scales": [float("nan")]}, "^`guidance_scale` must be finite numbers"),
        ({"scales": [2.0, 2.0]}, "^`guidance_scale` has a value twice"),
        ({"steps_window": [[0, 1], [0, 1]]}, "^`steps_window` has a value twice"),
        ({"sharpen": 0.0}, "^`sharpen` is the radius of a blur"),
        ({"sharpen": 2.0, "reference": ["first"]}, "leave it out with `sharpen`"),
        (
            {"negative_prompt": "x", "call": [("negative_prompt", "y")]},
            "^`negative_prompt` is also",
        ),
    ],
    ids=str,
)
def test_errors_of_a_request_name_its_fields(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own.request({"model": "a/b", "prompts": ["x"], "images": 4, "group": 2, **change})


def test_weights_that_cannot_be_loaded_name_the_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(device: str) -> Metric:
        raise OSError("no connection\nand more")

    monkeypatch.setitem(METRICS, "clip", unreachable)
    run(tmp_path, "--metric", "clip", code=2)
    assert "the weights of clip cannot be loaded: no connection\n" in capsys.readouterr().err


def test_options_of_own_are_refused_by_other_studies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "diversity", "--prompt", "x"]) == 2
    assert "options of eval own, not of diversity" in capsys.readouterr().err
    assert main(["eval", "own", "--prompt", "x"]) == 2
    assert "eval own needs " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--avoid", "none.png"), "none.png"),
        (("--avoid", "PICTURE", "--mask", "none.png"), "none.png"),
        (
            ("--avoid", "PICTURE", "--reference", "first"),
            " chooses among the images of a group; leave it out",
        ),
        (
            ("--sharpen", "2", "--reference", "first", "others"),
            " chooses among the images of a group; leave it out",
        ),
        (("--avoid", "PICTURE", "--sharpen", "2"), "two studies"),
        (("--sharpen", "0"), " is the radius of a blur, above 0"),
        (("--sharpen", "nan"), " is the radius of a blur, above 0"),
        (("--alpha", "0.5", "0.5"), " has a value twice"),
        (("--threshold", "0.5", "2"), "threshold is a cosine similarity"),
        (("--t-start", "800", "--t-end", "700", "900"), "t_start=800 lies below t_end=900"),
        (("--negative-prompt", "x", "--argument", "negative_prompt=y"), "give one of them"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_model_is_loaded(
    tmp_path: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    def loaded(settings: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generation, "load_pipeline", loaded)
    given = [str(picture) if word == "PICTURE" else word for word in words]
    run_alone(tmp_path / "out", *given, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--negative-prompt", "x", "--guidance-scale", "1"),
            " has no effect without",
        ),
        (
            ("--negative-prompt", "x"),
            " has no effect without",
        ),  # FLUX's own scale is 1
        (("--guidance-scale", "2", "3", "--true-cfg-scale", "2"), " changes nothing: another "),
    ],
)
def test_what_would_change_nothing_is_refused_before_it_is_drawn(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(generation, "draw", lambda *_: pytest.fail("something was drawn"))
    run(tmp_path, *words, code=2)
    assert message in capsys.readouterr().err


def test_a_mask_belongs_to_the_image_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "own", "--mask", "m"])
    assert "--mask belongs to a --avoid, which must come first" in capsys.readouterr().err
