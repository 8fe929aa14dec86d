"""Operations that guidance adds to a forward: none that waits, none that copies.

Times are measured by `python -m bench outside-window`; they would be no test on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.counted import operators
from helpers.pipelines_fixtures import flux_pipeline, generate, sdxl_pipeline
from negtome_fast.backends import torch_backend
from negtome_fast.call import Call
from negtome_fast.config import NegToMeConfig
from negtome_fast.guidance import Guidance
from negtome_fast.pairing import Pairing
from negtome_fast.pipelines import apply_negtome, negtome_guidance

ALWAYS = NegToMeConfig(threshold=0.1, t_end=0)
NEVER = NegToMeConfig(t_start=0.5, t_end=0.1)
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
"""Operators whose result the host waits for."""


def flux_inputs(images: int = 3, height: int = 4, width: int = 6) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(
        torch.arange(float(height)), torch.arange(float(width)), indexing="ij"
    )
    count = height * width
    return {
        "hidden_states": torch.randn(images, count, 16, generator=random),
        "timestep": torch.ones(images),
        "encoder_hidden_states": torch.randn(images, 5, 16, generator=random),
        "pooled_projections": torch.zeros(images, 16),
        "img_ids": torch.stack([torch.zeros(count), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


@torch.no_grad()
def test_outside_of_the_window_a_forward_reads_the_timestep_and_nothing_else() -> None:
    model, inputs = flux_pipeline().transformer, flux_inputs()
    before = operators(lambda: model(**inputs)).calls
    with negtome_guidance(model, NEVER):
        after = operators(lambda: model(**inputs)).calls
    added = after - before
    assert added.pop("_local_scalar_dense") == 1
    views = {"detach", "alias", "view", "_unsafe_view", "reshape", "select"}
    assert set(added) <= views and added.total() <= 4
    assert not before - after


@pytest.mark.parametrize("build", [flux_pipeline, sdxl_pipeline])
def test_outside_of_the_window_a_run_reads_each_timestep_once(build: Callable[[], Any]) -> None:
    pipe, steps = build(), 4
    before = operators(lambda: generate(pipe, 2, size=(32, 32), steps=steps)).calls
    with negtome_guidance(pipe, NEVER):
        after = operators(lambda: generate(pipe, 2, size=(32, 32), steps=steps)).calls
    added = after - before
    # And the schedule of the run, once.
    assert {name: added[name] for name in READS if added[name]} == {"_local_scalar_dense": steps}
    assert not set(added) - {"_local_scalar_dense", "detach", "alias", "view", "select", "_to_copy"}


@torch.no_grad()
@pytest.mark.parametrize("placement", ["output", "pre_projection"])
def test_inside_of_the_window_no_block_waits_or_copies(placement: Any) -> None:
    """Single blocks hold text and image together; the image is written where it is."""
    model, inputs = flux_pipeline().transformer, flux_inputs()
    model(**inputs)
    before = operators(lambda: model(**inputs))
    with negtome_guidance(model, ALWAYS, placement=placement):
        model(**inputs)  # finds the grid and makes its scalars, once a run
        inputs["timestep"] = torch.full((3,), 0.9)
        after = operators(lambda: model(**inputs))
    added = after.calls - before.calls
    blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    assert added.pop("guide_") == blocks
    # The timestep.
    reads = {name: added[name] for name in READS if added[name]}
    assert reads == {"_local_scalar_dense": 1}
    image = 3 * 24 * 16
    large = {key: n for key, n in (after.allocated - before.allocated).items() if key[1] >= image}
    assert large == {}


@torch.no_grad()
@pytest.mark.parametrize("block", ["transformer_blocks.0", "single_transformer_blocks.0"])
def test_what_may_not_be_written_into_is_copied_once(block: str) -> None:
    """Somebody else's hook may have kept the output."""
    pipe, inputs, kept = flux_pipeline(), flux_inputs(), []
    model = pipe.transformer
    hook = model.get_submodule(f"{block}.attn").register_forward_hook(
        lambda module, args, output: kept.append(output)
    )
    before = operators(lambda: model(**inputs))
    with negtome_guidance(model, ALWAYS, blocks=block):
        model(**inputs)
        inputs["timestep"] = torch.full((3,), 0.9)
        after = operators(lambda: model(**inputs))
    hook.remove()
    image = 3 * 24 * 16
    large = {key: n for key, n in (after.allocated - before.allocated).items() if key[1] >= image}
    single = block.startswith("single")
    assert large == ({("clone", 3 * 29 * 16): 1} if single else {("guide", image): 1})


@pytest.mark.parametrize("reference", ["first", "others"])
@pytest.mark.parametrize("matching", ["paper", "official"])
def test_the_torch_backend_waits_for_no_accelerator(reference: Any, matching: str) -> None:
    """Tensors of the meta device have no values, so reading one would raise."""
    x = torch.empty(4, 96, 32, device="meta")
    scalar = torch.empty((), device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((x > 0).any())
    call = Call(x, x, Pairing(reference, 4, 2), None, matching, scalar, scalar)
    similarity, index = torch_backend.guide(call, torch.empty_like(x))
    assert similarity.shape == index.shape == (4, 1, 96)


def test_guidance_waits_for_no_accelerator_in_a_block() -> None:
    guidance = Guidance(NegToMeConfig(threshold=0.1))
    x = torch.empty(4, 96, 32, device="meta")
    guidance.begin_step(1000.0, groups=2, grid=(8, 12))
    for block in ("a", "b", "a"):
        assert guidance.apply(x, block=block, inplace=True) is x
    guidance.end_step()


def test_no_hook_stays_on_what_is_not_guided() -> None:
    """Only the model and its guided attention modules are looked at in a step."""
    pipe = flux_pipeline()
    handle = apply_negtome(pipe, ALWAYS, blocks="transformer_blocks.1")

    def hooked(module: nn.Module) -> int:
        return len(module._forward_hooks) + len(module._forward_pre_hooks)

    names = {name for name, module in pipe.transformer.named_modules() if hooked(module)}
    assert names == {"", "transformer_blocks.1.attn"}
    handle.remove()
