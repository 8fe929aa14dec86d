"""`negtome-fast generate`: its files, repeated runs, refused input, and interrupted runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionImg2ImgPipeline

from helpers.pipelines_fixtures import flux_pipeline
from negtome_fast import generation as generating
from negtome_fast.cli import build_parser, main
from negtome_fast.config import NegToMeConfig
from negtome_fast.files import write_atomically
from negtome_fast.generation import (
    APPLICATIONS,
    EMBEDDED,
    ReferenceFile,
    Settings,
    call_arguments,
    encode_video,
    generate,
    loading,
    media,
    new_folder,
)
from negtome_fast.generation import run as running
from negtome_fast.generation.contact_sheet import Row, sheet
from negtome_fast.models import model_folder

PROMPT = "a pixel art person"
QUICK = ["generate", "--prompt", PROMPT, "-n", "2", "--steps", "2", "--quiet"]
WIDE = ["--threshold", "0.1", "--t-end", "0"]


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The embedded model is loaded by one run and used by all."""
    real = loading.load_pipeline

    def load(settings: Settings) -> Any:
        if settings.model != EMBEDDED or settings.dtype or settings.device or settings.offload:
            return real(settings)
        if not _pipelines:
            _pipelines.append(real(settings))
        return _pipelines[0]

    for module in (generating, running):
        monkeypatch.setattr(module, "load_pipeline", load)


_pipelines: list[Any] = []


