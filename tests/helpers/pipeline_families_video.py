"""As pipeline_families, for models of videos. Item i of a batch is video i with all its frames."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from helpers.pipeline_families import (
    TEXT,
    DenoiserLoop,
    Family,
    Size,
    caption_mask,
    embeddings,
    noise,
    noise_generators,
    prompt,
    quiet,
    seeded,
)

FRAMES = 3
"""Of the latents."""

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
WAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
GRIDS = {(64, 96): {(4, 6)}, (80, 32): {(5, 2)}}
"""Of latents of an eighth of the size, in patches of 2 x 2, or of a 16th without patches."""


def common(images: int, size: Size, steps: int, seed: int) -> dict[str, Any]:
    """Arguments that every pipeline of diffusers takes."""
    return {
        "height": size[0],
        "width": size[1],
        "num_inference_steps": steps,
        "generator": noise_generators(images, seed),
        "output_type": "latent",
    }


def flow_scheduler(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


def wan_transformer(seed: int = 0, **settings: Any) -> Any:
    from diffusers import WanTransformer3DModel

    model = seeded(WanTransformer3DModel, **{**WAN, **settings})
    if seed:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + seed / 10)
    return model


def wan(**settings: Any) -> Any:
    from diffusers import WanPipeline

    return quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=flow_scheduler(),
            transformer=wan_transformer(),
            **settings,
        )
    )


def wan_22() -> Any:
    """Two denoisers: the second from timestep 700 on."""
    pipe = wan(boundary_ratio=0.7, transformer_2=wan_transformer(seed=1))
    pipe.scheduler = flow_scheduler(shift=1.0)
    return pipe


def wan_with_times_by_token() -> Any:
    return wan(expand_timesteps=True)


def skyreels() -> Any:
    from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel

    return quiet(
        SkyReelsV2Pipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=flow_scheduler(),
            transformer=seeded(SkyReelsV2Transformer3DModel, **WAN),
        )
    )


def skyreels_diffusion_forcing() -> Any:
    """A time for each frame."""
    from diffusers import (
        SkyReelsV2DiffusionForcingPipeline,
        SkyReelsV2Transformer3DModel,
        UniPCMultistepScheduler,
    )

    return quiet(
        SkyReelsV2DiffusionForcingPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
            ),
            transformer=seeded(SkyReelsV2Transformer3DModel, **WAN),
        )
    )


def generate_wan(
    pipe: Any,
    images: int,
    *,
    size: Size,
    steps: int,
    cfg: bool,
    captions: Any,
    seed: int,
    **more: Any,
) -> Tensor:
    text = prompt(images, 16)
    return pipe(
        **more,
        prompt_embeds=text,
        negative_prompt_embeds=-text if cfg else None,
        guidance_scale=3.0 if cfg else 1.0,
        num_frames=4 * FRAMES - 3,
        **common(images, size, steps, seed),
    ).frames


def generate_skyreels_diffusion_forcing(pipe: Any, images: int, **settings: Any) -> Tensor:
    return generate_wan(pipe, images, **settings, prompt=None, base_num_frames=4 * FRAMES - 3)


def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return seeded(
        AutoencoderKLWan,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def wan_image_to_video(by_token: bool) -> Any:
    """Wan 2.1 is given the image in more channels, Wan 2.2 5B as the first frame, at time 0."""
    from diffusers import WanImageToVideoPipeline

    settings = {"image_dim": 8, "added_kv_proj_dim": 32, "in_channels": 12}
    transformer = wan_transformer(**({} if by_token else settings))
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=flow_scheduler(),
        transformer=transformer,
        expand_timesteps=by_token,
    )
    pipe.encode_image = lambda image, device: embeddings(1, 4, 8)  # in place of CLIP
    return quiet(pipe)


def wan_image_to_video_by_channels() -> Any:
    return wan_image_to_video(by_token=False)


def wan_image_to_video_by_token() -> Any:
    return wan_image_to_video(by_token=True)


def generate_wan_image_to_video(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    # This model takes all but the last 512 tokens of the text for tokens of the image.
    text = prompt(images, 16, tokens=512)
    return pipe(
        image=embeddings(1, 3, *size).sigmoid(),
        prompt_embeds=text,
        negative_prompt_embeds=-text if cfg else None,
        guidance_scale=3.0 if cfg else 1.0,
        num_frames=4 * FRAMES - 3,
        **common(images, size, steps, seed),
    ).frames


def wan_like_loop(model: str) -> Any:
    import diffusers

    vace = {"vace_layers": [0], "vace_in_channels": 4} if "VACE" in model else {}
    return DenoiserLoop(seeded(getattr(diffusers, model), **WAN, **vace), flow_scheduler())


def wan_vace() -> Any:
    return wan_like_loop("WanVACETransformer3DModel")


def chronoedit() -> Any:
    return wan_like_loop("ChronoEditTransformer3DModel")


def generate_wan_like_loop(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    shape = (4, FRAMES, size[0] // 8, size[1] // 8)
    control = {}
    if "vace_layers" in pipe.transformer.config:
        control = {"control_hidden_states": embeddings(1, *shape).repeat(images, 1, 1, 1, 1)}

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=latents,
            timestep=timestep.expand(images),
            encoder_hidden_states=prompt(images, 16),
            return_dict=False,
            **control,
        )[0]

    return pipe(noise(images, seed, *shape), predict, steps)


HUNYUAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def hunyuan_video() -> Any:
    from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    return quiet(
        HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            vae=None,
            scheduler=flow_scheduler(),
            transformer=seeded(HunyuanVideoTransformer3DModel, **HUNYUAN),
        )
    )


def generate_hunyuan_video(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    text, pooled = prompt(images, 16, max(captions)), embeddings(1, 8).repeat(images, 1)
    mask = caption_mask(captions)
    negative = {
        "negative_prompt_embeds": -text,
        "negative_pooled_prompt_embeds": -pooled,
        "negative_prompt_attention_mask": mask.flip(0),
        "true_cfg_scale": 3.0,
    }
    return pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        prompt_attention_mask=mask,
        num_frames=4 * FRAMES - 3,
        **(negative if cfg else {}),
        **common(images, size, steps, seed),
    ).frames


def hunyuan_video_token_replace() -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    transformer = seeded(
        HunyuanVideoTransformer3DModel,
        **HUNYUAN,
        guidance_embeds=False,
        image_condition_type="token_replace",
    )
    return DenoiserLoop(transformer, flow_scheduler())


def generate_hunyuan_video_token_replace(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    height, width = size[0] // 8, size[1] // 8
    given = embeddings(1, 4, 1, height, width).repeat(images, 1, 1, 1, 1)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=torch.cat([given, latents], dim=2),
            timestep=timestep.expand(images),
            encoder_hidden_states=prompt(images, 16, max(captions)),
            encoder_attention_mask=caption_mask(captions),
            pooled_projections=embeddings(1, 8).repeat(images, 1),
            return_dict=False,
        )[0][:, :, 1:]

    return pipe(noise(images, seed, 4, FRAMES - 1, height, width), predict, steps)


def framepack() -> Any:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    transformer = seeded(
        HunyuanVideoFramepackTransformer3DModel,
        **HUNYUAN,
        guidance_embeds=False,
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    return DenoiserLoop(transformer, flow_scheduler())


def generate_framepack(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    height, width = size[0] // 8, size[1] // 8

    def past(frames: int) -> Tensor:
        return embeddings(1, 4, frames, height, width).repeat(images, 1, 1, 1, 1)

    def places(first: int, frames: int) -> Tensor:
        return torch.arange(first, first + frames)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=latents,
            timestep=timestep.expand(images),
            encoder_hidden_states=prompt(images, 16, max(captions)),
            encoder_attention_mask=caption_mask(captions),
            pooled_projections=embeddings(1, 8).repeat(images, 1),
            image_embeds=prompt(images, 8, 2),
            latents_history_4x=past(5),
            latents_history_2x=past(3),
            latents_clean=past(2),
            indices_latents_history_4x=places(0, 5),
            indices_latents_history_2x=places(5, 3),
            indices_latents_clean=places(8, 2),
            indices_latents=places(10, FRAMES),
            return_dict=False,
        )[0]

    return pipe(noise(images, seed, 4, FRAMES, height, width), predict, steps)


def hunyuan_video_15() -> Any:
    from diffusers import HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel
    from diffusers.guiders import ClassifierFreeGuidance

    transformer = seeded(
        HunyuanVideo15Transformer3DModel,
        **HEADS,
        in_channels=9,
        out_channels=4,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return quiet(
        HunyuanVideo15Pipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            vae=Autoencoder(16),
            scheduler=flow_scheduler(),
            transformer=transformer,
            guider=ClassifierFreeGuidance(),
        )
    )


class Autoencoder:
    """What some pipelines ask of their VAE though they neither encode nor decode."""

    def __init__(self, spatial: int, channels: int = 4) -> None:
        self.config = SimpleNamespace(latent_channels=channels)
        self.spatial_compression_ratio = spatial
        self.temporal_compression_ratio = 4


def generate_hunyuan_video_15(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    from diffusers.guiders import ClassifierFreeGuidance

    pipe.guider = ClassifierFreeGuidance(guidance_scale=3.0 if cfg else 1.0)
    text, second = prompt(images, 16, max(captions)), prompt(images, 8, 4)
    mask, second_mask = caption_mask(captions), torch.ones(images, 4)
    negative = {
        "negative_prompt_embeds": -text,
        "negative_prompt_embeds_mask": mask.flip(0),
        "negative_prompt_embeds_2": -second,
        "negative_prompt_embeds_mask_2": second_mask,
    }
    return pipe(
        prompt_embeds=text,
        prompt_embeds_mask=mask,
        prompt_embeds_2=second,
        prompt_embeds_mask_2=second_mask,
        num_frames=4 * FRAMES - 3,
        **(negative if cfg else {}),
        **common(images, size, steps, seed),
    ).frames


def cogvideox(**settings: Any) -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    transformer = seeded(
        CogVideoXTransformer3DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        use_rotary_positional_embeddings=True,
        **settings,
    )
    return quiet(
        CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=transformer,
            scheduler=CogVideoXDDIMScheduler(),
        )
    )


def cogvideox_15() -> Any:
    """Patches of two frames."""
    return cogvideox(patch_size_t=2, patch_bias=False)


def generate_cogvideox(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    text = prompt(images, 16)
    return pipe(
        prompt_embeds=text,
        negative_prompt_embeds=-text if cfg else None,
        guidance_scale=3.0 if cfg else 1.0,
        num_frames=4 * FRAMES - 3,
        **common(images, size, steps, seed),
    ).frames


def consisid() -> Any:
    from diffusers import CogVideoXDDIMScheduler, ConsisIDTransformer3DModel

    transformer = seeded(
        ConsisIDTransformer3DModel,
        **HEADS,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=4 * FRAMES - 3,
        max_text_seq_length=TEXT,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=21,
        LFE_num_scale=5,
    )
    return DenoiserLoop(transformer, CogVideoXDDIMScheduler())


def generate_consisid(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    height, width = size[0] // 8, size[1] // 8
    parts = 2 if cfg else 1
    text = prompt(images, 16)
    image = embeddings(1, FRAMES, 4, height, width).repeat(images, 1, 1, 1, 1)
    condition = embeddings(1, 8).repeat(parts * images, 1)
    hidden = [embeddings(1, 3, 8).repeat(parts * images, 1, 1)] * 5

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        output = pipe.transformer(
            hidden_states=torch.cat([torch.cat([latents, image], dim=2)] * parts),
            encoder_hidden_states=torch.cat([-text, text]) if cfg else text,
            timestep=timestep.expand(parts * images),
            id_cond=condition,
            id_vit_hidden=hidden,
            return_dict=False,
        )[0]
        return output.chunk(2)[0] * -2 + output.chunk(2)[1] * 3 if cfg else output

    return pipe(noise(images, seed, FRAMES, 4, height, width), predict, steps)


def mochi() -> Any:
    from diffusers import MochiPipeline, MochiTransformer3DModel

    transformer = seeded(
        MochiTransformer3DModel,
        **HEADS,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
    )
    return quiet(
        MochiPipeline(
            # As the published model has it.
            scheduler=flow_scheduler(invert_sigmas=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
    )


def generate_masked(
    pipe: Any, images: int, size: Size, steps: int, cfg: bool, captions: Any, seed: int, **more: Any
) -> Tensor:
    """Captions of several lengths, padded to the longest."""
    text, mask = prompt(images, 16, max(captions)), caption_mask(captions)
    return pipe(
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt_embeds=-text if cfg else None,
        negative_prompt_attention_mask=mask.flip(0) if cfg else None,
        guidance_scale=3.0 if cfg else 1.0,
        **more,
        **common(images, size, steps, seed),
    ).frames


def generate_mochi(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    frames, steps = 6 * FRAMES - 5, max(steps, 2)  # its schedule divides by half of the steps
    return generate_masked(pipe, images, size, steps, cfg, captions, seed, num_frames=frames)


def ltx_transformer() -> Any:
    from diffusers import LTXVideoTransformer3DModel

    return seeded(
        LTXVideoTransformer3DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )


def ltx() -> Any:
    from diffusers import LTXPipeline

    return quiet(
        LTXPipeline(
            scheduler=flow_scheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=ltx_transformer(),
        )
    )


def generate_ltx(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    frames = 8 * FRAMES - 7
    return generate_masked(pipe, images, size, steps, cfg, captions, seed, num_frames=frames)


def ltx_image_to_video() -> Any:
    from diffusers import LTXImageToVideoPipeline

    return quiet(
        LTXImageToVideoPipeline(
            scheduler=flow_scheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=ltx_transformer(),
        )
    )


def generate_ltx_image_to_video(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    """The tokens of the first frame come first and are those of the image."""
    frame = (size[0] // 32) * (size[1] // 32)
    given = embeddings(1, frame, 4).repeat(images, 1, 1)
    return generate_masked(
        pipe,
        images,
        size,
        steps,
        cfg,
        captions,
        seed,
        image=torch.zeros(1, 3, *size),
        latents=torch.cat([given, noise(images, seed, (FRAMES - 1) * frame, 4)], dim=1),
        num_frames=8 * FRAMES - 7,
    )


def ltx_2() -> Any:
    from diffusers import LTX2VideoTransformer3DModel

    transformer = seeded(
        LTX2VideoTransformer3DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    return DenoiserLoop(transformer, flow_scheduler())


def generate_ltx_2(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    height, width = size[0] // 32, size[1] // 32
    parts, tokens = 2 if cfg else 1, FRAMES * height * width
    text, mask = prompt(images, 16, max(captions)), caption_mask(captions)
    text, mask = (torch.cat([-text, text]), mask.repeat(2, 1)) if cfg else (text, mask)
    audio = noise(images, seed + 50, 7, 4)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        output = pipe.transformer(
            hidden_states=torch.cat([latents] * parts),
            audio_hidden_states=torch.cat([audio] * parts),
            encoder_hidden_states=text,
            audio_encoder_hidden_states=text,
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            timestep=timestep.expand(parts * images),
            num_frames=FRAMES,
            height=height,
            width=width,
            audio_num_frames=7,
            return_dict=False,
        )[0]
        return output.chunk(2)[0] * -2 + output.chunk(2)[1] * 3 if cfg else output

    return pipe(noise(images, seed, tokens, 4), predict, steps)


def allegro() -> Any:
    from diffusers import (
        AllegroPipeline,
        AllegroTransformer3DModel,
        EulerAncestralDiscreteScheduler,
    )

    transformer = seeded(
        AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
        sample_width=12,
        sample_height=8,
        sample_frames=FRAMES,
    )
    return quiet(
        AllegroPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=transformer,
            scheduler=EulerAncestralDiscreteScheduler(),
        )
    )


def generate_allegro(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    more = {"num_frames": 4 * FRAMES, "negative_prompt": None if cfg else ""}
    return generate_masked(pipe, images, size, steps, cfg, captions, seed, **more)


def latte() -> Any:
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    transformer = seeded(
        LatteTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=16,
        video_length=FRAMES,
    )
    return quiet(
        LattePipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=transformer,
            scheduler=DDIMScheduler(clip_sample=False),
        )
    )


def generate_latte(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    text = prompt(images, 16)
    return pipe(
        prompt_embeds=text,
        negative_prompt_embeds=-text if cfg else None,
        negative_prompt=None if cfg else "",
        guidance_scale=3.0 if cfg else 1.0,
        video_length=FRAMES,
        mask_feature=False,
        **common(images, size, steps, seed),
    ).frames


def easyanimate() -> Any:
    from diffusers import EasyAnimatePipeline, EasyAnimateTransformer3DModel

    transformer = seeded(
        EasyAnimateTransformer3DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=12,
        sample_height=8,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
    )
    return quiet(
        EasyAnimatePipeline(
            vae=Autoencoder(8),
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
            scheduler=flow_scheduler(),
        )
    )


def generate_easyanimate(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    frames = 4 * FRAMES - 3
    return generate_masked(pipe, images, size, steps, cfg, captions, seed, num_frames=frames)


def sana_video() -> Any:
    from diffusers import SanaVideoPipeline, SanaVideoTransformer3DModel

    transformer = seeded(
        SanaVideoTransformer3DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        rope_max_seq_len=32,
    )
    return quiet(
        SanaVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=transformer,
            scheduler=flow_scheduler(),
        )
    )


def generate_sana_video(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    more = {
        "frames": 4 * FRAMES - 3,
        "use_resolution_binning": False,
        "negative_prompt": None if cfg else "",
    }
    return generate_masked(pipe, images, size, steps, cfg, captions, seed, **more)


def kandinsky_5() -> Any:
    from diffusers import Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel

    transformer = seeded(
        Kandinsky5Transformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    return quiet(
        Kandinsky5T2VPipeline(
            transformer=transformer,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            scheduler=flow_scheduler(),
        )
    )


def generate_kandinsky_5(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    text, pooled = prompt(images, 16), embeddings(1, 8).repeat(images, 1)
    lengths = torch.arange(images + 1, dtype=torch.int32) * TEXT
    negative = {
        "negative_prompt_embeds_qwen": -text,
        "negative_prompt_embeds_clip": -pooled,
        "negative_prompt_cu_seqlens": lengths,
    }
    return pipe(
        prompt_embeds_qwen=text,
        prompt_embeds_clip=pooled,
        prompt_cu_seqlens=lengths,
        guidance_scale=3.0 if cfg else 1.0,
        num_frames=4 * FRAMES - 3,
        **(negative if cfg else {}),
        **common(images, size, steps, seed),
    ).frames


def animatediff() -> Any:
    from diffusers import AnimateDiffPipeline, DDIMScheduler, UNetMotionModel

    unet = seeded(
        UNetMotionModel,
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
    )
    return quiet(
        AnimateDiffPipeline(
            vae=None,
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            motion_adapter=None,
            scheduler=DDIMScheduler(clip_sample=False),
        )
    )


def generate_animatediff(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    text = prompt(images, 16)
    return pipe(
        prompt_embeds=text,
        negative_prompt_embeds=-text if cfg else None,
        guidance_scale=3.0 if cfg else 1.0,
        num_frames=FRAMES,
        **common(images, size, steps, seed),
    ).frames


def modelscope() -> Any:
    from diffusers import DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel

    unet = seeded(
        UNet3DConditionModel,
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    return quiet(
        TextToVideoSDPipeline(
            vae=None,
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=DDIMScheduler(clip_sample=False),
        )
    )


WHOLE_32 = {(64, 96): {(2, 3)}, (128, 32): {(4, 1)}}
"""Of latents of a 32nd of the size, in patches of one."""

IN_UNETS = {(64, 96): {(8, 12), (4, 6)}, (80, 32): {(10, 4), (5, 2)}}

FAMILIES: dict[str, Family] = {
    "wan": Family("WanTransformer3DModel", wan, generate_wan, GRIDS, FRAMES),
    "wan times by token": Family(
        "WanTransformer3DModel", wan_with_times_by_token, generate_wan, GRIDS, FRAMES
    ),
    "wan image-to-video": Family(
        "WanTransformer3DModel",
        wan_image_to_video_by_channels,
        generate_wan_image_to_video,
        GRIDS,
        FRAMES,
    ),
    "wan image-to-video by token": Family(
        "WanTransformer3DModel",
        wan_image_to_video_by_token,
        generate_wan_image_to_video,
        GRIDS,
        FRAMES - 1,
    ),
    "skyreels": Family("SkyReelsV2Transformer3DModel", skyreels, generate_wan, GRIDS, FRAMES),
    "skyreels diffusion forcing": Family(
        "SkyReelsV2Transformer3DModel",
        skyreels_diffusion_forcing,
        generate_skyreels_diffusion_forcing,
        GRIDS,
        FRAMES,
    ),
    "hunyuan video": Family(
        "HunyuanVideoTransformer3DModel",
        hunyuan_video,
        generate_hunyuan_video,
        GRIDS,
        FRAMES,
        several_captions=True,
        note="text-to-video",
    ),
    "hunyuan video image-to-video": Family(
        "HunyuanVideoTransformer3DModel",
        hunyuan_video_token_replace,
        generate_hunyuan_video_token_replace,
        GRIDS,
        FRAMES - 1,
        whole=False,
        cfg=False,
        several_captions=True,
        note="image-to-video",
    ),
    "framepack": Family(
        "HunyuanVideoFramepackTransformer3DModel",
        framepack,
        generate_framepack,
        GRIDS,
        FRAMES,
        whole=False,
        cfg=False,
        several_captions=True,
    ),
    "hunyuan video 1.5": Family(
        "HunyuanVideo15Transformer3DModel",
        hunyuan_video_15,
        generate_hunyuan_video_15,
        GRIDS,
        FRAMES,
        several_captions=True,
    ),
    "cogvideox": Family(
        "CogVideoXTransformer3DModel", cogvideox, generate_cogvideox, GRIDS, FRAMES
    ),
    "cogvideox 1.5": Family(
        "CogVideoXTransformer3DModel", cogvideox_15, generate_cogvideox, GRIDS, 2
    ),
    "consisid": Family(
        "ConsisIDTransformer3DModel", consisid, generate_consisid, GRIDS, FRAMES, whole=False
    ),
    "mochi": Family(
        "MochiTransformer3DModel",
        mochi,
        generate_mochi,
        GRIDS,
        FRAMES,
        several_captions=True,
        timesteps=lambda t: 1000 - t,
    ),
    "ltx": Family(
        "LTXVideoTransformer3DModel", ltx, generate_ltx, WHOLE_32, FRAMES, several_captions=True
    ),
    "ltx image-to-video": Family(
        "LTXVideoTransformer3DModel",
        ltx_image_to_video,
        generate_ltx_image_to_video,
        WHOLE_32,
        FRAMES - 1,
        several_captions=True,
    ),
    "ltx 2": Family(
        "LTX2VideoTransformer3DModel",
        ltx_2,
        generate_ltx_2,
        WHOLE_32,
        FRAMES,
        whole=False,
        several_captions=True,
    ),
    "allegro": Family(
        "AllegroTransformer3DModel",
        allegro,
        generate_allegro,
        GRIDS,
        FRAMES,
        several_captions=True,
    ),
    "latte": Family("LatteTransformer3DModel", latte, generate_latte, GRIDS, FRAMES),
    "easyanimate": Family(
        "EasyAnimateTransformer3DModel", easyanimate, generate_easyanimate, GRIDS, FRAMES
    ),
    "animatediff": Family(
        "UNetMotionModel",
        animatediff,
        generate_animatediff,
        IN_UNETS,
        FRAMES,
    ),
    "modelscope": Family(
        "UNet3DConditionModel", modelscope, generate_animatediff, IN_UNETS, FRAMES
    ),
    "sana video": Family(
        "SanaVideoTransformer3DModel",
        sana_video,
        generate_sana_video,
        {(64, 96): {(4, 6)}, (96, 32): {(6, 2)}},
        FRAMES,
        several_captions=True,
    ),
    "kandinsky 5": Family(
        "Kandinsky5Transformer3DModel", kandinsky_5, generate_kandinsky_5, GRIDS, FRAMES
    ),
    "wan vace": Family(
        "WanVACETransformer3DModel",
        wan_vace,
        generate_wan_like_loop,
        GRIDS,
        FRAMES,
        whole=False,
        cfg=False,
    ),
    "chronoedit": Family(
        "ChronoEditTransformer3DModel",
        chronoedit,
        generate_wan_like_loop,
        GRIDS,
        FRAMES,
        whole=False,
        cfg=False,
    ),
}
