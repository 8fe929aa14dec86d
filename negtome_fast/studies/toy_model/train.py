"""Train `tiny-flux-avatars` from packages alone: `python -m negtome_fast.studies.toy_model.train`.

Every stage resumes from its checkpoint in `--work`: render the data, train the VAE, encode, train
the rectified-flow transformer with its text encoders, train the attribute reader, and export a
`FluxPipeline` folder.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...models import TEXT_LENGTH
from ...models import avatars as world
from ...models.reader import HEADS, AttributeReader
from .card import model_card
from .data import encode, load_images, scale_latents, to_model_range, training_avatars
from .flow import FlowTask
from .loop import train_loop
from .parts import LATENT_CHANNELS, build_vae


def train_vae(
    images: torch.Tensor, balanced: torch.Tensor, work: Path, steps: int
) -> tuple[Any, dict[str, Any]]:
    """Train the VAE; return it with its record.

    Half of each batch is balanced, so that rare colours become as sharp as common ones.
    """
    torch.manual_seed(1)
    vae = build_vae()
    characters = images[-len(world.CHARACTERS) :]

    def loss_of_step(_: int) -> torch.Tensor:
        drawn = [
            source[torch.randint(len(source), (count,))]
            for source, count in ((images, 8), (balanced, 7), (characters, 1))
        ]
        batch = to_model_range(torch.cat(drawn))
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        return (decoded - batch).abs().mean() + 1e-3 * posterior.kl().mean() / posterior.mean[
            0
        ].numel()

    record = train_loop("VAE", {"vae": vae}, loss_of_step, work / "vae.pt", steps, 2e-3, 0.995)
    vae.eval()
    with torch.no_grad():
        batch = to_model_range(balanced[:512])
        decoded = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
        error = (decoded - batch).square().mean(dim=(1, 2, 3)) / 4
        record["psnr_db"] = round(float((-10 * error.log10()).mean()), 2)
    return vae, record


def save_samples(pipe: Any, path: Path) -> None:
    """Save a grid of samples with a row per prompt, to look at while the training runs."""
    from diffusers.utils import make_image_grid

    pipe.set_progress_bar_config(disable=True)
    prompts = [
        *(world.prompt_for(style) for style in world.STYLES),
        world.prompt_for("pixel art", "dark", "green", "long"),
        world.prompt_for("adventurer", hair_color="red"),
        *world.CHARACTERS,
    ]
    images = pipe(
        [p for p in prompts for _ in range(6)],
        negative_prompt=[""] * 6 * len(prompts),
        true_cfg_scale=2.5,
        height=world.IMAGE_SIZE,
        width=world.IMAGE_SIZE,
        num_inference_steps=20,
        max_sequence_length=TEXT_LENGTH,
        generator=torch.Generator().manual_seed(0),
    ).images
    make_image_grid(images, len(prompts), 6).save(path)


def train_transformer(task: FlowTask, vae: Any, work: Path, steps: int) -> dict[str, Any]:
    """Train transformer and text encoders; return the record."""

    def sample(step: int, modules: dict[str, nn.Module]) -> None:
        if step % 400 == 0 or step == steps:
            save_samples(task.pipeline(vae), work / f"samples-{step:05d}.png")

    return train_loop(
        "transformer",
        task.modules,
        task.loss,
        work / "transformer.pt",
        steps,
        1e-3,
        0.999,
        on_save=sample,
    )


def reader_targets(avatars: Iterable[world.Avatar]) -> dict[str, torch.Tensor]:
    """Return the class of every head for each avatar, `{head: (N,)}`."""
    rows = [{**a.attributes(), "character": a.character or "none"} for a in avatars]
    return {
        head: torch.tensor([values.index(row[head]) for row in rows])
        for head, values in HEADS.items()
    }


def train_reader(
    vae: Any, images: torch.Tensor, avatars: list[world.Avatar], work: Path, steps: int
) -> tuple[AttributeReader, dict[str, Any]]:
    """Train the attribute reader; return it with its record.

    It sees balanced renderings and their VAE reconstructions, so that it knows decoded samples.

    Args:
        vae: the trained VAE.
        images: uint8 (N, 3, 64, 64), the renderings of `avatars`.
        avatars: balanced avatars, ending with the protected characters.
        work: folder of the checkpoint.
        steps: number of steps.
    """
    torch.manual_seed(2)
    characters = len(world.CHARACTERS)
    count = len(avatars) - characters
    with torch.no_grad():
        decoded = torch.cat(
            [
                vae.decode(vae.encode(to_model_range(chunk)).latent_dist.mode()).sample.clamp(-1, 1)
                for chunk in images.split(256)
            ]
        )
    targets = reader_targets(avatars)
    held_out = count // 8
    reader = AttributeReader()
    characters_at = torch.arange(count, count + characters)

    def loss_of_step(_: int) -> torch.Tensor:
        chosen = torch.randint(held_out, count, (96,))
        chosen = torch.cat([chosen, characters_at[torch.randint(characters, (16,))]])
        batch = torch.where(
            (torch.rand(len(chosen)) < 0.5)[:, None, None, None],
            to_model_range(images[chosen]),
            decoded[chosen],
        )
        batch = batch + 0.1 * torch.rand(len(chosen), 1, 1, 1) * torch.randn_like(batch)
        logits = reader(batch)
        return sum(
            (F.cross_entropy(logits[head], targets[head][chosen]) for head in HEADS),
            torch.zeros(()),
        )

    record = train_loop("reader", {"reader": reader}, loss_of_step, work / "reader.pt", steps, 1e-3)
    reader.eval()
    return reader, {**record, **_reader_quality(reader, images, decoded, targets, held_out, count)}


@torch.no_grad()
def _reader_quality(
    reader: AttributeReader,
    images: torch.Tensor,
    decoded: torch.Tensor,
    targets: dict[str, torch.Tensor],
    held_out: int,
    count: int,
) -> dict[str, Any]:
    """Return accuracies on the first `held_out` images; characters begin at `count`."""
    found: dict[str, Any] = {}
    for key, source in (
        ("rendered", to_model_range(images[:held_out])),
        ("decoded", decoded[:held_out]),
    ):
        logits = reader(source)
        found[f"held_out_accuracy_{key}"] = {
            head: round(
                float((logits[head].argmax(-1) == targets[head][:held_out]).float().mean()), 4
            )
            for head in world.ATTRIBUTES
        }
    shown = reader(decoded[count:])["character"].argmax(-1)
    found["characters_recognised"] = int((shown == targets["character"][count:]).sum())
    mistaken = reader(decoded[:held_out])["character"].argmax(-1) != 0
    found["false_characters"] = int(mistaken.sum())
    found["held_out_images"] = held_out
    return found


def export(pipe: Any, reader: AttributeReader, record: dict[str, Any], out: Path) -> None:
    """Write the pipeline in bf16 safetensors, the reader beside it, the record and the card."""
    from safetensors.torch import save_file

    pipe = pipe.to(torch.bfloat16)
    # The text encoders stay in fp32: transformers loads the dtype of the file and diffusers fp32,
    # so a plain `from_pretrained` would otherwise mix dtypes.
    pipe.text_encoder.float()
    pipe.text_encoder_2.float()
    pipe.save_pretrained(out)
    (out / "reader").mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.half() for k, v in reader.state_dict().items()}, out / "reader" / "reader.safetensors"
    )
    reader_card = {"width": 32, "heads": {k: list(v) for k, v in HEADS.items()}, **record["reader"]}
    (out / "reader" / "reader.json").write_text(
        json.dumps(reader_card, indent=1) + "\n", encoding="utf-8"
    )
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    card = model_card(record, parameters, LATENT_CHANNELS)
    (out / "README.md").write_text(card, encoding="utf-8")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m negtome_fast.studies.toy_model.train", description=__doc__
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/tiny-flux-avatars"),
        help="folder of the checkpoints",
    )
    out = Path("build/tiny-flux-avatars/pipeline")
    parser.add_argument("--out", type=Path, default=out, help="folder of the pipeline")
    parser.add_argument("--images", type=int, default=20_000, help="skewed training images")
    parser.add_argument("--vae-steps", type=int, default=2_400)
    parser.add_argument("--steps", type=int, default=2_800, help="transformer steps")
    parser.add_argument("--reader-steps", type=int, default=900)
    parser.add_argument("--balanced-images", type=int, default=6_000, help="VAE and reader")
    parser.add_argument(
        "--unusual-images", type=int, default=10_000, help="whose captions teach words"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="sentence for the model card")
    parser.add_argument("--processes", type=int, default=2, help="worker processes of rendering")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    avatars = training_avatars(options.images, options.seed)
    images = load_images(options.work / "skewed.npy", avatars, options.processes)
    everybody = training_avatars(options.balanced_images, options.seed + 1_000, "balanced")
    balanced = load_images(options.work / "balanced.npy", everybody, options.processes)
    exceptions = training_avatars(options.unusual_images, options.seed + 2_000, "unusual")
    unusual = load_images(options.work / "unusual.npy", exceptions, options.processes)
    record: dict[str, Any] = {
        "images": len(images),
        "seed": options.seed,
        "note": options.note,
        "batch": options.batch,
        "majority_share": world.MAJORITY_SHARE,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    vae, record["vae"] = train_vae(images, balanced, options.work, options.vae_steps)
    vae.requires_grad_(False)
    latents = scale_latents(
        vae,
        encode(vae, images, options.work / "latents.pt"),
        encode(vae, unusual, options.work / "unusual-latents.pt"),
    )
    torch.manual_seed(options.seed + 3)
    task = FlowTask(latents, avatars, exceptions, options.batch)
    record["transformer"] = train_transformer(task, vae, options.work, options.steps)
    reader, record["reader"] = train_reader(
        vae, balanced, everybody, options.work, options.reader_steps
    )
    export(task.pipeline(vae), reader, record, options.out)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
