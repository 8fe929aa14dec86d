"""The authors' pipelines: their scripts, their placement, their defaults, their reference picture.

Their placement is written out here once more, with hooks around the definition in fp64, and shares
no code with the package's hooks.
"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL, DDIMScheduler, FluxPipeline, StableDiffusionXLPipeline
from PIL import Image
from test_compat import authors_definition
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from helpers.pipelines_fixtures import TEXT, flux_pipeline, generate, sdxl_pipeline
from negtome_fast.compat import (
    FluxNegToMePipeline,
    NegtomeArgs,
    StableDiffusionXLNegToMePipeline,
    update_args,
)
from negtome_fast.models import model_folder

# The guidance keeps alpha and threshold in fp32; these are the same numbers there.
ARGS = {"merging_alpha": 0.875, "merging_threshold": 0.25, "merging_t_end": 0}
Recorded = dict[str, list[Tensor]]


@pytest.fixture
def double() -> Iterator[None]:
    """Models and noise in fp64: the tokens of a small model lie so close together that fp32's
    rounding would choose another match now and then."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def flux() -> FluxNegToMePipeline:
    pipe = FluxNegToMePipeline(**flux_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl() -> StableDiffusionXLNegToMePipeline:
    components = {**sdxl_pipeline().components, "add_watermarker": False}
    pipe = StableDiffusionXLNegToMePipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def recorded(model: nn.Module) -> Iterator[Recorded]:
    """What every attention module hands on, step by step."""
    outputs: Recorded = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            outputs.setdefault(name, []).append(first.clone())

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if name.endswith((".attn", ".attn1", ".attn2"))
    ]
    yield outputs
    for hook in hooks:
        hook.remove()


