"""Attention whose batch is not that of the latents: branches inside of the model, dropped items.

Negative attention guidance (NAG) computes a positive and a negative branch from one latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.families import FAMILIES
from helpers.families.core import embeddings, noise_generators
from negtome_fast import Reference
from negtome_fast.config import NegToMeConfig
from negtome_fast.functional import negtome
from negtome_fast.pipelines import negtome_guidance

EVERY_TOKEN = NegToMeConfig(threshold=-1, t_end=0)
BRANCHES = 2


@contextmanager
def branched(model: nn.Module, branches: int = BRANCHES) -> Iterator[None]:
    """Run the blocks of FLUX on that many branches of each item, one copy after the other."""

    def expand(tokens: Tensor, signs: bool) -> Tensor:
        return torch.cat([tokens * (1 - 2 * signs * branch) for branch in range(branches)])

    def before(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = dict(kwargs)
        if block is model.transformer_blocks[0]:
            kwargs["hidden_states"] = expand(kwargs["hidden_states"], signs=False)
            kwargs["encoder_hidden_states"] = expand(kwargs["encoder_hidden_states"], signs=True)
        kwargs["temb"] = expand(kwargs["temb"], signs=False)
        return args, kwargs

    def merge(module: nn.Module, args: Any) -> Any:
        positive, negative = args[0].chunk(branches)[0], args[0].chunk(branches)[-1]
        return (2 * positive - negative, *args[1:])

    with ExitStack() as stack:
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            stack.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
        stack.enter_context(model.norm_out.register_forward_pre_hook(merge))
        yield


def generate(pipe: Any, images: int) -> Tensor:
    with torch.no_grad():
        return pipe(
            prompt_embeds=embeddings(1, 5, 16).repeat(images, 1, 1),
            pooled_prompt_embeds=embeddings(1, 16).repeat(images, 1),
            generator=noise_generators(images, 7),
            num_inference_steps=2,
            height=64,
            width=96,
            output_type="latent",
        ).images


@pytest.fixture
def flux() -> Iterator[Any]:
    """In fp64 a batch of another size rounds too little to decide between two equal tokens."""
    torch.set_default_dtype(torch.float64)
    yield FAMILIES["flux"].build()
    torch.set_default_dtype(torch.float32)


def test_one_image_of_two_branches_is_not_guided_by_itself(flux: Any) -> None:
    with branched(flux.transformer):
        plain = generate(flux, 1)
        with (
            negtome_guidance(flux, EVERY_TOKEN),
            pytest.warns(UserWarning, match="only reference items"),
        ):
            assert torch.equal(generate(flux, 1), plain)


@pytest.mark.parametrize("reference", ["first", "others"])
def test_each_branch_is_guided_by_itself(flux: Any, reference: Any) -> None:
    blocks = dict(flux.transformer.named_modules())

    def push(module: nn.Module, args: Any, output: Any) -> Any:
        text = 0 if isinstance(output, tuple) else 5
        tokens = output if text else output[0]
        tokens = torch.cat(
            [negtome(part, reference, threshold=-1) for part in tokens[:, text:].chunk(BRANCHES)]
        )
        return torch.cat([output[:, :text], tokens], dim=1) if text else (tokens, *output[1:])

    with branched(flux.transformer):
        with negtome_guidance(flux, EVERY_TOKEN, reference=reference) as handle:
            guided = generate(flux, 2)
        with ExitStack() as stack:
            for name in handle.blocks:
                stack.enter_context(blocks[name].register_forward_hook(push))
            expected = generate(flux, 2)
    torch.testing.assert_close(guided, expected)


def test_a_reference_is_recorded_in_each_branch(flux: Any) -> None:
    """The first image, given as a reference, guides the second as it does in the batch."""
    first = embeddings(2, 24, 16, seed=5)
    call = {
        "hidden_states": first,
        "encoder_hidden_states": embeddings(1, 5, 16).repeat(2, 1, 1),
        "pooled_projections": embeddings(1, 16).repeat(2, 1),
        "timestep": torch.ones(2),
        "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 4, 6))).double(),
        "txt_ids": torch.zeros(5, 3),
    }
    outputs: list[Tensor] = []
    with branched(flux.transformer), torch.no_grad():
        plain = flux.transformer(**call)[0]
        for given in (None, Reference(first[:1], noise=False)):
            with negtome_guidance(flux.transformer, EVERY_TOKEN, reference=given):
                outputs.append(flux.transformer(**call)[0])
    torch.testing.assert_close(outputs[1][1], outputs[0][1], rtol=1e-6, atol=1e-6)
    assert (outputs[1][1] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("images", "items"), [(2, 1), (2, 3)])
def test_other_numbers_of_items_are_refused(flux: Any, images: int, items: int) -> None:
    block = flux.transformer.transformer_blocks[1].attn

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(part.repeat(2, 1, 1)[:items] for part in output)

    message = rf"transformer_blocks.1.attn has {items} items, but the latents have {images}.*switch"
    with (
        block.register_forward_hook(change),
        negtome_guidance(flux, EVERY_TOKEN),
        pytest.raises(ValueError, match=message),
    ):
        generate(flux, images)
