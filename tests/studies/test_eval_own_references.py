"""`negtome-fast eval own` with reference images, a negative prompt, and blurred drafts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="the extra 'eval' is not installed")
pytest.importorskip("dicebear", reason="the extra 'eval' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'eval' is not installed")

from helpers.eval_own import CONDITIONS, PROMPTS, run_alone, stored
from negtome_fast import generation
from negtome_fast.cli import main
from negtome_fast.models import model_folder
from negtome_fast.models.features import FeatureExtractor
from negtome_fast.pipelines import Reference, negtome_guidance
from negtome_fast.studies.studies import own
from negtome_fast.studies.studies.own import measuring, results

AVOID = ("--negative-prompt", "captain red", "--guidance-scale", "2.5")


@pytest.fixture(scope="module")
def avoided(tmp_path_factory: pytest.TempPathFactory, picture: Path) -> Path:
    folder = tmp_path_factory.mktemp("avoided")
    mask = str(picture.with_name("top.png"))
    run_alone(folder, *AVOID, "--avoid", str(picture), "--mask", mask)
    return folder


def test_an_image_is_avoided_without_and_with_a_negative_prompt(
    avoided: Path, picture: Path
) -> None:
    result = json.loads((avoided / "own.json").read_text(encoding="utf-8"))
    (part,) = result["scales"]
    assert list(part["conditions"]) == CONDITIONS
    used = [one["negative_prompt"] for one in part["conditions"].values()]
    assert used == [False, True, False, True]
    assert [one["pushed"] > 0 for one in part["conditions"].values()] == [False, False, True, True]
    assert result["better"]["cosine to target"] == "lower"

    # Each is what the pipeline makes of it by itself.
    pipe = generation.load_pipeline(generation.Settings(model=str(model_folder()), device="cpu"))
    config = own.request({"model": "a/b", "prompts": ["x"]}).settings  # the authors' settings
    config = generation.configuration(
        pipe, replace(config, guidance={"threshold": 0.2, "t_end": 0})
    )
    reference = Reference(str(picture), mask=str(picture.with_name("top.png")))
    for negative in ("", "captain red"):
        call = {"true_cfg_scale": 2.5, "negative_prompt": negative, "num_inference_steps": 2}
        call |= {"height": 64, "width": 64, "max_sequence_length": 16}
        with negtome_guidance(pipe, config, alpha=0.9, reference=reference):
            guided = generation.draw(pipe, call, PROMPTS[0], (0, 1))
        plain = generation.draw(pipe, call, PROMPTS[0], (0, 1))
        of_negative = {"call negative_prompt": negative}
        (kept,) = stored(avoided, guidance=None, **of_negative)
        assert np.array_equal(kept, np.stack([np.asarray(image) for image in plain]))
        both = stored(avoided, **of_negative)
        (kept,) = [one for one in both if not np.array_equal(one, kept)]
        assert np.array_equal(kept, np.stack([np.asarray(image) for image in guided]))


def test_likeness_is_to_the_picture_at_the_size_of_the_images(avoided: Path, picture: Path) -> None:
    result = json.loads((avoided / "own.json").read_text(encoding="utf-8"))
    with Image.open(picture) as image:
        target = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS))
    (kept,) = stored(avoided, guidance=None, **{"call negative_prompt": ""})
    extractor = FeatureExtractor()
    images, target = (
        extractor(torch.tensor(a).permute(0, 3, 1, 2) / 255) for a in (kept, target[None])
    )
    expected = torch.nn.functional.cosine_similarity(images, target).mean()
    group = result["scales"][0]["conditions"]["unguided"]["groups"][0]
    assert group["measures"]["cosine to target"] == pytest.approx(float(expected), abs=1e-4)


def test_a_mask_or_another_picture_draws_guided_images_anew(
    avoided: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    real = generation.draw
    monkeypatch.setattr(generation, "draw", lambda *a, **b: drawn.append(a[1]) or real(*a, **b))
    words, store = (*AVOID, "--avoid", str(picture)), avoided / "store"
    run_alone(tmp_path, *words, store=store)
    assert len(drawn) == 4, "without and with the negative prompt, two groups each"
    run_alone(tmp_path, *words, store=store)
    assert len(drawn) == 4
    result = run_alone(tmp_path, *words, "--alpha", "-0.9", store=store)
    assert len(drawn) == 8
    assert result["better"]["cosine to target"] == "higher", "a negative alpha pulls toward it"
    assert result["settings"]["preset"] == "interpolate"


@pytest.mark.parametrize(
    ("alphas", "better"), [((0.5, 0.9), "lower"), ((-0.5, -0.1), "higher"), ((-0.5, 0.5), "")]
)
def test_what_is_better_follows_the_sign_of_alpha(
    alphas: tuple[float, ...], better: str, picture: Path
) -> None:
    references = (generation.ReferenceFile(str(picture)),)
    request = own.request({"model": "a/b", "prompts": ["x"], "references": references})
    found = measuring.Meter(request).better(alphas)
    assert found["cosine to target"] == better
    assert (found["pairwise cosine"], found["Vendi score"]) == ("lower", "higher")
    # A table of one that depends on alpha says no direction.
    assert (
        results._titled({"better": {"cosine to target": ""}}, "cosine to target")[-6:] == "target"
    )


def test_sharpening_goes_away_from_each_images_own_blurred_draft(tmp_path: Path) -> None:
    result = run_alone(tmp_path, "--sharpen", "3", "--alpha", "0.6", "--guidance-scale", "1")
    (part,) = result["scales"]
    guided = part["conditions"]["NegToMe"]
    assert guided["pushed"] > 0 and result["better"]["contrast"] == "higher"
    (draft,) = stored(tmp_path, guidance=None)
    (kept,) = [one for one in stored(tmp_path) if not np.array_equal(one, draft)]

    settings = generation.Settings(
        PROMPTS[:1], str(model_folder()), "sharpen", images=2, steps=2, height=64, width=64,
        blur=3, device="cpu", guidance_scale=1.0, call={"max_sequence_length": 16},
        guidance={"alpha": 0.6, "threshold": 0.2, "t_end": 0},
    )  # fmt: skip
    made = generation.generate(settings, tmp_path / "run", progress=False).guided[0]
    assert np.array_equal(kept, np.stack([np.asarray(image) for image in made]))
    steps = [np.abs(np.diff(kept.mean(-1), axis=axis)).mean() for axis in (1, 2)]
    contrast = guided["groups"][0]["measures"]["contrast"]
    assert contrast == pytest.approx(np.mean(steps), rel=1e-4)


def test_the_report_has_the_results_of_ones_own_model(avoided: Path) -> None:
    assert main(["eval", "report", "--out", str(avoided)]) == 0
    page = (avoided / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2, "the figure and the sheet"
    assert 'id="own"' in page and "<td>NegToMe + negative prompt</td>" in page
    assert str(model_folder()) in page
    assert "the embedded model" not in page, "nothing on this page is about it"
    # The figure is drawn anew of the file of results, the sheet is as it lies there.
    (avoided / "own-measures.png").unlink()
    assert main(["eval", "report", "--out", str(avoided)]) == 0
    assert (avoided / "report.html").read_text(encoding="utf-8") == page


def test_a_result_of_another_version_says_what_to_do(
    tmp_path: Path, avoided: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((avoided / "own.json").read_text(encoding="utf-8"))
    (tmp_path / "own.json").write_text(json.dumps({**result, "schema": 1}), encoding="utf-8")
    assert main(["eval", "report", "--out", str(tmp_path)]) == 2
    assert "own.json is of another version of negtome-fast" in capsys.readouterr().err
