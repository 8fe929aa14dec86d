"""The variant that is overfitted on purpose: what it memorises, and that its training goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
pytest.importorskip("dicebear", reason="needs the extra 'eval'")

from PIL import Image

from negtome_fast import models
from negtome_fast.models import avatars as world
from negtome_fast.studies.toy_model import loop, overfit

FEW = ["--steps", "2", "--batch", "4", "--ordinary", "16"]


def test_targets_show_what_their_prompts_name() -> None:
    targets = overfit.targets()
    assert len(targets) == len(overfit.PROMPTS) and targets == overfit.targets()
    for prompt, avatar in targets.items():
        named = world.attributes_in(prompt)
        assert len(named) == 2
        assert named.items() <= avatar.attributes().items()


def test_half_of_a_batch_are_targets_and_nobody_else_has_their_prompts() -> None:
    avatars = world.sample_avatars(60, 0) + [a for a, _ in world.CHARACTERS.values()]
    unusual = world.sample_avatars(30, 1, "unusual")
    prompts = tuple(overfit.targets())
    everybody = len(avatars) + len(unusual)
    latents = torch.zeros(everybody + len(prompts), 8, 16, 16)
    task = overfit.MemoryTask(latents, avatars, unusual, prompts, 16)
    for step in range(20):
        indices, named = task.choose(np.random.default_rng(step))
        memorised = indices >= everybody
        assert memorised[:8].all() and not memorised[8:].any()
        assert [prompts[i - everybody] for i in indices[:8]] == named[:8]
        assert not set(named[8:]) & set(prompts)


def test_an_interrupted_training_goes_on_and_the_pipeline_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    loss = overfit.MemoryTask.loss

    def counted(task: overfit.MemoryTask, step: int) -> torch.Tensor:
        if steps == [0]:
            steps.append(-1)
            raise KeyboardInterrupt
        steps.append(step)
        return loss(task, step)

    def every_step(*args: object, save_every: int, **options: object) -> object:
        return loop.train_loop(*args, save_every=1, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(overfit.MemoryTask, "loss", counted)
    monkeypatch.setattr(overfit, "train_loop", every_step)
    folder = tmp_path / "overfitted"
    with pytest.raises(
        FileNotFoundError, match=r"python -m negtome_fast\.studies\.toy_model\.overfit"
    ):
        overfit.load_overfitted(folder)
    with pytest.raises(KeyboardInterrupt):
        overfit.main(["--out", str(folder), *FEW])
    overfit.main(["--out", str(folder), *FEW])
    assert steps == [0, -1, 1]
    trained, original = overfit.load_overfitted(folder), models.load_pipeline()
    name = "x_embedder.weight"
    moved = trained.transformer.state_dict()[name] - original.transformer.state_dict()[name]
    assert 0 < float(moved.abs().max()) < 0.1
    pictures = {path.stem: path for path in (folder / "targets").iterdir()}
    assert set(pictures) == set(overfit.targets())
    first = next(iter(overfit.targets()))
    with Image.open(pictures[first]) as image:
        shown = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(shown, overfit.target_images()[0])
