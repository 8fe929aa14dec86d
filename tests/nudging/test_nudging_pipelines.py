"""Nudging whole pipelines of several families, which differ in noise schedules and latents.

Tiny random models with the text encoders, tokenizers and VAE that the embedded model's training
builds; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from negtome_fast import NegToMeConfig
from negtome_fast.models import TEXT_LENGTH
from negtome_fast.nudging import (
    CallableFilter,
    NudgeSchedule,
    PixelDistance,
    ReferenceBank,
    generate_with_nudging,
    latents,
)
from negtome_fast.pipelines import known_layouts
from negtome_fast.studies.toy_model.parts import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    build_text_encoders,
    build_tokenizers,
    build_vae,
)

PROMPTS = ["a pixel art person", "captain red"]
CALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 4}
NEVER = CallableFilter(lambda images: [0.0] * len(images), 1.0, "never")
SECOND = CallableFilter(lambda images: [0.0, 2.0][-len(images) :], 1.0, "second")


def projected_clip(vocabulary: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=3,
        )
    )


def unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options = {
        "sample_size": 8,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**options, **settings})


def sd15() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer, _ = build_tokenizers()
    return StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=build_text_encoders(len(tokenizer))[0],
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer, _ = build_tokenizers()
    return StableDiffusionXLPipeline(
        vae=build_vae(),
        text_encoder=build_text_encoders(len(tokenizer))[0],
        text_encoder_2=projected_clip(len(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(
            cross_attention_dim=2 * TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def sd3() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    tokenizer, _ = build_tokenizers()
    vae = build_vae()
    vae.register_to_config(shift_factor=0.1)
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=projected_clip(len(tokenizer)),
        text_encoder_2=projected_clip(len(tokenizer)),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * TEXT_WIDTH,
            out_channels=LATENT_CHANNELS,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


FAMILIES: dict[str, Callable[[], Any]] = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3}


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def pipe(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    pipe = FAMILIES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(2)]


@pytest.fixture(scope="module")
def expected(pipe: Any) -> Tensor:
    return pipe(PROMPTS, generator=generators(), output_type="pt", **CALL).images.float()


@pytest.fixture(scope="module")
def bank(expected: Tensor) -> ReferenceBank:
    rows = expected.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return ReferenceBank.build([("first", rows[0]), ("second", rows[1])], size=32)


def run(pipe: Any, bank: ReferenceBank, **options: Any) -> Any:
    return generate_with_nudging(
        pipe,
        PROMPTS,
        undesired=bank,
        generator=generators(),
        output_type="pt",
        **{**CALL, "negative_prompt": ["", ""], **options},
    )


def test_images_that_pass_are_the_pipelines_own(
    pipe: Any, bank: ReferenceBank, expected: Tensor
) -> None:
    plain = run(pipe, bank, filters=[NEVER], negative_prompt=None)
    assert torch.equal(torch.stack(plain.images), expected)


@pytest.mark.parametrize("method", ["nudge", "both"])
def test_what_is_flagged_moves_away_and_the_rest_stays(
    pipe: Any, bank: ReferenceBank, method: Any
) -> None:
    plain = run(pipe, bank, filters=[NEVER])
    schedule = NudgeSchedule(max_distance=0.3, beta=4.0, step_size=0.1, window=(0.0, 1.0))
    options = {"schedule": schedule, "negtome": NegToMeConfig()}
    moved = run(pipe, bank, filters=[SECOND], method=method, max_attempts=2, **options)
    assert torch.equal(moved.images[0], plain.images[0])
    far = PixelDistance(bank, 0.0)
    before, after = (far.judge(result.images[1][None])[0].score for result in (plain, moved))
    assert after > before
    assert moved.attempts[1][1].undesired == ("second",) and moved.attempts[1][1].distance > 0
    again = pipe(
        PROMPTS, generator=generators(), output_type="pt", negative_prompt=["", ""], **CALL
    )
    assert torch.equal(again.images.float(), torch.stack(plain.images))


def test_points_are_what_the_scheduler_makes_of_the_pictures(
    pipe: Any, bank: ReferenceBank
) -> None:
    """The mean over the noise of what the model is given."""
    layout = known_layouts()[type(getattr(pipe, "transformer", None) or pipe.unet).__name__]
    points = latents.LatentPoints(pipe, layout, [bank.pixels], (32, 32))
    pipe.scheduler.set_timesteps(4)
    like = torch.zeros(1, LATENT_CHANNELS, 8, 8)
    clean = points.at_step(pipe.scheduler, like, 4).double()
    noise = torch.randn(clean[0].shape, generator=torch.Generator().manual_seed(0)).double()
    add = getattr(pipe.scheduler, "scale_noise", None)
    for step in range(4):
        at = pipe.scheduler.timesteps[step : step + 1]
        noised = [
            add(clean[0], at, sign * noise)
            if add
            else pipe.scheduler.add_noise(clean[0], sign * noise, at)
            for sign in (1, -1)
        ]
        found = points.at_step(pipe.scheduler, like, step)[0].double()
        torch.testing.assert_close(found, (noised[0] + noised[1]) / 2, rtol=1e-5, atol=1e-5)


class WithoutCallback:
    """A pipeline of a stack that has no callbacks."""

    def __call__(self, prompt: str, generator: Any, output_type: str) -> None:
        raise AssertionError("must not be called")


def test_a_pipeline_without_callbacks_is_refused_before_it_runs(bank: ReferenceBank) -> None:
    with pytest.raises(ValueError, match="WithoutCallback hands no latents"):
        generate_with_nudging(WithoutCallback(), "captain red", filters=[NEVER], undesired=bank)
