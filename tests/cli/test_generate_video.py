"""`negtome-fast generate` on a text-to-video model: a tiny Wan folder, from prompt to file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.families import FAMILIES
from helpers.families.core import FLOW
from helpers.families.videos import WAN_VAE
from negtome_fast.cli import main
from negtome_fast.generation import encode_video

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "cat", "walks")
FRAMES, HEIGHT, WIDTH = 5, 32, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole WanPipeline with random weights, as `from_pretrained` expects it."""
    from diffusers import WanPipeline
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformer = FAMILIES["wan"].denoiser.build()
    width = transformer.config.text_dim
    torch.manual_seed(0)
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    pipe = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=text_encoder,
        vae=WAN_VAE.build(),
        scheduler=FLOW.build(),
        transformer=transformer,
    )
    path = tmp_path_factory.mktemp("wan")
    pipe.save_pretrained(path)
    return path


def generate(*arguments: Any) -> int:
    return main(["generate", "--quiet", *map(str, arguments)])


def frames(path: Path) -> list[Image.Image]:
    """Read a video file with the reader that a player would use."""
    imageio_ffmpeg = pytest.importorskip(
        "imageio_ffmpeg", reason='the extra "video" is not installed'
    )
    reader = imageio_ffmpeg.read_frames(str(path))
    size = next(reader)["size"]
    return [Image.frombytes("RGB", size, frame) for frame in reader]


def settings(folder: Path) -> list[Any]:
    size = ["--height", HEIGHT, "--width", WIDTH, "--frames", FRAMES]
    run = ["--model", folder, "--prompt", "a red cat walks", "-n", 2, "--steps", 3, *size]
    call = ["--argument", "max_sequence_length=8", "--guidance-scale", 3]
    return [*run, *call, "--threshold", 0.1, "--t-end", 0, "--compare"]


def test_a_text_to_video_model_from_the_prompt_to_the_file_and_again(
    folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("imageio_ffmpeg", reason='the extra "video" is not installed')
    assert generate(*settings(folder), "--output", tmp_path / "run") == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["summaries"][0]["total"]["pushed"] > 0
    videos = sorted((tmp_path / "run").glob("*.mp4"))
    assert len(videos) == 4, "two guided, two without guidance"
    for video in videos:
        shown = frames(video)
        assert len(shown) == FRAMES and shown[0].size == (WIDTH, HEIGHT)
    with Image.open(tmp_path / "run/sheet.png") as sheet:
        assert sheet.width > 2 * WIDTH
    plain = {path.name.split("-", 1)[1]: path for path in videos if "guided" not in path.name}
    guided = {path.name.split("-", 1)[1]: path for path in videos if "guided" in path.name}
    assert plain.keys() == guided.keys()
    first, second = sorted(plain)
    assert plain[first].read_bytes() == guided[first].read_bytes(), "item 0 is the reference"
    assert plain[second].read_bytes() != guided[second].read_bytes()

    assert generate("--from", tmp_path / "run/run.json", "--output", tmp_path / "again") == 0
    for video in videos:
        assert (tmp_path / "again" / video.name).read_bytes() == video.read_bytes()


def test_a_video_model_takes_an_image_to_avoid(folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "reference.png"
    Image.new("RGB", (40, 40), "red").save(image)
    options = [
        *settings(folder),
        "--reference",
        image,
        "--vae-tiling",
        "--output",
        tmp_path / "run",
    ]
    assert generate(*options) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["summaries"][0]["total"]["pushed"] > 0


def test_imageio_brings_the_encoder_where_the_system_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("imageio_ffmpeg", reason='the extra "video" is not installed')
    monkeypatch.setattr("negtome_fast.generation.media.shutil.which", lambda name: None)
    pictures = [Image.new("RGB", (33, 17), colour) for colour in ("red", "green", "blue")]
    suffix, content = encode_video(pictures, 8)
    assert suffix == ".mp4"
    (tmp_path / "video.mp4").write_bytes(content)
    shown = frames(tmp_path / "video.mp4")
    assert len(shown) == 3 and shown[0].size == (34, 18)
    assert [max(range(3), key=frame.getpixel((9, 9)).__getitem__) for frame in shown] == [0, 1, 2]
