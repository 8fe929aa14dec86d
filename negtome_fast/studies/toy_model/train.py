"""Train `tiny-flux-avatars` from packages alone: `python -m negtome_fast.studies.toy_model.train`.

Stages, each resumable from its checkpoint in `--work`: render the data, train the VAE, encode,
train the rectified-flow transformer with its text encoders, train the attribute reader, export
a `FluxPipeline` folder. Loss of the flow: `|v(x_t, t) - (noise - x_0)|^2` at
`x_t = (1 - t) x_0 + t noise`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...models import avatars as world
from ...models.reader import HEADS, AttributeReader
from .card import model_card

TEXT_LENGTH = 16
TEXT_WIDTH = 64
LATENT_CHANNELS = 8


# --------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------
def build_tokenizers() -> tuple[Any, Any]:
    """Word-level tokenizers in the format of CLIP (bos, eos) and of T5 (eos)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "</s>", "<unk>", "<s>")
    vocab = {word: number for number, word in enumerate((*special, *world.vocabulary()))}

    def build(template: str, max_length: int) -> Any:
        backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, vocab[token]) for token in ("<s>", "</s>")]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
            bos_token="<s>",
            model_max_length=max_length,
        )

    return build("<s> $A </s>", TEXT_LENGTH), build("$A </s>", 512)


def build_text_encoders(vocab_size: int) -> tuple[nn.Module, nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=3,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    return clip, t5


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=world.IMAGE_SIZE,
    )


def build_transformer() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 14, 14),
    )


# --------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------
def training_avatars(count: int, seed: int, kind: world.Kind = "skewed") -> list[world.Avatar]:
    """Avatars of one kind, then one entry for each protected character."""
    return world.sample_avatars(count, seed, kind) + [a for a, _ in world.CHARACTERS.values()]


def load_images(path: Path, avatars: list[world.Avatar], processes: int) -> torch.Tensor:
    """Rendered images, `(count, 3, 64, 64)` uint8, cached in `path`."""
    if path.exists():
        images = np.load(path)
        if len(images) == len(avatars):
            return torch.from_numpy(images)
    images = np.ascontiguousarray(world.render_all(avatars, processes).transpose(0, 3, 1, 2))
    np.save(path, images)
    return torch.from_numpy(images)


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1.0


