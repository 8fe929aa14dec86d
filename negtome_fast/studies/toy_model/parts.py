"""The untrained parts of the embedded pipeline: tokenizers, text encoders, VAE and transformer."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...models import TEXT_LENGTH
from ...models import avatars as world

TEXT_WIDTH = 64
LATENT_CHANNELS = 8


def build_tokenizers() -> tuple[Any, Any]:
    """Return word-level tokenizers in the formats of CLIP (bos, eos) and T5 (eos)."""
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
    """Return a CLIP text encoder of one layer and a T5 encoder of two."""
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
    """Return a VAE that takes 64 x 64 pixels to 16 x 16 latents of `LATENT_CHANNELS`."""
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
    """Return a FLUX transformer of two joint and four single blocks."""
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
