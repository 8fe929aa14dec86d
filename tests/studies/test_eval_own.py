"""`negtome-fast eval own`, with the embedded model's folder as anybody's model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
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

from helpers.families import FAMILIES
from helpers.pipelines_fixtures import sdxl_pipeline
from negtome_fast import generation
from negtome_fast.cli import _reference, build_parser, main
from negtome_fast.models import model_folder
from negtome_fast.models.avatars import CHARACTERS, render
from negtome_fast.models.features import FeatureExtractor
from negtome_fast.pipelines import Reference, negtome_guidance
from negtome_fast.studies.external import METRICS, Batch, Metric
from negtome_fast.studies.sampler import _digest, _load
from negtome_fast.studies.studies import own
from negtome_fast.studies.studies.own import measuring, results
from negtome_fast.studies.studies.own import run as running
from negtome_fast.studies.studies.own.drawing import Plan

PROMPTS = ("a pixel art person", "a voxel art person")
COMMAND = [
    *("eval", "own", "--model", str(model_folder())),
    *("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "-n", "4", "--group", "2"),
    *("--steps", "2", "--height", "64", "--width", "64", "--argument", "max_sequence_length=16"),
    *("--alpha", "0.9", "--threshold", "0.2", "--reference", "others", "--t-end", "0"),
    *("--device", "cpu", "--threads", "1"),
]


def run(out: Path, *words: str, code: int = 0) -> None:
    assert main([*COMMAND, *words, "--out", str(out), "--store", str(out / "store")]) == code


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    plans = [Plan(one, None, {}, None) for one in conditions]
    return measuring.compared(plans, {one.name: parts for one in conditions})


def test_no_change_is_said_where_there_is_none() -> None:
    request = own.request({"model": "a/b", "prompts": ["x"], "images": 4, "group": 2})
    found = compared(request, (0.2, 0.7))["conditions"]["NegToMe"]["compared"]
    assert found["m"] == {"difference": [0, 0, 0], "verdict": "no change seen"}


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
    stored = [_load(path)["images"] for path in (out / "store").rglob("*.npz")]
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metric", "nope"), "--metric nope: there are embedded, dreamsim, clip, lpips"),
        (("--metric", "fid"), "take thousands of images"),
        (("-n", "3"), "-n 3 does not divide into groups of 2"),
        (("-n", "20000"), "-n must be 10000 or fewer images of a prompt"),
        (("--guidance-scale", "nan", "1"), "--guidance-scale must be finite numbers"),
        (("--group", "1"), "--group must be 2 or more images"),
        (("--samples", "8"), "takes -n images for each prompt"),
        (("--steps-window", "0", "0.5"), "two ways to say one thing"),
        (("--guidance-scale", "2", "2"), "--guidance-scale has a value twice"),
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


def test_weights_that_cannot_be_loaded_name_the_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(device: str) -> Metric:
        raise OSError("no connection\nand more")

    monkeypatch.setitem(METRICS, "clip", unreachable)
    run(tmp_path, "--metric", "clip", code=2)
    assert "--metric clip: its weights cannot be loaded: no connection\n" in capsys.readouterr().err


def test_options_of_own_are_refused_by_other_studies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "diversity", "--prompt", "x"]) == 2
    assert "options of eval own, not of diversity" in capsys.readouterr().err
    assert main(["eval", "own", "--prompt", "x"]) == 2
    assert "eval own needs --model and --prompt" in capsys.readouterr().err


def test_a_prompt_with_one_group_is_drawn_with_the_others() -> None:
    request = own.request({"model": "a/b", "prompts": ["x", "y"], "images": 2, "group": 2})
    assert compared(request, (0.2, 0.7))["drawn"] == "groups"
    with pytest.raises(ValueError, match="an interval needs two groups"):
        replace(request, settings=replace(request.settings, prompts=("x",)))


# A reference image, a negative prompt, settings


AVOID = ("--negative-prompt", "captain red", "--guidance-scale", "2.5")
CONDITIONS = ["unguided", "negative prompt", "NegToMe", "NegToMe + negative prompt"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A face of the model's world in a wide frame, and the mask of its upper half."""
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.fromarray(render(CHARACTERS["captain red"][0])).resize((80, 40)).save(path)
    mask = Image.new("L", (40, 40))
    mask.paste(255, (0, 0, 40, 20))
    mask.save(path.with_name("top.png"))
    return path