# --------------------------------------------------------------------------------------------
# One resumable loop for all three trainings
# --------------------------------------------------------------------------------------------
def train_loop(
    name: str,
    modules: dict[str, nn.Module],
    loss_of_step: Callable[[int], torch.Tensor],
    checkpoint: Path,
    steps: int,
    learning_rate: float,
    ema_decay: float = 0.0,
    save_every: int = 200,
    on_save: Callable[[int, dict[str, nn.Module]], None] | None = None,
) -> dict[str, Any]:
    """Warm up, hold, and decay over the last quarter; saves, resumes, and returns its record.

    With `ema_decay > 0` the modules hold the exponential moving average when it returns.
    """
    from tqdm import tqdm

    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    average = [p.detach().clone() for p in parameters]
    start, seconds, history = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        start, seconds, history = state["step"], state["seconds"], state["history"]

    def save(step: int) -> None:
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "modules": {key: module.state_dict() for key, module in modules.items()},
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step,
                "seconds": seconds,
                "history": history,
            },
            partial,
        )
        partial.replace(checkpoint)

    def swap_average() -> None:
        with torch.no_grad():
            for parameter, smooth in zip(parameters, average, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(smooth)
                smooth.copy_(kept)

    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, unit="step")
    running = None
    for step in bar:
        began = time.perf_counter()
        decay = min(1.0, (steps - step) / max(1, steps // 4))
        optimizer.param_groups[0]["lr"] = learning_rate * decay * min(1.0, (step + 1) / 100)
        torch.manual_seed(step + 1)
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ema_decay:
            weight = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - weight)
        value = float(loss.detach())
        running = value if running is None else 0.98 * running + 0.02 * value
        seconds += time.perf_counter() - began
        bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            history.append([step + 1, round(running, 5)])
            save(step + 1)
            if on_save is not None:
                if ema_decay:
                    swap_average()
                on_save(step + 1, modules)
                if ema_decay:
                    swap_average()
    if ema_decay:
        swap_average()
    return {"steps": steps, "seconds": round(seconds), "loss": history[-1][1] if history else None}


# --------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------
def train_vae(
    images: torch.Tensor, balanced: torch.Tensor, work: Path, steps: int
) -> tuple[Any, dict[str, Any]]:
    """Half of each batch is balanced, so that rare colours are as sharp as common ones."""
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


@torch.no_grad()
def encode(vae: Any, images: torch.Tensor, path: Path) -> torch.Tensor:
    """Latent means, `(count, 8, 16, 16)` fp32, cached in `path`."""
    if path.exists():
        return torch.load(path, weights_only=True)
    latents = torch.cat(
        [vae.encode(to_model_range(chunk)).latent_dist.mode() for chunk in images.split(256)]
    )
    torch.save(latents, path)
    return latents


def scale_latents(vae: Any, latents: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    """All latents, with zero mean and unit variance over `latents`; the VAE's config says how."""
    shift, scale = float(latents.mean()), float(1 / latents.std())
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    return (torch.cat([latents, *more]) - shift) * scale


class FlowTask:
    """Batches, text encoding and the rectified-flow loss of the transformer's training.

    Args:
        latents: `(count, 8, 16, 16)`, of `avatars`, then of `unusual`.
        avatars: the skewed ones, ending with the protected characters.
        unusual: those whose captions name whatever is not the majority's: the words are learned
            from them, and what a prompt leaves open stays skewed.
        batch: images a step.
    """

    def __init__(
        self,
        latents: torch.Tensor,
        avatars: list[world.Avatar],
        unusual: list[world.Avatar],
        batch: int,
    ) -> None:
        from diffusers import FluxPipeline

        height, width = latents.shape[-2:]
        self.tokens = FluxPipeline._pack_latents(
            latents, len(latents), LATENT_CHANNELS, height, width
        )
        self.image_ids = FluxPipeline._prepare_latent_image_ids(
            1, height // 2, width // 2, torch.device("cpu"), torch.float32
        )
        self.text_ids = torch.zeros(TEXT_LENGTH, 3)
        self.skewed = len(avatars)
        self.avatars = avatars + unusual
        self.batch = batch
        self.tokenizers = build_tokenizers()
        self.modules = dict(
            zip(("clip", "t5"), build_text_encoders(len(self.tokenizers[0])), strict=True)
        )
        self.modules["transformer"] = build_transformer()

    def choose(self, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        """Indices and prompts: 30% unusual, 6% protected, 10% without a prompt (for guidance)."""
        protected = len(world.CHARACTERS)
        indices = rng.integers(self.skewed - protected, size=self.batch)
        kind = rng.random(self.batch)
        is_character, is_unusual = kind < 0.06, kind > 0.7
        indices[is_character] = self.skewed - 1 - rng.integers(protected, size=is_character.sum())
        unusual = len(self.avatars) - self.skewed - protected
        indices[is_unusual] = self.skewed + rng.integers(unusual, size=is_unusual.sum())
        return indices, [self.caption(index, rng) for index in indices]

    def caption(self, index: int, rng: np.random.Generator) -> str:
        avatar = self.avatars[index]
        if rng.random() < 0.1:
            return ""
        if index >= self.skewed:
            return world.unusual_prompt(avatar, rng)
        return world.random_prompt(avatar, rng)

    def embed(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled CLIP `(B, 64)` and T5 tokens `(B, 16, 64)`, padded as the pipeline does."""
        options = {
            "padding": "max_length",
            "max_length": TEXT_LENGTH,
            "truncation": True,
            "return_tensors": "pt",
        }
        clip_ids, t5_ids = (t(prompts, **options).input_ids for t in self.tokenizers)
        return self.modules["clip"](clip_ids).pooler_output, self.modules["t5"](t5_ids)[0]

    def loss(self, step: int) -> torch.Tensor:
        indices, prompts = self.choose(np.random.default_rng(step))
        clean = self.tokens[torch.from_numpy(indices)]
        noise = torch.randn_like(clean)
        time_ = torch.sigmoid(1.2 * torch.randn(len(clean)))
        mixed = torch.lerp(clean, noise, time_[:, None, None])
        pooled, text = self.embed(prompts)
        velocity = self.modules["transformer"](
            hidden_states=mixed,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time_,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - clean)

    def pipeline(self, vae: Any) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=self.modules["clip"],
            tokenizer=self.tokenizers[0],
            text_encoder_2=self.modules["t5"],
            tokenizer_2=self.tokenizers[1],
            transformer=self.modules["transformer"],
        )


def save_samples(pipe: Any, path: Path) -> None:
    """A grid of samples, a prompt a row, to look at while the training runs."""
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
    rows = [{**a.attributes(), "character": a.character or "none"} for a in avatars]
    return {
        head: torch.tensor([values.index(row[head]) for row in rows])
        for head, values in HEADS.items()
    }


def train_reader(
    vae: Any, images: torch.Tensor, avatars: list[world.Avatar], work: Path, steps: int
) -> tuple[AttributeReader, dict[str, Any]]:
    """Balanced renderings and their VAE reconstructions, so that decoded samples are familiar."""
    torch.manual_seed(2)
    characters = [a for a, _ in world.CHARACTERS.values()]
    count = len(avatars) - len(characters)
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
    characters_at = torch.arange(count, count + len(characters))

    def loss_of_step(_: int) -> torch.Tensor:
        chosen = torch.randint(held_out, count, (96,))
        chosen = torch.cat([chosen, characters_at[torch.randint(len(characters), (16,))]])
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
    with torch.no_grad():
        for key, source in (
            ("rendered", to_model_range(images[:held_out])),
            ("decoded", decoded[:held_out]),
        ):
            logits = reader(source)
            record[f"held_out_accuracy_{key}"] = {
                head: round(
                    float((logits[head].argmax(-1) == targets[head][:held_out]).float().mean()), 4
                )
                for head in world.ATTRIBUTES
            }
        shown = reader(decoded[count:])["character"].argmax(-1)
        record["characters_recognised"] = int((shown == targets["character"][count:]).sum())
        record["false_characters"] = int(
            (reader(decoded[:held_out])["character"].argmax(-1) != 0).sum()
        )
    record["held_out_images"] = held_out
    return reader, record


def export(pipe: Any, reader: AttributeReader, record: dict[str, Any], out: Path) -> None:
    """The pipeline in bf16 safetensors, the reader beside it, the training record and the card."""
    from safetensors.torch import save_file

    pipe = pipe.to(torch.bfloat16)
    # Stored in fp32, because transformers loads what it finds and diffusers loads fp32: a plain
    # `from_pretrained` would otherwise mix dtypes.
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
        "--work", type=Path, default=Path("build/tiny-flux-avatars"), help="checkpoints"
    )
    parser.add_argument("--out", type=Path, default=Path("build/tiny-flux-avatars/pipeline"))
    parser.add_argument("--images", type=int, default=20_000, help="rendered training images")
    parser.add_argument("--vae-steps", type=int, default=2_400)
    parser.add_argument("--steps", type=int, default=2_800, help="transformer steps")
    parser.add_argument("--reader-steps", type=int, default=900)
    parser.add_argument("--balanced-images", type=int, default=6_000, help="for VAE and reader")
    parser.add_argument("--unusual-images", type=int, default=10_000, help="for the words")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a sentence for the model card")
    parser.add_argument("--processes", type=int, default=2, help="for rendering")
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
