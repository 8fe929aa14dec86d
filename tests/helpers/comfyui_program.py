"""The real ComfyUI for tests: small random checkpoints in its formats, its server, its HTTP API.

It needs a checkout of ComfyUI in `COMFYUI_PATH`, and ComfyUI's requirements in this Python.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

PACK = Path(__file__).resolve().parents[2] / "negtome_fast" / "integrations" / "comfyui"
SD15, FLUX = "tiny-sd15.safetensors", "tiny-flux.safetensors"
LORA = "tiny-lora.safetensors"

CUSTOM_NODES = '''
"""Nodes of the tests: conditioning without text encoders, a latent after another, and the model
that is part of negtome_fast."""
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch

import negtome_fast.models


class TestConditioning:
    @classmethod
    def INPUT_TYPES(cls):
        integer = ("INT", {"default": 1, "min": 0, "max": 4096})
        return {"required": {name: integer for name in ("seed", "channels", "pooled")}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"
    CATEGORY = "test"

    def run(self, seed, channels, pooled):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(1, 8, channels, generator=generator)
        more = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return ([[tokens, more]],)


class TestAfter:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "after": ("LATENT",)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "run"
    CATEGORY = "test"

    def run(self, samples, after):
        return (samples,)


class Vae:
    """An AutoencoderKL of diffusers as ComfyUI's VAE: pixels (B, H, W, 3) in [0, 1]."""

    def __init__(self, vae):
        self.vae = vae

    def spacial_compression_encode(self):
        return 4

    @torch.inference_mode()
    def encode(self, pixels):
        return self.vae.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mode()

    @torch.inference_mode()
    def decode(self, latents):
        return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)


class TestEmbeddedModel:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"prompt": ("STRING", {"default": "a pixel art person"})}}

    RETURN_TYPES = ("MODEL", "CONDITIONING", "VAE")
    FUNCTION = "run"
    CATEGORY = "test"
    pipe = None

    def run(self, prompt):
        kind = type(self)
        kind.pipe = kind.pipe or negtome_fast.models.load_pipeline()
        theirs, vae = kind.pipe.transformer, kind.pipe.vae
        width = theirs.config.num_attention_heads * theirs.config.attention_head_dim
        unet = {
            "image_model": "flux",
            "in_channels": theirs.config.in_channels // 4,
            "out_channels": theirs.config.in_channels // 4,
            "vec_in_dim": theirs.config.pooled_projection_dim,
            "context_in_dim": theirs.config.joint_attention_dim,
            "hidden_size": width,
            "mlp_ratio": 4.0,
            "num_heads": theirs.config.num_attention_heads,
            "depth": theirs.config.num_layers,
            "depth_single_blocks": theirs.config.num_single_layers,
            "axes_dim": list(theirs.config.axes_dims_rope),
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": False,
        }
        config = comfy.supported_models.FluxSchnell(dict(unet))
        config.set_inference_dtype(torch.float32, None)
        config.latent_format = comfy.supported_models.Flux.latent_format()
        config.latent_format.latent_channels = unet["in_channels"]
        config.latent_format.scale_factor = vae.config.scaling_factor
        config.latent_format.shift_factor = vae.config.shift_factor
        model = config.get_model({}, device="cpu")
        weights = model.diffusion_model.state_dict()
        for name, place in comfy.utils.flux_to_diffusers(unet).items():
            if name not in theirs.state_dict():
                continue
            weight = theirs.state_dict()[name]
            if isinstance(place, str):
                weights[place].copy_(weight)
            else:
                place, part, *function = place
                own = weights[place] if part is None else weights[place].narrow(*part)
                own.copy_(function[0](weight) if function else weight)
        device = torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(model, device, device)
        with torch.inference_mode():
            tokens, pooled, _ = kind.pipe.encode_prompt(
                prompt, prompt_2=None, max_sequence_length=negtome_fast.models.TEXT_LENGTH
            )
        return (patcher, [[tokens, {"pooled_output": pooled}]], Vae(vae))


