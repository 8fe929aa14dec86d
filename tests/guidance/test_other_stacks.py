"""Models that other inference stacks bring: served where they are alike, refused where not."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import negtome_fast as nf
from helpers.pipelines_fixtures import flux_pipeline, generate
from negtome_fast.pipelines import known_layouts, register_layout
from negtome_fast.pipelines import layouts as table

GUIDANCE = {"t_end": 0, "threshold": 0.0}


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_LAYOUTS", known_layouts())


def of_package(package: str, name: str, base: type) -> type:
    """A class of this name that pretends to come from another package."""
    return type(name, (base,), {"__module__": f"{package}.models.transformer"})


class NunchakuBaseAttention(nn.Module):
    """Double of nunchaku's class: another module that computes diffusers' attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = [attention]  # no child: it is not to be found as an attention module
        self.pre_only = attention.pre_only

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner[0](*args, **kwargs)


def test_attention_of_nunchaku_is_guided_as_that_of_diffusers() -> None:
    pipe = flux_pipeline()
    with nf.negtome_guidance(pipe, **GUIDANCE):
        expected = generate(pipe)
    model = pipe.transformer
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.attn = NunchakuBaseAttention(block.attn)
    with nf.negtome_guidance(pipe, **GUIDANCE) as handle:
        assert torch.equal(generate(pipe), expected)
        assert len(handle.blocks) == 4


@pytest.mark.parametrize("package", ["sglang", "vllm_omni"])
def test_a_name_of_diffusers_in_another_stack_says_nothing(package: str, restored: None) -> None:
    pipe = flux_pipeline()
    model = pipe.transformer
    with nf.negtome_guidance(model, groups=1, **GUIDANCE):
        expected = generate(pipe)
    # Same code under the other name: its bases are those of diffusers' class.
    theirs = type(
        "FluxTransformer2DModel",
        type(model).__bases__,
        {**vars(type(model)), "__module__": f"{package}.dits.flux"},
    )
    model.__class__ = theirs
    with pytest.raises(ValueError, match="is not a known class, so the unit of its time"):
        nf.apply_negtome(model, groups=1, **GUIDANCE)
    register_layout(theirs, replace(known_layouts()["FluxTransformer2DModel"], family="theirs"))
    with nf.negtome_guidance(model, groups=1, **GUIDANCE):
        assert torch.equal(generate(pipe), expected)
    assert known_layouts()["FluxTransformer2DModel"].family != "theirs"


def test_models_that_another_library_distributes_are_refused() -> None:
    pipe = flux_pipeline()
    pipe.transformer._is_parallelized = True
    with pytest.raises(ValueError, match="distributed by another library"):
        nf.apply_negtome(pipe)
    del pipe.transformer._is_parallelized
    with nf.negtome_guidance(pipe, **GUIDANCE):
        pipe.transformer._is_parallelized = True  # by a call that came later
        with pytest.raises(ValueError, match="distributed by another library"):
            generate(pipe)


@pytest.mark.parametrize("shared", ["sequence_parallel", "classifier_free_guidance", None])
def test_xdit_is_served_on_one_device_only(
    shared: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: Any = ModuleType("xfuser.core.distributed")
    for name in ("sequence_parallel", "classifier_free_guidance", "pipeline_parallel"):
        size = 2 if name == shared else 1
        setattr(groups, f"get_{name}_world_size", lambda size=size: size)
    monkeypatch.setitem(sys.modules, "xfuser.core.distributed", groups)
    pipe = flux_pipeline()
    nf.apply_negtome(pipe).remove()  # diffusers' own class: its forward is not theirs
    model = pipe.transformer
    model.__class__ = of_package("xfuser", "xFuserFlux1Transformer2DWrapper", type(model))
    if shared:
        with pytest.raises(ValueError, match="distributed by another library"):
            nf.apply_negtome(pipe)
    else:
        with nf.negtome_guidance(pipe, **GUIDANCE) as handle:
            generate(pipe)
            assert handle.summary().total.pushed > 0
