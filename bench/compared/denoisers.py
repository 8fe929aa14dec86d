"""The models whose steps are timed: the embedded one, and others at full size with random weights.

The time of a step does not depend on the values of the weights. With `tiny=True` a model of the
same class has a few kilobytes, for a rehearsal on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from negtome_fast.config import NegToMeConfig

IMAGES = 4
SEED = 0


@dataclass(frozen=True)
class Workload:
    """A denoiser with the inputs of one step, and the parts of a whole run.

    Attributes:
        name: model and task.
        model: the denoiser, or the pipeline if a whole run is timed.
        forward: one forward at a timestep, 1000 (noise) to 0.
        config: the authors' settings for this family.
        timesteps: the timesteps of a whole run.
        images: images that one forward serves.
        run: a whole run with its images, from a seed; None if only steps are timed.
    """

    name: str
    model: Any
    forward: Callable[[float], Any]
    config: NegToMeConfig
    timesteps: tuple[float, ...]
    images: int
    run: Callable[[], Any] | None = None

    @property
    def guided_steps(self) -> int:
        return sum(self.config.includes_step(t, None, None, 0.0) for t in self.timesteps)

    @property
    def guided_timestep(self) -> float:
        """A timestep inside the window."""
        return next(t for t in self.timesteps if self.config.includes_step(t, None, None, 0.0))


def flow_timesteps(steps: int, shift: float) -> tuple[float, ...]:
    """Timesteps of a flow-matching scheduler: equal sigmas from 1, shifted towards the noise."""
    sigmas = (1 - i / steps for i in range(steps))
    return tuple(1000 * shift * s / (1 + (shift - 1) * s) for s in sigmas)


def leading_timesteps(steps: int) -> tuple[float, ...]:
    """Timesteps of SDXL's scheduler: spaced from the end of the run, with an offset of 1."""
    return tuple(float(i * (1000 // steps) + 1) for i in reversed(range(steps)))


def _made(
    model_class: type[nn.Module], device: torch.device, dtype: torch.dtype, **settings: Any
) -> Any:
    torch.manual_seed(SEED)
    with torch.device(device):
        model = model_class(**settings).eval().requires_grad_(False)
    # Like `from_pretrained`: some parts stay in fp32 whatever the dtype of the rest.
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not set(kept) & set(name.split(".")):
            value.data = value.data.to(dtype)
    return model


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _position_ids(height: int, width: int, device: torch.device) -> torch.Tensor:
    ids = torch.zeros(height, width, 3, device=device)
    ids[..., 1] += torch.arange(height, device=device)[:, None]
    ids[..., 2] += torch.arange(width, device=device)
    return ids.reshape(-1, 3)


def flux(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Workload:
    """FLUX.1-dev (12 billion weights) at 1024 px: 4,096 image and 512 text tokens."""
    from diffusers import FluxTransformer2DModel

    side, text, joint, pooled = (8, 6, 16, 16) if tiny else (64, 512, 4096, 768)
    settings: dict[str, Any] = {"guidance_embeds": True}
    if tiny:
        settings |= {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": joint,
            "pooled_projection_dim": pooled,
            "axes_dims_rope": (2, 2, 4),
        }
    model = _made(FluxTransformer2DModel, device, dtype, **settings)
    kind: Any = {"device": device, "dtype": dtype}
    inputs = {
        "hidden_states": _random(IMAGES, side * side, model.config.in_channels, **kind),
        "encoder_hidden_states": _random(1, text, joint, **kind).expand(IMAGES, -1, -1),
        "pooled_projections": _random(1, pooled, **kind).expand(IMAGES, -1),
        "guidance": torch.full((IMAGES,), 3.5, **kind),
        "img_ids": _position_ids(side, side, device).to(dtype),
        "txt_ids": torch.zeros(text, 3, **kind),
        "return_dict": False,
    }

    def forward(timestep: float) -> Any:
        return model(timestep=torch.full((IMAGES,), timestep / 1000, **kind), **inputs)[0]

    # 3.158 is exp(1.15), the scheduler's shift for 4,096 tokens; 28 steps are the default.
    return Workload(
        "FLUX.1-dev 1024 px",
        model,
        forward,
        NegToMeConfig.preset("flux").with_overrides(groups=1),
        flow_timesteps(28, 3.158),
        IMAGES,
    )


def sdxl(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Workload:
    """SDXL (2.6 billion weights) at 1024 px, classifier-free guidance: two halves of 4 images."""
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }
    if tiny:
        settings |= {
            "sample_size": 16,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "block_out_channels": (8, 8, 16),
            "transformer_layers_per_block": 1,
            "attention_head_dim": 4,
            "cross_attention_dim": 16,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        }
    model = _made(UNet2DConditionModel, device, dtype, **settings)
    pooled = 16 if tiny else 1280
    kind: Any = {"device": device, "dtype": dtype}
    latents = _random(IMAGES, 4, settings["sample_size"], settings["sample_size"], **kind)
    inputs = {
        "sample": torch.cat([latents, latents]),
        "encoder_hidden_states": _random(2 * IMAGES, 77, settings["cross_attention_dim"], **kind),
        "added_cond_kwargs": {
            "text_embeds": _random(2 * IMAGES, pooled, **kind),
            "time_ids": torch.full((2 * IMAGES, 6), 1024.0, **kind),
        },
        "return_dict": False,
    }

    def forward(timestep: float) -> Any:
        return model(timestep=torch.tensor(timestep, device=device), **inputs)[0]

    config = NegToMeConfig.preset("sdxl").with_overrides(groups=2)
    if tiny:
        config = config.with_overrides(min_grid=(4, 4))
    return Workload("SDXL 1024 px", model, forward, config, leading_timesteps(50), IMAGES)


def _wan(
    name: str,
    latents: tuple[int, int, int],
    shift: float,
    device: torch.device,
    dtype: torch.dtype,
    **settings: Any,
) -> Workload:
    from diffusers import WanTransformer3DModel

    model = _made(WanTransformer3DModel, device, dtype, **settings)
    kind: Any = {"device": device, "dtype": dtype}
    inputs = {
        "hidden_states": _random(2, model.config.in_channels, *latents, **kind),
        "encoder_hidden_states": _random(2, 512, model.config.text_dim, **kind),
        "return_dict": False,
    }

    def forward(timestep: float) -> Any:
        return model(timestep=torch.full((2,), timestep, device=device), **inputs)[0]

    # The authors have no settings for video; FLUX is a flow-matching transformer too.
    config = NegToMeConfig.preset("flux").with_overrides(groups=1)
    return Workload(name, model, forward, config, flow_timesteps(50, shift), 2)


def wan(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Workload:
    """Wan 2.1 1.3B at 832 x 480, 81 frames: 32,760 tokens of 1,536 channels, two videos."""
    name = "Wan 1.3B 480p, 81 frames"
    if tiny:
        small = {"attention_head_dim": 12, "num_attention_heads": 2, "num_layers": 1}
        small |= {"text_dim": 16, "freq_dim": 32, "ffn_dim": 32}
        return _wan(name, (3, 8, 8), 3.0, device, dtype, **small)
    size = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    return _wan(name, (21, 60, 104), 3.0, device, dtype, **size)


def wan_14b(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Workload:
    """Wan 2.1 14B at 1280 x 720, 81 frames: 75,600 tokens of 5,120 channels, two videos."""
    if tiny:
        return wan(device, dtype, tiny=True)
    return _wan("Wan 14B 720p, 81 frames", (21, 90, 160), 5.0, device, dtype)


def embedded(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Workload:
    """The embedded model as the demo runs it: 4 images of 64 px, true guidance, 20 steps.

    With `tiny` it takes fewer steps.
    """
    from negtome_fast import models

    pipe = models.load_pipeline(device)
    steps = 4 if tiny else models.STEPS
    seeds = range(IMAGES)
    captured: dict[str, Any] = {}
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
    )
    models.generate(pipe, "a pixel art person", seeds, steps=steps)
    hook.remove()

    def forward(timestep: float) -> Any:
        time = torch.full_like(captured["timestep"], timestep / 1000)
        return pipe.transformer(**captured | {"timestep": time})[0]

    return Workload(
        f"tiny-flux-avatars, {steps} steps",
        pipe,
        forward,
        NegToMeConfig.preset("flux"),
        tuple(pipe.scheduler.timesteps.tolist()),
        IMAGES,
        lambda: models.generate(pipe, "a pixel art person", seeds, steps=steps),
    )


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "flux": flux,
    "sdxl": sdxl,
    "wan": wan,
    "embedded": embedded,
    "wan-14b": wan_14b,
}
"""Name on the command line -> function that builds the workload; in order of importance."""