class Emulation:
    """Where and when the authors' processors call their function, as hooks around the definition.

    FLUX.1: on the image's part of what attention gives, before the projection of the double
    blocks, in the single blocks after `num_lang_tokens`. SDXL: after the projection, on the first
    and the second half of the batch, where the block's name begins with one of `blocks` and its
    height and width are at least `min_attn_dim`.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 0.875,
        threshold: float = 0.25,
        window: tuple[float, float] = (1000, 0),
        blocks: tuple[str, ...] = ("up_blocks",),
        joint: int = -1,
        single: int = -1,
        min_attn_dim: int = 32,
        mask: Tensor | None = None,
    ) -> None:
        self.settings = (alpha, threshold)
        self.window, self.mask, self.min_attn_dim = window, mask, min_attn_dim
        self.time, self.shape = 0.0, (0, 0)
        self.hooks = [model.register_forward_pre_hook(self.read_time, with_kwargs=True)]
        if hasattr(model, "transformer_blocks"):
            doubles, singles = model.transformer_blocks, model.single_transformer_blocks
            for block in doubles[: None if joint < 0 else joint]:
                hook = block.attn.to_out[0].register_forward_pre_hook(self.before_projection)
                self.hooks.append(hook)
            for block in singles[: None if single < 0 else single]:
                self.hooks.append(block.attn.register_forward_hook(self.after_single))
            return
        for name, module in model.named_modules():
            if type(module).__name__ == "Transformer2DModel":
                self.hooks.append(module.register_forward_pre_hook(self.read_shape))
            if name.startswith(blocks) and name.endswith((".attn1", ".attn2")):
                self.hooks.append(module.register_forward_hook(self.after_attention))

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def read_time(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.time = float(kwargs["timestep"][0] * 1000 if "timestep" in kwargs else args[1])

    def read_shape(self, module: nn.Module, args: Any) -> None:
        self.shape = tuple(args[0].shape[-2:])

    def push(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        if not self.window[1] <= self.time <= self.window[0]:
            return tokens
        pairs = None
        if self.mask is not None:
            mask = self.mask
            if grid is not None:
                mask = F.interpolate(mask[None, None], grid, mode="nearest-exact")[0, 0]
            pairs = (mask.flatten() != 0).expand(len(tokens) * tokens.shape[1], -1)
        return authors_definition(tokens, *self.settings, pairs).to(tokens.dtype)

    def before_projection(self, module: nn.Module, args: Any) -> Any:
        return (self.push(args[0]),)

    def after_single(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :TEXT], self.push(output[:, TEXT:])], dim=1)

    def after_attention(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if min(self.shape) < self.min_attn_dim:
            return None
        half = len(output) // 2
        parts = [self.push(part, self.shape) for part in (output[:half], output[half:])]
        return torch.cat(parts)


def agree(ours: Recorded, theirs: Recorded) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert a.dtype == torch.float64
            torch.testing.assert_close(
                a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(
    ("given", "emulated"),
    [
        ({}, {}),
        ({"merging_alpha": 1.75, "merging_threshold": 0.5}, {"alpha": 1.75, "threshold": 0.5}),
        ({"merging_t_start": 900, "merging_t_end": 600}, {"window": (900, 600)}),
        ({"num_joint_blocks": 1}, {"joint": 1}),
        ({"num_single_blocks": 1, "num_joint_blocks": 0}, {"single": 1, "joint": 0}),
        ({"num_joint_blocks": 99}, {}),
    ],
    ids=str,
)
def test_flux_attention_agrees_with_their_placement(
    double: None, given: dict[str, Any], emulated: dict[str, Any]
) -> None:
    pipe, run = flux(), {"steps": 3, "size": (64, 96)}
    with recorded(pipe.transformer) as plain:
        generate(pipe, **run)
    with recorded(pipe.transformer) as ours:
        images = generate(pipe, **run, use_negtome=True, negtome_args={**ARGS, **given})
    with recorded(pipe.transformer) as theirs, Emulation(pipe.transformer, **emulated):
        expected = generate(pipe, **run)
    agree(ours, theirs)
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
    last = "single_transformer_blocks.1.attn"
    assert not torch.allclose(ours[last][-1], plain[last][-1], atol=1e-3)


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
@pytest.mark.parametrize(
    ("given", "emulated"),
    [
        ({}, {}),
        ({"blocks": ["down_blocks.1", "mid_block"], "min_attn_dim": 1}, {}),
        ({"merging_t_end": 500}, {"window": (1000, 500)}),
    ],
    ids=str,
)
def test_sdxl_attention_agrees_with_their_placement(
    double: None, given: dict[str, Any], emulated: dict[str, Any], cfg: bool
) -> None:
    """Each half by itself, also without guidance, where theirs has halves all the same."""
    pipe, run = sdxl(), {"steps": 3, "size": (64, 96), "cfg": cfg}
    given = {"min_attn_dim": 8, **given}  # of grids of 8 x 12 and 4 x 6
    emulated = {"min_attn_dim": given["min_attn_dim"], **emulated}
    emulated["blocks"] = tuple(given.get("blocks", ["up_blocks"]))
    with recorded(pipe.unet) as plain:
        generate(pipe, **run)
    with recorded(pipe.unet) as ours:
        images = generate(pipe, **run, use_negtome=True, negtome_args={**ARGS, **given})
    with recorded(pipe.unet) as theirs, Emulation(pipe.unet, **emulated):
        expected = generate(pipe, **run)
    agree(ours, theirs)
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
    assert any(not torch.allclose(ours[n][-1], plain[n][-1], atol=1e-3) for n in ours)


@pytest.mark.parametrize("make", [flux, sdxl])
def test_without_use_negtome_it_is_diffusers_pipeline(make: Any) -> None:
    pipe = make()
    base = FluxPipeline if make is flux else StableDiffusionXLPipeline
    extra = {} if make is flux else {"add_watermarker": False}
    plain = base(**pipe.components, **extra)
    plain.set_progress_bar_config(disable=True)
    expected = generate(plain)
    assert torch.equal(generate(pipe, negtome_args={"use_negtome": True, **ARGS}), expected)
    low = {} if make is flux else {"min_attn_dim": 8}
    guided = generate(pipe, use_negtome=True, negtome_args={"use_negtome": False, **ARGS, **low})
    assert not torch.equal(guided[1], expected[1])
    assert torch.equal(generate(pipe), expected)


def test_paper_matching_is_one_argument_away() -> None:
    pipe, results = flux(), {}
    for matching in ("official", "paper"):
        arguments = NegtomeArgs(merging_t_end=0, merging_threshold=0.3, matching=matching)  # type: ignore[arg-type]
        results[matching] = generate(pipe, use_negtome=True, negtome_args=arguments)
        assert pipe.negtome_summary is not None and pipe.negtome_summary.total.pushed > 0
    assert not torch.equal(results["official"][1], results["paper"][1])
    assert torch.equal(results["official"][0], results["paper"][0])


def test_defaults_are_those_of_the_two_pipelines() -> None:
    seen = []
    for pipe in (flux(), sdxl()):

        def config(*args: Any, pipe: Any = pipe, **kwargs: Any) -> Any:
            from negtome_fast.pipelines.hooks import find_hooks

            model = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
            seen.append(find_hooks(model).guidance.config)
            return kwargs or args[3]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these grids are smaller than 32 x 32
            generate(pipe, steps=1, use_negtome=True, callback_on_step_end=config)
    for c, (threshold, end) in zip(seen, ((0.65, 900), (0.7, 800)), strict=True):
        assert (c.alpha, c.threshold, c.dropout, c.t_start, c.t_end) == (
            0.9,
            threshold,
            0.0,
            1000,
            end,
        )
        assert (c.matching, c.reference) == ("official", "first")
    assert seen[0].min_grid is None and seen[0].placement == "pre_projection"
    assert seen[1].min_grid == (32, 32) and seen[1].placement == "output"
    assert {"merging_alpha", "rag_assets"} <= set(vars(NegtomeArgs()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"merging_alhpa": 1.0},
            r"no key 'merging_alhpa' \(did you mean 'merging_alpha'\?\).*noise",
        ),
        ({"alpha": 1.0, "beta": 2}, "'alpha', 'beta'"),
        ({"use_rag_assets": True}, r"rag_assets=\[\(image, mask\)\]"),
        ({"num_lang_tokens": 77}, "77, but the prompt has 5 tokens"),
        ({"merging_threshold": 7}, "threshold"),
    ],
)
@pytest.mark.parametrize("use_negtome", [True, False])
def test_bad_arguments_are_one_clear_error(
    arguments: dict[str, Any], message: str, use_negtome: bool
) -> None:
    if "merging_threshold" in arguments and not use_negtome:
        return
    with pytest.raises(ValueError, match=message):
        generate(flux(), use_negtome=use_negtome, negtome_args=arguments)
    with pytest.raises(TypeError, match="dict or NegtomeArgs, not list"):
        generate(flux(), negtome_args=[("merging_alpha", 1)])


def test_keys_of_the_other_pipeline_are_told() -> None:
    with pytest.warns(UserWarning, match="FluxNegToMePipeline has no use for blocks"):
        generate(flux(), steps=1, negtome_args={"blocks": ["up_blocks"]})
    assert update_args(NegtomeArgs(), {"merging_alpha": 2.0}).merging_alpha == 2.0


def test_window_is_compared_in_the_dtype_of_the_latents() -> None:
    """Their FLUX.1 code sees 899 as 900 in bf16, and 899.99994 as outside in fp32."""
    from negtome_fast.compat.arguments import AuthorsConfig

    config = AuthorsConfig(t_end=900)
    half = AuthorsConfig(t_end=900, time_dtype=torch.bfloat16)
    assert [c.includes_step(899.0) for c in (config, half)] == [False, True]
    assert [c.includes_step(899.99994) for c in (config, half)] == [False, True]
    assert [c.includes_step(897.9) for c in (config, half)] == [False, False]
    assert config.includes_step(900.0)


def test_several_prompts_have_the_first_image_as_reference(double: None) -> None:
    """One reference for the whole batch, whichever prompt an image has."""
    pipe = flux()
    prompts = torch.randn(2, TEXT, 16, generator=torch.Generator().manual_seed(1))
    prompts = prompts.repeat_interleave(2, dim=0)
    call = {
        "prompt_embeds": prompts,
        "pooled_prompt_embeds": prompts[:, 0],
        "height": 64,
        "width": 64,
        "num_inference_steps": 2,
        "output_type": "latent",
    }

    def latents() -> Tensor:
        return torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(2))

    with torch.no_grad():
        plain = pipe(**call, latents=latents()).images
        ours = pipe(**call, latents=latents(), use_negtome=True, negtome_args=ARGS).images
        with Emulation(pipe.transformer):
            theirs = pipe(**call, latents=latents()).images
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert torch.equal(ours[0], plain[0])
    assert all(not torch.equal(ours[i], plain[i]) for i in (1, 2, 3))


def test_guidance_scale_has_their_default_and_positions_are_diffusers() -> None:
    pipe, text = flux(), torch.zeros(2, TEXT, 16)
    embeds = {"prompt_embeds": text, "pooled_prompt_embeds": text[:, 0], "output_type": "latent"}
    with torch.no_grad():
        pipe(height=32, width=32, num_inference_steps=1, **embeds)
        assert pipe.guidance_scale == 7.0
        pipe(None, None, None, None, 1.0, 32, 32, 1, None, 2.5, **embeds)
        assert pipe.guidance_scale == 2.5
    with pytest.raises(TypeError, match="unexpected keyword argument 'heigth'"):
        pipe(heigth=32, **embeds)


# The reference picture -------------------------------------------------------------------------


def small_vae(channels: int) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=0.4,
        shift_factor=0.1,
        force_upcast=True,
    ).eval()


def picture(height: int, width: int) -> tuple[Image.Image, Image.Image]:
    rows = torch.linspace(0, 255, height).byte()[:, None].expand(height, width)
    columns = torch.linspace(0, 255, width).byte().expand(height, width)
    image = torch.stack([rows, columns, rows.flip(0)], -1).numpy()
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[: height // 2, : width // 3] = 255
    return Image.fromarray(image), Image.fromarray(mask.numpy()).convert("RGB")


@pytest.mark.parametrize("noise", [False, True], ids=["clean", "noised"])
@pytest.mark.parametrize("scheduler", ["flow", "euler", "ddim"])
def test_reference_picture_is_the_first_item_of_every_step(
    double: None, scheduler: str, noise: bool
) -> None:
    """Against a loop that is written out here: encode, sample, noise, put in place, step."""
    is_flux = scheduler == "flow"
    pipe = flux() if is_flux else sdxl()
    if scheduler == "ddim":
        pipe.register_modules(scheduler=DDIMScheduler(clip_sample=False, steps_offset=1))
    pipe.register_modules(vae=small_vae(4))
    pipe.vae_scale_factor = 8
    height, width = 64, 64
    image, mask = picture(height, width)
    arguments = {**ARGS, "use_rag_assets": True, "rag_assets": [(image, mask)], "noise_rag": noise}
    if not is_flux:
        arguments["min_attn_dim"] = 8

    def call(**more: Any) -> Tensor:
        random = torch.Generator().manual_seed(3)
        text = torch.randn(1, TEXT, 16, generator=random)
        given = {
            "prompt_embeds": text,
            "pooled_prompt_embeds": text[:, 0],
            "num_images_per_prompt": 3,
            "height": height,
            "width": width,
            "num_inference_steps": 3,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(5),
            **more,
        }
        if not is_flux:
            given.update(
                negative_prompt_embeds=-text,
                negative_pooled_prompt_embeds=-text[:, 0],
                guidance_scale=3.0,
            )
        with torch.no_grad():
            return pipe(**given).images

    model = pipe.transformer if is_flux else pipe.unet
    with recorded(model) as ours:
        result = call(use_negtome=True, negtome_args=arguments)
    assert "step" not in vars(pipe.scheduler)
    hooks = (model._forward_pre_hooks, model._forward_hooks)
    assert not any(hooks)

    expected, recordings = their_loop(pipe, model, image, mask, noise, call)
    agree(ours, recordings)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    # The picture is in the batch without guidance too, and the masked run differs from it.
    unguided = call(use_negtome=False, negtome_args=arguments)
    torch.testing.assert_close(unguided[0], result[0], rtol=0, atol=1e-4)
    assert not torch.allclose(unguided[1], result[1], atol=1e-4)


def their_loop(
    pipe: Any, model: nn.Module, image: Image.Image, mask: Image.Image, noise: bool, call: Any
) -> tuple[Tensor, Recorded]:
    """Their changes to the loop: `latents` gets its first item before the model and the step.

    Written into the loop's own tensor: FLUX hands it to the model, SDXL's scheduler is handed it
    to be scaled twice over, and so it is taken from the step before.
    """
    is_flux = hasattr(pipe, "transformer")
    generator: list[torch.Generator] = []
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    pixels = (2 * pixels - 1).double()

    def rag_latents(timestep: Tensor) -> Tensor:
        latents = pipe.vae.encode(pixels).latent_dist.sample(generator[0])
        if is_flux:
            latents = (latents - 0.1) * 0.4
        else:
            latents = latents * 0.4
        if noise:
            drawn = torch.randn(latents.shape, generator=generator[0])
            if is_flux:
                latents = pipe.scheduler.scale_noise(latents, timestep.view(1), drawn)
            else:
                latents = pipe.scheduler.add_noise(latents, drawn, timestep.view(1))
        if is_flux:
            b, c, h, w = latents.shape
            latents = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
            latents = latents.reshape(b, h * w // 4, c * 4)
        return latents

    def replaced(*args: Any) -> Tensor:
        made = prepare(*args)
        made = made[0] if is_flux else made
        generator.append(args[6])
        if not is_flux:
            made[:1] = rag_latents(pipe.scheduler.timesteps[0])
        return (made, prepared_ids[0]) if is_flux else made

    prepared_ids: list[Any] = []
    original = pipe.prepare_latents

    def prepare(*args: Any) -> Any:
        result = original(*args)
        if is_flux:
            prepared_ids.append(result[1])
        return result

    def at_the_end(pipe: Any, i: int, t: Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        if not is_flux and i + 1 < len(pipe.scheduler.timesteps):
            kept["latents"] = torch.cat(
                [rag_latents(pipe.scheduler.timesteps[i + 1]), kept["latents"][1:]]
            )
        return kept

    def in_the_loop(module: nn.Module, args: Any, kwargs: Any) -> None:
        timestep = torch.as_tensor(pipe._current_timestep)
        kwargs["hidden_states"][:1] = rag_latents(timestep)

    pipe.prepare_latents = replaced
    hook = None
    if is_flux:
        hook = model.register_forward_pre_hook(in_the_loop, with_kwargs=True)
    whole = torch.from_numpy(np.array(mask.convert("L"))).double() / 255
    size = (4, 4) if is_flux else (8, 8)
    gate = F.interpolate(whole[None, None], size, mode="nearest-exact")[0, 0]
    with recorded(model) as recordings, Emulation(model, mask=gate, min_attn_dim=8):
        result = call(callback_on_step_end=at_the_end)
    del pipe.prepare_latents
    if hook is not None:
        hook.remove()
    return result, recordings


def test_an_error_leaves_the_pipeline_as_it_was() -> None:
    pipe = flux()
    before = generate(pipe)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    pipe.register_modules(vae=small_vae(4))
    pipe.vae_scale_factor = 8
    arguments = {**ARGS, "use_rag_assets": True, "rag_assets": [(picture(64, 96)[0], None)]}
    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, use_negtome=True, negtome_args=arguments, callback_on_step_end=fail)
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(generate(pipe), before)


# Their scripts ---------------------------------------------------------------------------------


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