NODE_CLASS_MAPPINGS = {
    kind.__name__: kind for kind in (TestConditioning, TestAfter, TestEmbeddedModel)
}
NODE_DISPLAY_NAME_MAPPINGS = {"TestEmbeddedModel": "Load tiny-flux-avatars (of the tests)"}
'''


def import_comfy() -> None:
    """Makes `comfy` importable in this process, on the CPU."""
    path = os.environ["COMFYUI_PATH"]
    if path not in sys.path:
        sys.path.append(path)
    from comfy.cli_args import args

    args.cpu = True


def randomise(module: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> torch.nn.Module:
    """Draws weights from a seed, of a size that neither blows activations up nor kills them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            fan_in = max(weight[0].numel(), 1) if weight.ndim > 1 else 1
            one = weight.ndim == 1 and name.endswith(("weight", "scale"))
            value = 1 + 0.05 * drawn if one else drawn * scale / fan_in**0.5
            weight.copy_(value if weight.ndim > 1 or one else 0.05 * drawn)
    return module


def write_checkpoints(folder: Path) -> None:
    """Writes `models/checkpoints` and `models/loras`: SD 1.5 and FLUX.1 as ComfyUI detects them.

    Detection fixes the widths (320 and 3072); depths and VAEs are as small as possible. FLUX has no
    text encoders.
    """
    import_comfy()
    checkpoints, loras = (folder / "models" / name for name in ("checkpoints", "loras"))
    for needed in (checkpoints, loras):
        needed.mkdir(parents=True, exist_ok=True)
    _write_sd15(checkpoints / SD15)
    _write_flux(checkpoints / FLUX)
    generator = torch.Generator().manual_seed(3)
    attention = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_v"
    matrices = {
        f"{attention}.lora_down.weight": torch.randn(4, 320, generator=generator) / 18,
        f"{attention}.lora_up.weight": torch.randn(320, 4, generator=generator),
        f"{attention}.alpha": torch.tensor(4.0),
    }
    save_file(matrices, loras / LORA)


def _write_sd15(path: Path) -> None:
    import comfy.ops
    import comfy.sd1_clip
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.taesd.taesd import TAESD

    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1, 1],
        channel_mult=[1, 1],
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1,
        context_dim=768,
        legacy=False,
        operations=comfy.ops.disable_weight_init,
    )
    clip = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32)
    parts = {
        "model.diffusion_model.": randomise(unet),
        "first_stage_model.": randomise(TAESD(latent_channels=4), 1),
        "cond_stage_model.transformer.": randomise(clip.transformer, 2, 0.5).half(),
    }
    save_file(_state(parts), path)


def _write_flux(path: Path) -> None:
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.taesd.taesd import TAESD

    flux = Flux(
        in_channels=16,
        out_channels=16,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=3072,
        mlp_ratio=4.0,
        num_heads=24,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        dtype=torch.bfloat16,
        operations=comfy.ops.disable_weight_init,
    )
    parts = {
        "model.diffusion_model.": randomise(flux),
        "vae.": randomise(TAESD(latent_channels=16), 1),
    }
    save_file(_state(parts), path)


def _state(parts: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    return {
        prefix + name: value.contiguous()
        for prefix, module in parts.items()
        for name, value in module.state_dict().items()
    }


def write_pictures(folder: Path) -> None:
    """Writes `input/reference.png`, 128 x 128, and `input/mask.png`, whose left half is white."""
    from PIL import Image

    given = folder / "input"
    given.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC).save(
        given / "reference.png"
    )
    drawn = np.zeros((128, 128), np.uint8)
    drawn[:, :64] = 255
    Image.fromarray(drawn).convert("RGB").save(given / "mask.png")


class Program:
    """A running ComfyUI, and the folder that it works in."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.address = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return json.load(answer)

    def run(self, prompt: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
        """Executes a workflow in API format; returns its entry of the history.

        Raises:
            RuntimeError: ComfyUI refused or failed; the message is its report.
        """
        request = urllib.request.Request(
            f"{self.address}/prompt",
            json.dumps({"prompt": prompt}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done = self.get(f"/history/{number}").get(number)
            if done and done["status"]["completed"]:
                return dict(done)
            if done:
                raise RuntimeError(json.dumps(done["status"]["messages"]))
            time.sleep(0.2)
        raise RuntimeError(f"not done after {seconds} seconds")

    def latents(self, done: dict[str, Any], node: str) -> torch.Tensor:
        """Returns the latents (B, C, h, w) that a SaveLatent node wrote."""
        (saved,) = done["outputs"][node]["latents"]
        path = self.folder / "output" / saved["subfolder"] / saved["filename"]
        return load_file(path)["latent_tensor"]

    def images(self, done: dict[str, Any], node: str) -> list[np.ndarray[Any, Any]]:
        """Returns the images that a SaveImage node wrote, each (H, W, 3) uint8."""
        from PIL import Image

        saved = done["outputs"][node]["images"]
        paths = [self.folder / "output" / one["subfolder"] / one["filename"] for one in saved]
        return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


@contextmanager
def running(folder: Path, custom_nodes: dict[str, str | Path]) -> Iterator[Program]:
    """Runs ComfyUI on a free port, with `folder` as its base, until the block is left.

    Args:
        custom_nodes: name -> text of a file to write there, or a folder to link.
    """
    nodes = folder / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    for old in nodes.iterdir():
        if old.is_symlink() or old.is_file():
            old.unlink()
    for name, content in custom_nodes.items():
        if isinstance(content, Path):
            (nodes / name).symlink_to(content)
        else:
            (nodes / name).write_text(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--disable-auto-launch"]
    command += ["--base-directory", str(folder), "--database-url", "sqlite:///:memory:"]
    log = folder / "comfyui.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=os.environ["COMFYUI_PATH"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        try:
            program = Program(folder, port)
            for _ in range(600):
                if process.poll() is not None:
                    raise RuntimeError(f"ComfyUI ended: {log.read_text()[-3000:]}")
                try:
                    program.get("/system_stats")
                    break
                except OSError:
                    time.sleep(0.2)
            yield program
        finally:
            process.terminate()
            process.wait(30)
