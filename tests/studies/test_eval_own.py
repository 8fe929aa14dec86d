"""`negtome-fast eval own`: what is drawn and measured without and with guidance, and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers", reason="the extra 'eval' is not installed")
pytest.importorskip("dicebear", reason="the extra 'eval' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'eval' is not installed")

from helpers.eval_own import PROMPTS, run
from negtome_fast import generation
from negtome_fast.models import model_folder
from negtome_fast.studies.external import METRICS, Batch, Metric
from negtome_fast.studies.store import load
from negtome_fast.studies.studies import own
from negtome_fast.studies.studies.own import measuring
from negtome_fast.studies.studies.own import run as running
from negtome_fast.studies.studies.own.drawing import DrawPlan


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    run(folder, "--guidance-scale", "1", "2.5")
    return folder


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "own.json").read_text(encoding="utf-8"))


def test_both_conditions_have_the_same_prompts_and_seeds(result: dict[str, Any]) -> None:
    assert [part["guidance_scale"] for part in result["scales"]] == [1, 2.5]
    assert [part["call"]["true_cfg_scale"] for part in result["scales"]] == [1, 2.5]
    for part in result["scales"]:
        assert list(part["conditions"]) == ["unguided", "NegToMe"]
        without, guided = (part["conditions"][name]["groups"] for name in part["conditions"])
        plans = [[(g["prompt"], g["seeds"]) for g in groups] for groups in (without, guided)]
        assert plans[0] == plans[1]
        assert plans[0] == [
            (PROMPTS[0], [0, 1]),
            (PROMPTS[0], [2, 3]),
            (PROMPTS[1], [10_000, 10_001]),
            (PROMPTS[1], [10_002, 10_003]),
        ]
        assert [g["measures"] for g in without] != [g["measures"] for g in guided]
        config = part["conditions"]["NegToMe"]["config"]
        assert config["alpha"] == 0.9 and config["reference"] == "others"
        assert part["drawn"] == "groups within prompts"
        assert all(g["pushed"] > 0 for g in guided) and {g["pushed"] for g in without} == {0.0}


def test_means_differences_and_verdicts_follow_from_the_groups(result: dict[str, Any]) -> None:
    for part in result["scales"]:
        means = {}
        for name, condition in part["conditions"].items():
            values = [g["measures"]["pairwise cosine"] for g in condition["groups"]]
            means[name] = np.mean(values)
            assert condition["measures"]["pairwise cosine"][0] == pytest.approx(
                means[name], abs=1e-4
            )
        assert "compared" not in part["conditions"]["unguided"]
        change = part["conditions"]["NegToMe"]["compared"]["pairwise cosine"]
        difference, low, high = change["difference"]
        assert difference == pytest.approx(means["NegToMe"] - means["unguided"], abs=1e-4)
        assert low <= difference <= high
        expected = "lower" if high < 0 else "higher" if low > 0 else "no change seen"
        assert change["verdict"] == expected


def compared(request: own.Request, values: tuple[float, ...]) -> dict[str, Any]:
    """Both conditions with the same measure "m" in every group."""
    prompts = [group.prompt for group in request.groups()]
    parts = [
        {"prompt": prompt, "seconds_an_image": 1, "pushed": 0, "measures": {"m": value}}
        for prompt, value in zip(prompts, values, strict=True)
    ]
    conditions = request.conditions()
    plans = [DrawPlan(one, None, {}, None) for one in conditions]
    return measuring.compared(plans, {one.name: parts for one in conditions})


def test_no_change_is_said_where_there_is_none() -> None:
    request = own.request({"model": "a/b", "prompts": ["x"], "images": 4, "group": 2})
    found = compared(request, (0.2, 0.7))["conditions"]["NegToMe"]["compared"]
    assert found["m"] == {"difference": [0, 0, 0], "verdict": "no change seen"}


def test_a_prompt_with_one_group_is_drawn_with_the_others() -> None:
    request = own.request({"model": "a/b", "prompts": ["x", "y"], "images": 2, "group": 2})
    assert compared(request, (0.2, 0.7))["drawn"] == "groups"
    with pytest.raises(ValueError, match="an interval needs two groups"):
        replace(request, settings=replace(request.settings, prompts=("x",)))


def test_table_figure_sheet_and_record_are_written(out: Path, result: dict[str, Any]) -> None:
    table = (out / "own.md").read_text(encoding="utf-8")
    assert table == own.table(result) + "\n"
    for word in ("pairwise cosine", "Vendi score", "seconds an image", "4 groups of 2"):
        assert word in table
    assert sorted(own.figures(result)) == ["measures"]
    assert (out / "own-measures.png").read_bytes().startswith(b"\x89PNG")
    assert {"cpu", "commit", "date", "versions", "command", "settings"} <= result.keys()
    assert "diffusers" in result["versions"] and "--guidance-scale 1.0 2.5" in result["command"]
    with Image.open(out / "own-sheet.png") as sheet:
        assert sheet.height > 8 * 160  # two prompts, two scales, two conditions


def test_a_second_run_draws_nothing_and_other_settings_draw_their_own(
    out: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, tuple[int, ...]]] = []
    real = generation.draw

    def counted(pipe: Any, call: Any, prompt: str, seeds: Any, label: Any = None) -> Any:
        drawn.append((prompt, tuple(seeds)))
        return real(pipe, call, prompt, seeds, label)

    monkeypatch.setattr(generation, "draw", counted)
    run(out, "--guidance-scale", "1", "2.5")
    assert drawn == []
    again = json.loads((out / "own.json").read_text(encoding="utf-8"))
    assert again["scales"] == result["scales"]
    # A third prompt is drawn alone, without and with guidance.
    run(out, "--prompt", "a person", "--guidance-scale", "1")
    assert {prompt for prompt, _ in drawn} == {"a person"} and len(drawn) == 4
    drawn.clear()
    run(out, "--guidance-scale", "1", "--alpha", "0.5")
    assert len(drawn) == 4  # guided ones only


def test_an_image_is_that_of_its_seed(out: Path) -> None:
    settings = generation.Settings(
        PROMPTS, str(model_folder()), images=2, steps=2, height=64, width=64, device="cpu",
        guidance_scale=1.0, call={"max_sequence_length": 16},
    )  # fmt: skip
    pipe = generation.load_pipeline(settings)
    call = generation.call_arguments(pipe, settings)
    expected = [np.asarray(i) for i in generation.draw(pipe, call, PROMPTS[0], (0, 1))]
    stored = [load(path)["images"] for path in (out / "store").rglob("*.npz")]
    assert sum(np.array_equal(images, np.stack(expected)) for images in stored) == 1


def test_metrics_of_other_libraries_see_images_and_prompts_of_a_group(
    out: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def double(device: str) -> list[Metric]:
        devices.append(device)

        def measure(batch: Batch) -> float:
            assert batch.images.shape == (2, 3, 64, 64) and batch.prompts is not None
            assert batch.prompts[0] == batch.prompts[1]
            return float(PROMPTS.index(batch.prompts[0]))

        target = Metric("to target", "lower", measure, ("target",))  # left out: there is none
        return [Metric("CLIPScore", "higher", measure, ("prompts",)), target]

    monkeypatch.setitem(METRICS, "clip", double)
    run(out, "--guidance-scale", "1", "--metric", "embedded", "clip")
    again = json.loads((out / "own.json").read_text(encoding="utf-8"))
    (part,) = again["scales"]
    assert devices == ["cpu"]
    guided = part["conditions"]["NegToMe"]["compared"]
    assert list(guided) == ["pairwise cosine", "Vendi score", "CLIPScore"]
    assert part["conditions"]["unguided"]["measures"]["CLIPScore"][0] == 0.5
    assert guided["CLIPScore"]["verdict"] == "no change seen"


def test_many_images_are_announced_before_they_are_drawn(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "_MANY", 1)

    def stop(*_: Any) -> None:
        raise RuntimeError("drawing began")

    monkeypatch.setattr(generation, "draw", stop)
    run(out, "--guidance-scale", "2.5", "4", code=2)
    error = capsys.readouterr().err
    assert "16 images to draw: 2 conditions, 8 images each at each of 2 guidance scales" in error
    assert "; 16 more are in the store" in error
    assert error.index("images to draw") < error.index("drawing began")
