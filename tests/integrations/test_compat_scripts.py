"""The authors' scripts run with one import changed."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from helpers.compat_emulation import small_vae
from helpers.pipelines_fixtures import sdxl_pipeline
from negtome_fast.compat import (
    FluxNegToMePipeline,
    StableDiffusionXLNegToMePipeline,
)
from negtome_fast.models import model_folder


def test_example_of_their_readme_for_flux() -> None:
    """With the import changed; a small model, fewer steps and no display."""
    pipe = FluxNegToMePipeline.from_pretrained(str(model_folder()), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    negtome_args = {
        "use_negtome": False,
        "merging_alpha": 0.9,
        "merging_threshold": 0.65,
        "merging_dropout": 0.0,
        "merging_t_start": 1000,
        "merging_t_end": 900,
        "num_joint_blocks": -1,
        "num_single_blocks": -1,
    }
    inference_times, results = [], []
    for use_negtome in [False, True]:
        generator = torch.Generator(pipe.device).manual_seed(0)
        start_time = time.time()
        images = pipe(
            prompt="a pixel art person",
            guidance_scale=3.5,
            height=64,
            width=64,
            num_inference_steps=3,
            generator=generator,
            num_images_per_prompt=4,
            use_negtome=use_negtome,
            negtome_args=negtome_args,
            max_sequence_length=16,
        ).images
        inference_times.append(time.time() - start_time)
        results.append(images)
    assert [len(images) for images in results] == [4, 4]
    assert results[0][0].tobytes() == results[1][0].tobytes()
    assert all(results[0][i].tobytes() != results[1][i].tobytes() for i in (1, 2, 3))
    assert pipe.negtome_summary is not None and pipe.negtome_summary.guided == 1


def sdxl_with_text() -> StableDiffusionXLNegToMePipeline:
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz,"]
    vocabulary = {word: i for i, word in enumerate([*words, *(w + "</w>" for w in words[2:])])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    components = {
        **sdxl_pipeline().components,
        "vae": small_vae(4),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "text_encoder": CLIPTextModel(config).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(config).eval(),
        "add_watermarker": False,
    }
    pipe = StableDiffusionXLNegToMePipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_example_of_their_gradio_demo_for_sdxl() -> None:
    """The call of `generate_images`; a small model, size and number of steps."""
    pipe = sdxl_with_text()
    results = []
    for use_negtome in (False, True):
        negtome_args = {
            "use_negtome": use_negtome,
            "merging_alpha": 1.9,
            "merging_threshold": 0.7,
            "merging_t_start": 1000,
            "merging_t_end": 800,
            "blocks": ["up_blocks"],
        }
        generator = torch.Generator(pipe.device).manual_seed(0)
        with torch.no_grad():
            output = pipe(
                prompt=["a photo of a person", "a photo of a cat"],
                guidance_scale=5.0,
                height=256,
                width=256,
                num_inference_steps=4,
                generator=generator,
                num_images_per_prompt=2,
                negative_prompt=["deformed, blurry"] * 2,
                use_negtome=use_negtome,
                negtome_args=negtome_args,
            )
        results.append(output.images)
    assert [len(images) for images in results] == [4, 4]
    assert results[0][0].tobytes() == results[1][0].tobytes()
    assert pipe.negtome_summary is not None
    assert (pipe.negtome_summary.guided, pipe.negtome_summary.groups) == (1, 2)
    assert pipe.negtome_summary.total.pushed > 0


def test_seed_is_used_where_no_generator_is_given() -> None:
    pipe = sdxl_with_text()
    call = {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 1}
    images = [pipe(**call, **seed).images[0].tobytes() for seed in ({}, {"seed": 0}, {"seed": 1})]
    assert images[0] == images[1] != images[2]


def test_importing_the_names_does_not_import_diffusers() -> None:
    program = (
        "import sys, negtome_fast.compat as c; c.negtome; c.NegtomeArgs(); "
        "assert 'diffusers' not in sys.modules; "
        "sys.modules['diffusers'] = None\n"
        "try: c.FluxNegToMePipeline\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "negtome-fast[diffusers]" in done.stdout
