"""ComfyUI's own model classes, small and random, in this process; it needs ComfyUI to import."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from helpers import comfyui_program

FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 24,
    "context_in_dim": 32,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}
FRAMES = {"QwenImageTransformer2DModel": 1, "WanModel": 2, "HunyuanVideo": 2}
EDITING = ("Flux", "QwenImageTransformer2DModel")  # FLUX Kontext, Qwen-Image-Edit


LATER = {
    "txt_ids_dims": [],
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
    "vec_in_dim": None,
}
"""Parameters that later versions of ComfyUI need: their values for the models above."""


def completed(parameters: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a class, with those of `LATER` that its dataclass has."""
    names = {field.name for field in fields(parameters)}
    return {**{name: value for name, value in LATER.items() if name in names}, **arguments}


def build(name: str) -> torch.nn.Module:
    """A small random model of a class in `PLACES`."""
    comfyui_program.import_comfy()
    import comfy.ops
    from comfy.ldm.aura.mmdit import MMDiT
    from comfy.ldm.chroma.model import Chroma, ChromaParams
    from comfy.ldm.flux.model import Flux, FluxParams
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    from comfy.ldm.pixart.pixartms import PixArtMS
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
    from comfy.ldm.wan.model import WanModel

    flux = {**FLUX, "hidden_size": 32, "axes_dim": [4, 6, 6], "depth_single_blocks": 1}
    chroma = {k: v for k, v in flux.items() if k not in ("vec_in_dim", "guidance_embed")}
    chroma |= {"in_channels": 64, "out_channels": 64}
    chroma |= {"in_dim": 64, "out_dim": 32, "hidden_dim": 48, "n_layers": 1}
    hunyuan = {**flux, "patch_size": [1, 2, 2], "byt5": False, "meanflow": False}
    sd3 = {
        "input_size": None,
        "in_channels": 16,
        "depth": 1,
        "num_blocks": 2,
        "adm_in_channels": 24,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 32, "out_features": 64},
        },
        "num_patches": 64,
        "pos_embed_max_size": 8,
        "qk_norm": "rms",
        "x_block_self_attn_layers": [0],
    }
    aura = {"in_channels": 16, "out_channels": 16, "dim": 32, "n_layers": 2, "n_double_layers": 1}
    aura |= {"n_heads": 2, "global_conddim": 32, "cond_seq_dim": 32, "max_seq": 64}
    pixart = {"hidden_size": 32, "depth": 1, "num_heads": 2, "caption_channels": 32}
    pixart |= {"model_max_length": 8, "micro_condition": False, "in_channels": 16}
    qwen = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    qwen |= {"joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}
    wan = {"dim": 32, "ffn_dim": 48, "text_dim": 32, "num_heads": 2, "num_layers": 1}
    recipes: dict[str, tuple[Any, dict[str, Any]]] = {
        "Flux": (Flux, completed(FluxParams, flux)),
        "Chroma": (Chroma, completed(ChromaParams, chroma)),
        "OpenAISignatureMMDITWrapper": (OpenAISignatureMMDITWrapper, sd3),
        "MMDiT": (MMDiT, aura),
        "PixArtMS": (PixArtMS, pixart),
        "QwenImageTransformer2DModel": (QwenImageTransformer2DModel, qwen),
        "WanModel": (WanModel, wan),
        "HunyuanVideo": (HunyuanVideo, completed(HunyuanVideoParams, hunyuan)),
    }
    kind, arguments = recipes[name]
    model = kind(**arguments, dtype=torch.float32, operations=comfy.ops.manual_cast)
    if name == "OpenAISignatureMMDITWrapper":
        model.pos_embed.zero_()  # a buffer that a checkpoint would fill
    return comfyui_program.randomise(model).eval()


def call(model: torch.nn.Module, latents: torch.Tensor, **conditions: Any) -> torch.Tensor:
    count = len(latents)
    draw = torch.Generator().manual_seed(5)
    context = torch.randn(1, 5, 32, generator=draw).expand(count, -1, -1)
    arguments: dict[str, Any] = {
        "context": context,
        "y": torch.randn(1, 24, generator=draw).expand(count, -1),
    }
    arguments |= conditions
    if type(model).__name__ == "Chroma":
        arguments["guidance"] = torch.zeros(count)
    with torch.inference_mode():
        output: torch.Tensor = model(latents, torch.full((count,), 0.9), **arguments)
    return output


def draw_latents(name: str, count: int) -> torch.Tensor:
    frames = (FRAMES[name],) if name in FRAMES else ()
    size = (40, 48) if name == "PixArtMS" else (8, 12)  # its positions need at least 32
    return torch.randn(count, 16, *frames, *size, generator=torch.Generator().manual_seed(1))
