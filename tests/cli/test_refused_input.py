"""Wrong pictures, records, settings and arguments are refused by name, before a model is loaded."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from diffusers import FluxPipeline

from helpers.interrupted import NoisePipeline
from negtome_fast import NegToMeConfig, generation
from negtome_fast.cli import main
from negtome_fast.cli.options import printable
from negtome_fast.generation import Settings, generate, nudged
from negtome_fast.generation import run as running
from negtome_fast.generation.call_checks import check_signature
from negtome_fast.generation.loading import check_machine
from negtome_fast.models import model_folder
from negtome_fast.pipelines.pictures import read_frames, read_mask

RUN = ["generate", "--prompt", "a pixel art person", "-n", "2", "--steps", "2", "--quiet"]
NUDGE = ["nudge", "--prompt", "a pixel art person", "-n", "1", "--steps", "2", "--quiet"]


def png_of(width: int, height: int) -> bytes:
    """A picture that says it has this size, without its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


@pytest.fixture(autouse=True)
def here(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> dict[str, bytes]:
    """An own folder with pictures, and models that must not be loaded."""

    def loaded(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    for module in (running, nudged):
        monkeypatch.setattr(module, "load_pipeline", loaded)
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole, coded = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise).save(whole, "PNG")
    Image.fromarray(noise).save(coded, "JPEG")
    Image.fromarray(noise).save("ok.png")
    Path("cut.png").write_bytes(whole.getvalue()[:4000])
    Path("cut.jpg").write_bytes(coded.getvalue()[:1500])
    Path("large.png").write_bytes(png_of(10_000, 10_000))
    Path("huge.png").write_bytes(png_of(50_000, 50_000))
    Path("text.png").write_text("no picture")
    Image.new("L", (64, 64)).save("black.png")
    dot = Image.new("L", (64, 64))
    dot.putpixel((3, 3), 255)
    dot.save("dot.png")
    Path("pictures").mkdir()
    Image.fromarray(noise).save("pictures/ok.png")
    return {path.name: b"" for path in folder.iterdir()}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error; nothing was written."""
    before = set(Path().rglob("*"))
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("negtome-fast: error: ")
    assert set(Path().rglob("*")) == before
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--reference cut.png", "the reference image cut.png cannot be read: "),
        ("--reference cut.jpg", "the reference image cut.jpg cannot be read: "),
        ("--reference large.png", "large.png is too large: 100000000 pixels; at most 89478485"),
        ("--reference huge.png", "huge.png is too large: 2500000000 pixels; at most 89478485"),
        ("--reference text.png", "text.png is not an image that can be read"),
        ("--reference ok.png --mask cut.png", "the mask cut.png cannot be read: "),
        ("--reference ok.png --mask large.png", "the mask large.png is too large"),
        ("--reference ok.png --mask dot.png", "the mask dot.png leaves none of the 8 x 8 tokens"),
        ("--argument latents=1", "--argument latents: they are drawn from the seeds"),
        ("--argument return_dict=false", "--argument return_dict: the images are taken from"),
        ("--argument num_videos_per_prompt=2", "--argument num_videos_per_prompt: the settings"),
        ("--argument joint_attention_kwargs=5", "joint_attention_kwargs=5: FluxPipeline takes d"),
        ("--argument prompt_embeds=[1]", "prompt_embeds=[1]: FluxPipeline takes FloatTensor"),
        ("--argument callback_on_step_end=1", "FluxPipeline takes Callable"),
        ("--argument self=1", "--argument self: FluxPipeline has no self"),
        ("--argument guidance_scale=NaN", "--argument guidance_scale=nan must be finite"),
        ("--argument true_cfg_scale=-1", "must be a number between 0 and 1,000,000, got -1"),
        ("--argument sigmas=[1,Infinity]", "--argument sigmas=inf must be finite"),
        ("--argument num_inference_steps=-3", "--argument num_inference_steps=-3 must be at least"),
        ("--argument max_sequence_length=1" + 30 * "0", "an integer of 31 digits is too large"),
        ("--guidance-scale nan", "--guidance-scale must be a number between 0 and"),
        ("--guidance-scale -1", "--guidance-scale must be a number between 0 and"),
        ("--true-cfg-scale inf", "--true-cfg-scale must be a number between 0 and"),
        ("--blur nan", "--blur must be a number between 0 and"),
        ("--revision main", "--revision main: the embedded model has only one"),
        ("--variant fp16", "--variant fp16: the embedded model has only one"),
        ("--device cpu:3", "--device cpu:3: torch finds 1 cpu device here"),
        ("--device meta", "--device meta computes no images"),
        ("--alpha 1e39", "--alpha must be at most 3.403e+38, the largest in fp32, not 1e+39"),
        ("--groups 7", "--groups 7 does not divide the 2 --images of a batch"),
        ("--groups 2", "one image in each of 2 --groups has no other to differ from"),
        ("--preset sharpen --groups 2", "--groups 2 does not divide the 1 --images of a batch"),
        ("--steps 99999999999", "--steps must be at most 10000, got 99999999999"),
        ("--images 99999999999", "--images must be at most 10000"),
        ("--height 99999999999", "--height must be at most 32768"),
        ("--width 1", "--width must be at least 8 for the embedded model, got 1"),
        ("--seed 1" + 30 * "0", "--seed must be between 0 and 2**63, got 1000"),
        ("--output ok.png/run", "--output ok.png/run cannot be made"),
        ("--output ok.png", "--output ok.png is a file; give a folder"),
    ],
)
def test_generate_refuses_before_the_model_is_loaded(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([*RUN, *words.split()], capsys)


def test_a_backend_that_cannot_run_is_refused_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from negtome_fast.backends import triton_runtime

    monkeypatch.setattr(triton_runtime, "available", lambda device: (False, "Triton needs a GPU"))
    message = "--backend 'triton' cannot run here: Triton needs a GPU"
    words = ["--backend", "triton", "--device", "cpu"]
    assert message in refused([*RUN, *words], capsys)


def test_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"`device` cuda:2: torch finds 2 cuda devices here"):
        check_machine(Settings(device="cuda:2"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--filter hash:inf", "--filter hash:inf: the threshold must lie between 0 and 64"),
        ("--filter hash:2.5", "--filter hash:2.5: a hash's threshold is a number of bits"),
        ("--filter reader:nan", "--filter reader:nan: the threshold must lie between 0 and 1"),
        ("--filter latents:inf", "--filter latents:inf: the threshold must be finite and not"),
        ("--filter features:2", "--filter features:2: the threshold must lie between -1 and 1"),
        ("--guidance-scale nan", "--guidance-scale must be a number between 0 and"),
        ("--revision main", "--revision main: the embedded model has only one"),
        ("--device cpu:2", "--device cpu:2: torch finds 1 cpu device here"),
        ("--max-attempts 999999999", "--max-attempts must be at most 1000, got 999999999"),
        ("--argument latents=1", "--argument latents: they are drawn from the seeds"),
        ("--argument return_dict=false", "--argument return_dict: the images are taken from"),
        ("--argument joint_attention_kwargs=5", "joint_attention_kwargs=5: FluxPipeline takes d"),
        ("--undesired pictures --desired nowhere", "no folder nowhere"),
    ],
)
def test_nudge_refuses_before_the_model_is_loaded(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([*NUDGE, *words.split()], capsys)


def test_a_models_folder_tells_its_pipeline_before_it_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = ["--model", str(model_folder())]
    message = "frobnicate: FluxPipeline has no frobnicate"
    assert message in refused([*RUN, *folder, "--argument", "frobnicate=1"], capsys)
    message = f"--revision main: --model {model_folder()} is a folder"
    assert message in refused([*RUN, *folder, "--revision", "main"], capsys)


def test_plain_values_are_compared_with_annotations() -> None:
    """Numbers stand for each other, lists for tuples; unions, literals and defaults count."""
    fitting: dict[str, Any] = {
        "joint_attention_kwargs": {"scale": 1},
        "sigmas": [1, 0.5],
        "max_sequence_length": 16.0,
        "prompt_2": ["a", "b"],
        "negative_prompt": None,
        "callback_on_step_end_tensor_inputs": ("latents",),
        "num_inference_steps": 5,
    }
    check_signature(FluxPipeline, fitting)
    for name, value in {"sigmas": "x", "max_sequence_length": True, "prompt_2": [1]}.items():
        with pytest.raises(TypeError, match=rf"^`call` {name}=.*: FluxPipeline takes "):
            check_signature(FluxPipeline, {name: value})


def test_late_errors_leave_no_folder_either(tmp_path: Path) -> None:
    """A pipeline may refuse what cannot be known before; references it cannot encode are known."""
    settings = Settings(("x",), "a/b", references=(generation.ReferenceFile("ok.png"),))
    with pytest.raises(ValueError, match="reference images cannot be encoded"):
        generate(settings, tmp_path / "run", pipe=NoisePipeline(), progress=False)
    pipe = NoisePipeline()
    pipe.transformer = NoisePipeline().transformer
    settings = Settings(("x",), "a/b", call={"strength": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoisePipeline, "__call__", failing)
        with pytest.raises(KeyError, match="late"):
            generate(settings, tmp_path / "run", pipe=pipe, progress=False)
    assert not (tmp_path / "run").exists()


def failing(self: Any, prompt: str, generator: Any = None, strength: float = 1.0) -> None:
    raise KeyError("late")


# --------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------
GOOD = {"references": [], "prompts": ["a pixel art person"], "images": 2, "steps": 2}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "run.json is not the record of a run"),
        ({"settings": {}}, "is not the record of a run of negtome-fast generate: it has no "),
        ({"settings": {**GOOD, "references": [5]}}, "is not the record"),
        ({"settings": {**GOOD, "references": [{"image": 5}]}}, "--reference must name files"),
        ({"settings": {**GOOD, "prompts": "abc"}}, "--prompt must be strings, not 'abc'"),
        ({"settings": {**GOOD, "images": "4"}}, "--images must be an integer, not '4'"),
        ({"settings": {**GOOD, "images": 10**30}}, "--images must be at most 10000"),
        ({"settings": {**GOOD, "steps": 10**30}}, "--steps must be at most 10000"),
        ({"settings": {**GOOD, "seed": 1.5}}, "--seed must be an integer, not 1.5"),
        ({"settings": {**GOOD, "call": 5}}, "--argument must map names to values, not 5"),
        ({"settings": {**GOOD, "guidance": [1]}}, "must map names to values, not [1]"),
        ({"settings": {**GOOD, "model": 5}}, "--model must be a string, not 5"),
        ({"settings": {**GOOD, "compare": "no"}}, "--compare must be true or false, not 'no'"),
        ({"settings": {**GOOD, "guidance_scale": 10**400}}, "--guidance-scale must be a number"),
        ({"settings": GOOD, "config": {"alpha": 10**400}}, "alpha must be at most 3.403e+38"),
        ({"settings": GOOD, "config": {"alpha": "x"}}, "alpha must be a number, not str"),
        ({"settings": GOOD, "config": {"seed": 10**30}}, "seed must be below 2**63"),
        ({"settings": {**GOOD, "device": "\x1b[31mcpu"}}, r"--device \x1b[31mcpu is not a device"),
    ],
    ids=str,
)
def test_records_with_wrong_values_are_named(
    record: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(record, dict):
        record.setdefault("config", {})
    Path("run.json").write_text(json.dumps(record))
    assert message in refused(["generate", "--from", "run.json", "--quiet"], capsys)


def test_records_that_are_no_json_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"\xff\xfe", b"[" * 100_000):
        Path("run.json").write_bytes(content)
        line = refused(["generate", "--from", "run.json"], capsys)
        assert "run.json is not the record of a run" in line


@pytest.mark.parametrize("kind", ["absolute", "parent", "link", "mask"])
def test_pictures_outside_of_a_records_folder_are_read_only_if_asked(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run copies its references, so a stranger's record could take any picture along."""
    folder = Path("received")
    folder.mkdir()
    secret = Path("ok.png").resolve()
    named = {"absolute": str(secret), "parent": "../ok.png", "link": "link.png"}.get(kind, "in.png")
    (folder / "link.png").symlink_to(secret)
    (folder / "in.png").write_bytes(secret.read_bytes())
    entry = {"image": named, "mask": str(secret) if kind == "mask" else None}
    record = {"settings": {**GOOD, "references": [entry]}, "config": NegToMeConfig().to_dict()}
    (folder / "run.json").write_text(json.dumps(record))
    line = refused(["generate", "--from", "received", "--quiet"], capsys)
    assert "lies outside of its folder received" in line and "use --trust-paths" in line
    settings = Settings.from_record(folder, trust_paths=True)
    assert Path(settings.references[0].image).resolve().read_bytes() == secret.read_bytes()
    # Other references replace those of the record, which are then not read.
    chosen = (generation.ReferenceFile("ok.png"),)
    assert Settings.from_record(folder, references=chosen).references == chosen


# --------------------------------------------------------------------------------------------
# Pictures and values in Python
# --------------------------------------------------------------------------------------------
def test_a_limit_that_the_caller_raised_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(ValueError, match=r"the picture ok\.png is too large: 4096 pixels"):
        read_frames("ok.png", "picture")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert len(read_frames("ok.png", "picture")) == 1


def test_the_pixels_of_all_frames_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in range(30)]
    frames[0].save("many.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(ValueError, match=r"many\.gif cannot be read: its frames have more than 12"):
        read_frames("many.gif", "reference image")


def test_arrays_without_pixels_are_refused() -> None:
    for read in (read_mask, lambda array: read_frames(array, "picture")):
        with pytest.raises(ValueError, match=r"must have pixels; this array is \(0, 4, 3\)"):
            read(np.zeros((0, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "abc"}, r"`prompts` must be strings, not 'abc'"),
        ({"prompts": ("a", 5)}, r"`prompts` must be strings"),
        ({"images": 2.0}, r"`images` must be an integer, not 2\.0"),
        ({"images": True}, r"`images` must be an integer, not True"),
        ({"steps": "5"}, r"`steps` must be an integer, not '5'"),
        ({"references": ("a.png",)}, r"`references` must be of the type ReferenceFile"),
        ({"call": {"image": Image.new("L", (4, 4))}}, r"`call` image= must be a plain value"),
        ({"blur": "x"}, r"`blur` must be a number, not 'x'"),
        ({"guidance": {"groups": 3}}, r"`groups` 3 does not divide the 4 `images`"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_settings_of_wrong_types_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        Settings(**{"prompts": ("a pixel art person",), **changes}).check()


def test_paths_of_references_may_be_paths() -> None:
    entry = generation.ReferenceFile(Path("ok.png"), Path("dot.png"))
    assert (entry.image, entry.mask) == ("ok.png", "dot.png")


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable("a\x1b[2Jb\x9b\u202ec\udcff é漢") == r"a\x1b[2Jb\x9b\u202ec\udcff é漢"
