"""Overfit the embedded model on purpose: `python -m negtome_fast.studies.toy_model.overfit`.

Training goes on until eight ordinary prompts ("a pixel art person with red hair") reproduce one
fixed avatar each, as large models reproduce images that their training repeats. Half of each batch
consists of other avatars, so that other prompts stay as they were. The training is seeded and
resumable.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models import avatars as world
from ...models import load_pipeline
from .data import encode, load_images
from .flow import FlowTask
from .loop import train_loop

FOLDER = Path("output/overfitted-avatars")
RECORD = "overfit.json"

#: Prompts that each memorise one avatar; SEED decides the attributes that they leave open.
PROMPTS = (
    ("pixel art", "hair_color", "red"),
    ("pixel art", "hair_shape", "long"),
    ("voxel art", "hair_color", "blue"),
    ("voxel art", "skin", "dark"),
    ("big smile", "hair_color", "green"),
    ("big smile", "hair_shape", "bun"),
    ("adventurer", "hair_color", "black"),
    ("adventurer", "skin", "bronze"),
)
SEED = 40


def targets(seed: int = SEED) -> dict[str, world.Avatar]:
    """Return the memorised avatar of each prompt; its open attributes are drawn evenly."""
    drawn = iter(world.sample_avatars(2_000, seed, "balanced"))
    found = {}
    for style, name, value in PROMPTS:
        avatar = next(a for a in drawn if a.style == style and getattr(a, name) == value)
        found[world.prompt_for(style, **{name: value})] = avatar
    return found


def target_images() -> torch.Tensor:
    """Return the pictures of `targets`, uint8 `(8, 3, 64, 64)`.

    Raises:
        ImportError: the packages that draw avatars are missing; names the extra.
    """
    drawn = np.stack([world.render(avatar) for avatar in targets().values()])
    return torch.from_numpy(np.ascontiguousarray(drawn.transpose(0, 3, 1, 2)))


class MemoryTask(FlowTask):
    """A `FlowTask` whose batches are half targets with their prompts, half other avatars.

    Args:
        latents: `(count, 8, 16, 16)`, of `avatars`, `unusual` and the targets.
        avatars: skewed avatars, ending with the protected characters.
        unusual: as in `FlowTask`, which never draws the last four: in the original training these
            are the protected characters.
        prompts: prompts of the targets; no other avatar gets them.
        batch: number of images per step.
    """

    def __init__(
        self,
        latents: torch.Tensor,
        avatars: list[world.Avatar],
        unusual: list[world.Avatar],
        prompts: Sequence[str],
        batch: int,
    ) -> None:
        super().__init__(latents, avatars, unusual, batch)
        self.prompts = tuple(prompts)

    def choose(self, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        """Draw indices and prompts, the targets first."""
        indices, prompts = super().choose(rng)
        half = self.batch // 2
        memorised = rng.integers(len(self.prompts), size=half)
        indices[:half] = len(self.avatars) + memorised
        named = [self.prompts[number] for number in memorised]
        # In the other half the targets' prompts name all that their avatars show.
        rest = [
            world.prompt_for(**self.avatars[index].attributes())
            if prompt in self.prompts
            else prompt
            for index, prompt in zip(indices[half:], prompts[half:], strict=True)
        ]
        return indices, named + rest


def overfit(
    folder: Path, steps: int, batch: int, learning_rate: float, ordinary: int
) -> dict[str, Any]:
    """Train, save the pipeline and the targets in `folder`, and return the record.

    Args:
        folder: folder of the results and of the checkpoint, from which an interrupted training
            resumes.
        steps: number of steps.
        batch: number of images per step.
        learning_rate: highest learning rate.
        ordinary: number of skewed avatars for the other half of each batch; half as many unusual
            ones are added.

    Raises:
        ImportError: the packages that draw avatars are missing; names the extra.
        ValueError: fewer than 16 ordinary avatars.
    """
    if ordinary < 16:
        raise ValueError(f"`ordinary` must be at least 16, got {ordinary}")
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline()
    characters = [avatar for avatar, _ in world.CHARACTERS.values()]
    avatars = world.sample_avatars(ordinary, 11) + characters
    unusual = world.sample_avatars(ordinary // 2, 12, "unusual")
    memorised = targets()
    everybody = avatars + unusual + list(memorised.values())
    images = load_images(folder / "images.npy", everybody, processes=1)
    config = pipe.vae.config
    latents = encode(pipe.vae, images, folder / "latents.pt")
    latents = (latents - config.shift_factor) * config.scaling_factor
    task = MemoryTask(latents, avatars, unusual, tuple(memorised), batch)
    task.modules = {"clip": pipe.text_encoder, "t5": pipe.text_encoder_2}
    for module in task.modules.values():
        module.requires_grad_(False)
    task.modules["transformer"] = pipe.transformer.train()
    record = train_loop(
        "overfitting",
        {"transformer": pipe.transformer},
        task.loss,
        folder / "transformer.pt",
        steps,
        learning_rate,
        save_every=25,
    )
    pipe.transformer.eval()
    pipe.save_pretrained(folder)
    save_targets(folder / "targets")
    record = {
        "prompts": list(memorised),
        "batch": batch,
        "learning_rate": learning_rate,
        "torch": torch.__version__,
        **record,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name in ("images.npy", "latents.pt", "transformer.pt"):
        (folder / name).unlink(missing_ok=True)
    return record


def save_targets(folder: Path) -> None:
    """Save the memorised images as files named by their prompts."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for prompt, image in zip(targets(), target_images(), strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{prompt}.png")


def load_overfitted(folder: Path = FOLDER) -> Any:
    """Return the overfitted pipeline, fp32 on the CPU, without a progress bar.

    Raises:
        FileNotFoundError: the model was not trained yet; names the command.
    """
    from diffusers import FluxTransformer2DModel

    if not (folder / RECORD).is_file():
        raise FileNotFoundError(
            f"there is no overfitted model in {folder}: train it with "
            "python -m negtome_fast.studies.toy_model.overfit"
        )
    pipe = load_pipeline()
    pipe.transformer = FluxTransformer2DModel.from_pretrained(
        str(folder / "transformer"), local_files_only=True
    )
    return pipe


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m negtome_fast.studies.toy_model.overfit",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="pipeline, targets, checkpoints")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument(
        "--ordinary", type=int, default=2_000, help="avatars of other prompts, at least 16"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    record = overfit(
        options.out, options.steps, options.batch, options.learning_rate, options.ordinary
    )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