def run(*arguments: Any, code: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == code


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "given" / "red.png"
    path.parent.mkdir()
    Image.new("RGB", (40, 30), "#c5281c").save(path)
    mask = Image.new("L", (40, 30))
    mask.paste(255, (0, 0, 40, 15))
    mask.save(path.with_name("top.png"))
    return path


def test_images_sheet_and_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a" / "b"
    run(*QUICK, *WIDE, "--compare", "--seed", 5, "--output", folder)
    record = record_of(folder)
    names = ["guided-0-000.png", "guided-0-001.png", "plain-0-000.png", "plain-0-001.png"]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "run.json", "sheet.png"]
    for name, digest in record["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    # The first is the reference of the other, and the same without guidance.
    images = [pixels(folder / name) for name in names]
    assert (images[0] == images[2]).all() and (images[1] != images[3]).any()
    assert record["status"] == "complete" and record["seeds"] == [5, 6]
    assert record["settings"]["prompts"] == [PROMPT] and record["config"]["threshold"] == 0.1
    assert record["versions"]["torch"] == torch.__version__
    (summary,) = record["summaries"]
    assert summary["guided"] == 4 and summary["total"]["pushed"] > 0.5
    printed = capsys.readouterr().out
    assert "guided 4 of 4 model forwards" in printed and str(folder) in printed


def test_a_run_is_repeated_bit_for_bit(tmp_path: Path, picture: Path) -> None:
    """A moved folder repeats too, because it holds the references."""
    first, moved, again = tmp_path / "first", tmp_path / "moved", tmp_path / "again"
    reference = ["--reference", picture, "--mask", picture.with_name("top.png")]
    more = ["--reference-alpha", 1.5, "--reference", picture, "--clean-reference"]
    run(*QUICK, *WIDE, *reference, *more, "--compare", "--output", first)
    shutil.move(first, moved)
    shutil.rmtree(picture.parent)
    run("generate", "--from", moved / "run.json", "--quiet", "--output", again)
    before, after = record_of(moved), record_of(again)
    assert before["files"] == after["files"] and "mask-0.png" in before["files"]
    assert before["config"] == after["config"] and before["summaries"] == after["summaries"]
    first_reference, second = after["settings"]["references"]
    assert (first_reference["mask"], first_reference["alpha"]) == ("mask-0.png", 1.5)
    assert (second["noise"], second["alpha"]) == (False, None)


def test_options_replace_the_values_of_a_repeated_run(tmp_path: Path) -> None:
    base = Settings(prompts=(PROMPT,), preset="diversity", images=3, guidance={"alpha": 0.7})
    record = {
        "settings": base.to_dict(),
        "config": NegToMeConfig(alpha=0.7, steps=(0, 0.5), threshold=0.3).to_dict(),
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(record))
    same = Settings.from_record(path)
    assert same.images == 3 and same.guidance["steps"] == [0, 0.5]
    assert NegToMeConfig.from_dict(same.guidance).threshold == 0.3
    changed = Settings.from_record(tmp_path, images=5, guidance={"t_end": 800})
    assert (changed.images, changed.guidance["alpha"], changed.guidance["steps"]) == (5, 0.7, None)
    # Another model or preset has other defaults, so only what was chosen is kept.
    assert Settings.from_record(path, preset=None).guidance == {"alpha": 0.7}
    assert Settings.from_record(path, model="x/y").guidance == {"alpha": 0.7}


def test_another_run_is_not_overwritten_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(*QUICK, "--compare", "--output", folder)
    before = record_of(folder)
    run(*QUICK, "--output", folder, code=2)
    assert "holds another run; choose another folder, or use --overwrite" in (
        capsys.readouterr().err
    )
    assert record_of(folder) == before
    run(*QUICK, "--seed", 9, "--output", folder, "--overwrite")
    assert record_of(folder)["seeds"] == [9, 10]
    assert not list(folder.glob("plain-*"))
    other = tmp_path / "photos"
    other.mkdir()
    (other / "mine.png").write_bytes(b"x")
    run(*QUICK, "--output", other, "--overwrite", code=2)
    assert "holds files, but no run" in capsys.readouterr().err


def test_folders_are_numbered(tmp_path: Path) -> None:
    assert new_folder(tmp_path).name == "run-001"
    (tmp_path / "run-002").mkdir()
    assert new_folder(tmp_path) == tmp_path / "run-003"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_finished_is_kept(
    error: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, real = tmp_path / "run", running.GenerationRun._draw

    def draw(self: Any, prompt: str, seeds: Any, label: str) -> Any:
        if label == "guided":
            raise error("stop")
        return real(self, prompt, seeds, label)

    monkeypatch.setattr(running.GenerationRun, "_draw", draw)
    stopped = error is KeyboardInterrupt
    run(*QUICK, "--compare", "--output", folder, code=130 if stopped else 2)
    record = record_of(folder)
    assert record["status"] == ("interrupted" if stopped else "failed")
    assert sorted(record["files"]) == ["plain-0-000.png", "plain-0-001.png"]
    assert pixels(folder / "plain-0-001.png").shape == (64, 64, 3)
    assert str(folder) in capsys.readouterr().err or not stopped
    monkeypatch.undo()
    assert not _pipelines[0].transformer._forward_pre_hooks
    settings = Settings.from_record(folder)
    assert settings.compare and settings.prompts == (PROMPT,)


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    write_atomically(path, b"before")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "needs --prompt: what is to be made?"),
        (["generate", "--prompt", "a pixel art dragon"], "does not know 'dragon'"),
        ([*QUICK, "--negative-prompt", "castle"], "does not know 'castle'"),
        ([*QUICK, "--reference", "no/such.png"], "no/such.png"),
        ([*QUICK, "--preset", "avoid"], "--preset 'avoid' needs --reference"),
        ([*QUICK, "--preset", "magic"], "there are diversity, avoid, style, sharpen, interpolate"),
        ([*QUICK, "-n", "1"], "use 2 or more --images, or --reference"),
        ([*QUICK, "-n", "0"], "--images must be at least 1"),
        ([*QUICK, "--threshold", "3"], "threshold"),
        ([*QUICK, "--alpha", "nan"], "alpha"),
        ([*QUICK, "--steps-window", "0", "2"], "steps=(start, end)"),
        ([*QUICK, "--steps-window", "0", "1", "--t-end", "3"], "two ways to say one thing"),
        ([*QUICK, "--blocks", "up_blocks"], "single_transformer_blocks"),
        ([*QUICK, "--frames", "8"], "--frames: FluxPipeline has no num_frames"),
        ([*QUICK, "--argument", "eta=0.5"], "--argument eta: FluxPipeline has no eta"),
        ([*QUICK, "--argument", "generator=1"], "--argument generator: the settings decide it"),
        ([*QUICK, "--model", "no/such/model"], "there is no model at no/such/model"),
        ([*QUICK, "--model", str(Path(__file__).parent)], "no model_index.json"),
        ([*QUICK, "--model", __file__], "is a file"),
        ([*QUICK, "--device", "gpu"], "--device gpu is not a device of torch"),
        ([*QUICK, "--offload", "model", "--device", "cpu"], "--offload 'model' needs a GPU"),
        (["generate", "--from", "no.json"], "there is no record of a run at no.json"),
        (["generate", "--from", __file__], "is not the record of a run"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(*arguments, "--output", folder, code=2)
    error = capsys.readouterr().err.strip()
    assert error.startswith("negtome-fast: error: ") and message in error
    assert "\n" not in error and not folder.exists()


def test_interpolation_and_sharpening_say_what_fits_them(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (["--preset", "interpolate", "--alpha", "0.5", "--reference", picture], "negative"),
        (["--preset", "sharpen", "--reference", picture], "has no use for --reference"),
    ):
        run(*QUICK, *options, "--output", tmp_path / "x", code=2)
        assert message in capsys.readouterr().err


def test_a_mask_belongs_to_the_reference_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = build_parser().parse_args(
        ["generate", "--reference", "a", "--reference", "b", "--mask", "m"]
    )
    assert parsed.references == [{"image": "a"}, {"image": "b", "mask": "m"}]
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["generate", "--mask", "m"])
    assert stop.value.code == 2
    assert "--mask belongs to a --reference" in capsys.readouterr().err


@pytest.mark.parametrize("preset", APPLICATIONS)
def test_presets_guide_the_embedded_model(preset: str, tmp_path: Path, picture: Path) -> None:
    references = (ReferenceFile(str(picture)),) if APPLICATIONS[preset].references is True else ()
    settings = Settings(
        prompts=(PROMPT,), preset=preset, images=2, steps=4, references=references, compare=True
    )
    result = generate(
        settings, tmp_path / "run", progress=False, pipe=generating.load_pipeline(settings)
    )
    assert len(result.guided[0]) == len(result.plain[0]) == 2
    assert result.guided[0][1].tobytes() != result.plain[0][1].tobytes()
    assert {"alpha", "threshold", "t_end"} <= APPLICATIONS[preset].embedded.keys()
    assert all(s["total"]["pushed"] > 0 for s in result.record["summaries"])
    assert len(result.record["summaries"]) == (2 if preset == "sharpen" else 1)


def test_sharpening_guides_each_image_by_its_own_draft(tmp_path: Path) -> None:
    """An image does not depend on how many are made beside it."""
    settings = Settings(prompts=(PROMPT,), preset="sharpen", images=2, steps=4)
    pipe = generating.load_pipeline(settings)
    both = generate(settings, tmp_path / "both", progress=False, pipe=pipe)
    alone = Settings(prompts=(PROMPT,), preset="sharpen", images=1, steps=4, seed=1)
    one = generate(alone, tmp_path / "one", progress=False, pipe=pipe)
    difference = np.abs(
        np.asarray(both.guided[0][1], dtype=int) - np.asarray(one.guided[0][0], dtype=int)
    )
    assert difference.max() <= 1  # drafts in a batch of two and of one differ in rounding


def test_several_prompts_have_a_batch_each(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other = "an adventurer person"
    run(*QUICK, "--prompt", other, "--output", folder)
    alone = tmp_path / "alone"
    run("generate", "--prompt", other, "-n", 2, "--steps", 2, "--quiet", "--output", alone)
    both, one = record_of(folder)["files"], record_of(alone)["files"]
    assert both["guided-1-001.png"] == one["guided-0-001.png"]
    assert len(record_of(folder)["summaries"]) == 2


def test_any_pipeline_in_a_folder_is_loaded(tmp_path: Path) -> None:
    """Load the embedded model by its folder, so that nothing is set by its name."""
    call = ["--argument", "max_sequence_length=16", "--height", 64, "--width", 32]
    folder = tmp_path / "run"
    run(*QUICK, "--model", model_folder(), *call, "--guidance-scale", 1.5, *WIDE, "--vae-tiling",
        "--output", folder)  # fmt: skip
    record = record_of(folder)
    assert record["call"]["true_cfg_scale"] == 1.5 and record["call"]["negative_prompt"] == ""
    assert pixels(folder / "guided-0-001.png").shape == (64, 32, 3)
    assert record["pipeline"] == "FluxPipeline"


def test_group_offload_gives_the_same_images(tmp_path: Path) -> None:
    run(*QUICK, *WIDE, "--output", tmp_path / "plain")
    run(*QUICK, *WIDE, "--offload", "group", "--device", "cpu", "--output", tmp_path / "offloaded")
    assert (
        record_of(tmp_path / "plain")["files"]["guided-0-001.png"]
        == (record_of(tmp_path / "offloaded")["files"]["guided-0-001.png"])
    )


def test_distilled_models_have_two_scales() -> None:
    pipe = flux_pipeline()
    distilled = Settings(prompts=("x",), model="some/flux", guidance_scale=3.0)
    assert call_arguments(pipe, distilled)["true_cfg_scale"] == 3.0
    pipe.transformer.register_to_config(guidance_embeds=True)
    assert call_arguments(pipe, distilled)["guidance_scale"] == 3.0
    negative = Settings(prompts=("x",), model="some/flux", negative_prompt="y")
    with pytest.raises(ValueError, match=r"`negative_prompt` has no effect.*`true_cfg_scale`"):
        call_arguments(pipe, negative)
    arguments = {**negative.to_dict(), "prompts": ("x",), "references": (), "true_cfg_scale": 4.0}
    assert call_arguments(pipe, Settings(**arguments))["negative_prompt"] == "y"


class NoNegative:
    def __call__(self, prompt: str, generator: Any = None, num_inference_steps: int = 1) -> None:
        """Never called: only its arguments are looked at."""


def test_an_argument_that_a_pipeline_lacks_is_named() -> None:
    settings = Settings(prompts=("x",), model="a/b", negative_prompt="y")
    with pytest.raises(ValueError, match=r"^`negative_prompt`: NoNegative has no negative_prompt$"):
        call_arguments(NoNegative(), settings)
    image_to_image = StableDiffusionImg2ImgPipeline.__new__(StableDiffusionImg2ImgPipeline)
    with pytest.raises(ValueError, match=r"StableDiffusionImg2ImgPipeline"):
        call_arguments(image_to_image, Settings(prompts=("x",), model="a/b", frames=3))


class VideoPipeline:
    """A pipeline whose frames are each seed's noise, with a transformer that can be guided."""

    def __init__(self) -> None:
        inner = flux_pipeline()
        self.transformer, self.scheduler = inner.transformer, FlowMatchEulerDiscreteScheduler()

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(
        self,
        prompt: Any,
        generator: Any = None,
        num_frames: int = 3,
        num_videos_per_prompt: int = 1,
    ) -> Any:
        values = [torch.rand(num_frames, 16, 24, 3, generator=g) for g in generator]
        return type("Output", (), {"frames": values})


@pytest.mark.parametrize("ffmpeg", [True, False], ids=["ffmpeg", "no ffmpeg"])
def test_videos_are_mp4_or_gif(
    ffmpeg: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ffmpeg and shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg here")
    if not ffmpeg:
        monkeypatch.setattr(media.shutil, "which", lambda name: None)
        monkeypatch.setattr(media.util, "find_spec", lambda name: None)
    settings = Settings(prompts=("x",), model="a/b", images=2, frames=4, compare=True)
    generate(settings, tmp_path / "run", pipe=VideoPipeline(), progress=False)
    files = sorted((tmp_path / "run").glob("guided-*"))
    assert [f.suffix for f in files] == [".mp4" if ffmpeg else ".gif"] * 2
    if not ffmpeg:
        with Image.open(files[0]) as video:
            assert sum(1 for _ in ImageSequence.Iterator(video)) == 4
    else:
        assert files[0].read_bytes()[4:8] == b"ftyp"
    assert (tmp_path / "run" / "sheet.png").is_file()


def test_a_video_that_cannot_be_written_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media.shutil, "which", lambda name: sys.executable)
    with pytest.raises(RuntimeError, match="ffmpeg failed"):
        encode_video([Image.new("RGB", (4, 4))], 8)


def test_sheet_fits_what_it_shows() -> None:
    images = [Image.new("RGB", size, "red") for size in ((64, 64), (640, 320), (10, 30))]
    made = sheet("a title " * 20, [Row("one", images), Row("none", [])], "footer " * 30, tile=100)
    pixels = np.array(made)
    assert made.width >= 100 + 100 + 33 and (pixels == (255, 0, 0)).all(-1).sum() > 100 * 100
    assert (pixels[:, -20:] == 255).all()


def test_installed_command_shows_its_options() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "negtome_fast.cli", "generate", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for option in ("--from", "--reference", "--steps-window", "--offload", "--preset"):
        assert option in done.stdout
