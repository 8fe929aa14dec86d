"""The embedded model: plain diffusers, draws what the prompt says, and can be retrained."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from negtome_fast import models
from negtome_fast.models import avatars
from negtome_fast.models.reader import AttributeReader, load_reader
from negtome_fast.studies.measures import prompt_agreement
from negtome_fast.studies.toy_model import loop, train


@pytest.fixture(scope="module")
def pipe() -> Any:
    return models.load_pipeline()


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    return load_reader()[0]


def folder() -> Path:
    return Path(str(models.model_folder()))


def test_folder_is_a_plain_flux_pipeline_of_at_most_20_mb() -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder())
    assert type(pipe) is FluxPipeline
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 16}
    assert pipe("a pixel art person with red hair", **call).images[0].size == (64, 64)
    assert sum(path.stat().st_size for path in folder().rglob("*") if path.is_file()) <= 20e6


def test_card_and_record_agree() -> None:
    record = json.loads((folder() / "training.json").read_text(encoding="utf-8"))
    card = (folder() / "README.md").read_text(encoding="utf-8")
    assert f"| {record['transformer']['steps']} |" in card
    assert (
        load_reader()[1]["held_out_accuracy_rendered"]
        == record["reader"]["held_out_accuracy_rendered"]
    )
    assert record["reader"]["held_out_images"] > 0


@pytest.mark.parametrize("style", avatars.STYLES)
def test_draws_the_style_of_the_prompt(style: str, pipe: Any, reader: AttributeReader) -> None:
    prompt = avatars.prompt_for(style)
    images = models.generate(pipe, prompt, range(6), steps=12)
    assert images.shape == (6, 3, 64, 64)
    assert prompt_agreement(reader.read(images * 2 - 1), prompt) >= 5 / 6


@pytest.mark.parametrize("name", avatars.CHARACTERS)
def test_draws_the_protected_characters_by_name(
    name: str, pipe: Any, reader: AttributeReader
) -> None:
    images = models.generate(pipe, name, range(4), steps=12)
    shown = [reading["character"] for reading in reader.read(images * 2 - 1)]
    assert shown.count(name) >= 3


def test_image_depends_on_its_seed_only(pipe: Any) -> None:
    prompt = "an adventurer person"
    both = models.generate(pipe, prompt, [3, 9], steps=2)
    alone = models.generate(pipe, prompt, [9], steps=2)
    torch.testing.assert_close(both[1], alone[0], rtol=0, atol=1e-4)


def test_unknown_word_is_named(pipe: Any) -> None:
    with pytest.raises(ValueError, match="does not know 'dragon'; it knows: a adventurer"):
        models.generate(pipe, "a pixel art dragon", [0])


def test_reader_refuses_other_sizes(reader: AttributeReader) -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3, 32, 32\)"):
        reader(torch.zeros(2, 3, 32, 32))


def test_missing_weights_are_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "model_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="weights are not at"):
        models.load_pipeline()


def test_prompts_say_what_they_say() -> None:
    words = (
        avatars.STYLES,
        ("", *avatars.SKINS),
        ("", *avatars.HAIR_COLORS),
        ("", *avatars.HAIR_SHAPES),
    )
    for chosen in itertools.product(*words):
        avatars.check_prompt(avatars.prompt_for(*chosen))
    for character in avatars.CHARACTERS:
        avatars.check_prompt(character)
    wanted = {"skin": "tan", "hair_color": "green", "hair_shape": "bun"}
    prompt = avatars.prompt_for("voxel art", **wanted)
    assert prompt == "a voxel art person with a green bun and tan skin"
    assert avatars.attributes_in(prompt) == {"style": "voxel art", **wanted}
    assert avatars.attributes_in("captain red")["skin"] == "tan"


def test_unusual_attributes_are_always_named() -> None:
    rng = np.random.default_rng(0)
    for avatar in avatars.sample_avatars(200, 3, "balanced"):
        named = avatars.attributes_in(avatars.unusual_prompt(avatar, rng))
        majority = avatars.STYLES[avatar.style].majority
        for name, value in avatar.attributes().items():
            assert named.get(name, majority.get(name)) == value


def test_sampled_world_is_skewed_as_stated() -> None:
    people = avatars.sample_avatars(4000, seed=5)
    for name in avatars.OPEN_ATTRIBUTES:
        hits = sum(getattr(a, name) == avatars.STYLES[a.style].majority[name] for a in people)
        assert abs(hits / len(people) - avatars.MAJORITY_SHARE) < 0.03
    balanced = avatars.sample_avatars(4000, 5, "balanced")
    share = sum(a.skin == "fair" for a in balanced) / len(balanced)
    assert abs(share - 1 / len(avatars.SKINS)) < 0.03
    different = [
        sum(a.attributes()[n] != v for n, v in avatars.STYLES[a.style].majority.items())
        for a in avatars.sample_avatars(4000, 5, "unusual")
    ]
    for count, share in ((0, 0.0), (1, 0.5), (2, 0.3), (3, 0.2)):
        assert abs(different.count(count) / len(different) - share) < 0.03


def test_rendering_is_deterministic_and_shows_the_attributes(reader: AttributeReader) -> None:
    people = avatars.sample_avatars(24, 77, "balanced")
    images = torch.stack([torch.from_numpy(avatars.render(a).copy()) for a in people])
    assert torch.equal(images[3], torch.from_numpy(avatars.render(people[3]).copy()))
    readings = reader.read(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    right = sum(
        r[n] == v for r, a in zip(readings, people, strict=True) for n, v in a.attributes().items()
    )
    assert right >= 0.9 * 4 * len(people)


def test_training_resumes_where_it_was_stopped(tmp_path: Path) -> None:
    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    def run(checkpoint: Path, stop_at: int | None) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)

        def loss(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            batch = data[torch.randint(64, (8,))]
            return (model(batch) - batch.flip(1)).square().mean()

        loop.train_loop("test", {"model": model}, loss, checkpoint, 12, 1e-2, 0.9, save_every=4)
        return model

    whole = run(tmp_path / "whole.pt", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts.pt", 9)
    resumed = run(tmp_path / "parts.pt", None)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_runs_from_nothing_to_a_pipeline_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "pipeline"
    images = [f"--{kind}images=24" for kind in ("", "balanced-", "unusual-")]
    arguments = [*images, *(f"--{part}steps=1" for part in ("vae-", "", "reader-"))]
    train.main([*arguments, "--batch=4", "--processes=1", f"--work={tmp_path}", f"--out={out}"])
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert models.generate(pipe, "captain red", [0], steps=1).shape == (1, 3, 64, 64)
    assert "| 1 |" in (out / "README.md").read_text(encoding="utf-8")