@pytest.fixture(scope="module")
def avoided(tmp_path_factory: pytest.TempPathFactory, picture: Path) -> Path:
    folder = tmp_path_factory.mktemp("avoided")
    mask = str(picture.with_name("top.png"))
    run_alone(folder, *AVOID, "--avoid", str(picture), "--mask", mask)
    return folder


def run_alone(out: Path, *words: str, store: Path | None = None, code: int = 0) -> dict[str, Any]:
    """One prompt, and no reference within the batch."""
    command = [*COMMAND[:5], PROMPTS[0], *COMMAND[8:]]
    at = command.index("--reference")
    del command[at : at + 2]
    where = ["--out", str(out), "--store", str(store or out / "store")]
    assert main([*command, *words, *where]) == code
    return json.loads((out / "own.json").read_text(encoding="utf-8")) if code == 0 else {}


def stored(out: Path, **parts: Any) -> list[np.ndarray]:
    """Images of the first group, of the conditions whose identity has these parts."""
    found = []
    for path in sorted((out / "store").rglob("condition.json")):
        identity = json.loads(path.read_text(encoding="utf-8"))
        identity |= {f"call {name}": value for name, value in identity["call"].items()}
        if all(identity.get(name) == value for name, value in parts.items()):
            digest = _digest([PROMPTS[0], 0, 1])
            found.append(_load(path.with_name(f"{digest}.npz"))["images"])
    return found


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
    references = [_reference(entry) for entry in values.get("references", ())]
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


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole SDXL pipeline with random weights, as `from_pretrained` expects it."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel
    from transformers import CLIPTextModelWithProjection as Projected

    words = AutoTokenizer.from_pretrained(Path(str(model_folder())) / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=16,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    parts = sdxl_pipeline()
    path = tmp_path_factory.mktemp("sdxl")
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(config), text_encoder_2=Projected(config),
        tokenizer=words, tokenizer_2=words, unet=parts.unet, scheduler=parts.scheduler,
    ).save_pretrained(path)  # fmt: skip
    return path


def test_a_tiny_sdxl(sdxl: Path, tmp_path: Path, picture: Path, capsys: Any) -> None:
    command = ["eval", "own", "--model", str(sdxl), "--prompt", "a person", "-n", "4"]
    command += ["--group", "2", "--steps", "2", "--height", "64", "--width", "64"]
    command += ["--threshold", "-1", "--t-end", "0", "--device", "cpu", "--threads", "1"]
    command += ["--avoid", str(picture), "--negative-prompt", "captain red"]
    command += ["--out", str(tmp_path), "--store", str(tmp_path / "store")]
    assert main(command) == 0
    result = json.loads((tmp_path / "own.json").read_text(encoding="utf-8"))
    (part,) = result["scales"]
    assert result["pipeline"] == "StableDiffusionXLPipeline"
    assert list(part["conditions"]) == CONDITIONS and part["guidance_scale"] is None
    found = [one["groups"][0]["measures"] for one in part["conditions"].values()]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    assert part["conditions"]["NegToMe"]["config"]["min_grid"] == [32, 32]  # the family's
    # At this scale the pipeline leaves the negative prompt out, which is seen by what it draws.
    assert main([*command, "--guidance-scale", "1"]) == 2
    assert "--negative-prompt has no effect without" in capsys.readouterr().err


def test_a_tiny_qwen_image_differs_in_the_negative_prompt_alone(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text encoder is replaced: words become random numbers of their own."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline

    def embeds(self: Any, prompt: Any, device: Any = None, dtype: Any = None) -> Any:
        texts = [prompt] if isinstance(prompt, str) else prompt
        seeds = [torch.Generator().manual_seed(len(text)) for text in texts]
        rows = torch.stack([torch.randn(5, 16, generator=seed) for seed in seeds])
        return rows, torch.ones(len(texts), 5, dtype=torch.long)

    monkeypatch.setattr(QwenImagePipeline, "_get_qwen_prompt_embeds", embeds)
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    parts = FAMILIES["qwen"].build()
    pipe = QwenImagePipeline(parts.scheduler, vae, None, None, parts.transformer)
    monkeypatch.setattr(generation, "load_pipeline", lambda settings: pipe)

    def distance(batch: Batch) -> float:
        assert batch.target is not None and batch.target.shape == (1, 3, 32, 32)
        return float((batch.images - batch.target).abs().mean())

    likeness = [Metric("LPIPS to target", "higher", distance, ("target",))]
    monkeypatch.setitem(METRICS, "lpips", lambda device: likeness)
    calls: list[dict[str, Any]] = []
    real = generation.draw
    monkeypatch.setattr(generation, "draw", lambda *a, **b: calls.append(a[1]) or real(*a, **b))
    request = own.request(
        {
            "model": "owner/qwen", "prompts": ["a person"], "images": 4, "group": 2, "steps": 2,
            "height": 32, "width": 32, "threshold": [-1.0], "t_end": [0.0],
            "negative_prompt": "captain red",
            "references": (generation.ReferenceFile(str(picture)),),
            "metrics": ["lpips"],
        }
    )  # fmt: skip
    result = own.perform(request, tmp_path, tmp_path / "store", progress=False)
    (part,) = result["scales"]
    assert part["conditions"]["NegToMe"]["pushed"] > 0.9
    assert result["better"] == {"LPIPS to target": "higher"}
    # Without any negative prompt this pipeline would have no classifier-free guidance.
    assert {call["negative_prompt"] for call in calls} == {"", "captain red"}
    assert all("true_cfg_scale" not in call for call in calls)


def test_the_report_has_the_results_of_ones_own_model(avoided: Path, out: Path) -> None:
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
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((out / "own.json").read_text(encoding="utf-8"))
    (tmp_path / "own.json").write_text(json.dumps({**result, "schema": 1}), encoding="utf-8")
    assert main(["eval", "report", "--out", str(tmp_path)]) == 2
    assert "own.json is of another version of negtome-fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--avoid", "none.png"), "none.png"),
        (("--avoid", "PICTURE", "--mask", "none.png"), "none.png"),
        (("--avoid", "PICTURE", "--reference", "first"), "with --avoid leave it out"),
        (("--sharpen", "2", "--reference", "first", "others"), "with --sharpen leave it out"),
        (("--avoid", "PICTURE", "--sharpen", "2"), "two studies"),
        (("--sharpen", "0"), "--sharpen is the radius of a blur, above 0"),
        (("--sharpen", "nan"), "--sharpen is the radius of a blur, above 0"),
        (("--alpha", "0.5", "0.5"), "--alpha has a value twice"),
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
        (("--negative-prompt", "x", "--guidance-scale", "1"), "--negative-prompt has no effect"),
        (("--negative-prompt", "x"), "--negative-prompt has no effect"),  # FLUX's own scale is 1
        (("--guidance-scale", "2", "3", "--true-cfg-scale", "2"), "--guidance-scale changes noth"),
    ],
)
def test_what_would_change_nothing_is_refused_before_it_is_drawn(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(generation, "draw", lambda *_: pytest.fail("something was drawn"))
    run(out, *words, code=2)
    assert message in capsys.readouterr().err


def test_a_mask_belongs_to_the_image_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "own", "--mask", "m"])
    assert "--mask belongs to a --avoid, which must come first" in capsys.readouterr().err
