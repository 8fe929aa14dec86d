"""The ComfyUI nodes on a double of ComfyUI; `test_comfyui_program.py` runs the real one."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.comfyui_double import BaseModel, ModelPatcher, UNetModel, sample
from helpers.comfyui_guided import SETTINGS, avoid, by_kind, diversity, model, summary
from negtome_fast.integrations import comfyui
from negtome_fast.integrations.comfyui import nodes
from negtome_fast.integrations.comfyui.guide import guides_of

PACK = Path(comfyui.__file__).parent


@by_kind
@pytest.mark.parametrize("joined", [True, False])
def test_the_first_of_a_batch_stays_and_the_others_move(kind: str, joined: bool) -> None:
    patcher = model(kind)
    plain = sample(patcher, 3, joined)
    guided = diversity(patcher)
    moved = sample(guided, 3, joined)
    assert torch.equal(moved[0], plain[0])
    assert not torch.equal(moved[1], plain[1]) and not torch.equal(moved[2], plain[2])
    done = summary(guided)
    forwards, groups = (4, 2) if joined else (8, 1)
    assert (done.forwards, done.guided, done.groups) == (forwards, forwards, groups)
    tokens = 96 if kind == "UNetModel" else 24
    # Two guided items in each of two halves of four steps.
    assert [(row.tokens, row.grid is not None) for row in done.rows] == [(16 * tokens, True)] * 2
    assert torch.equal(sample(patcher, 3, joined), plain)


@by_kind
def test_the_model_that_was_given_is_not_touched(kind: str) -> None:
    patcher = model(kind)
    guided = diversity(patcher)
    assert patcher.model_options == {"transformer_options": {}} and patcher.wrappers == {}
    assert guided is not patcher and guided.model is patcher.model
    sample(guided, 2)
    modules = patcher.model.diffusion_model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


@by_kind
def test_alpha_0_changes_nothing_and_measures(kind: str) -> None:
    patcher = model(kind)
    guided = diversity(patcher, alpha=0.0)
    assert torch.equal(sample(guided, 2), sample(patcher, 2))
    assert summary(guided).total.matched > 0


@by_kind
@pytest.mark.parametrize(
    ("window", "steps"),
    [
        ({"start": 0.0, "end": 0.3}, 2),
        ({"start": 0.5, "end": 1.0}, 2),
        ({"start": 0.1, "end": 0.2}, 0),
        ({"window": "sigma", "start": 1.0, "end": 0.9}, 1),
        ({"window": "sigma", "start": 500.0, "end": 0.75}, 2),
    ],
)
def test_the_window_is_in_percent_or_sigmas(kind: str, window: Any, steps: int) -> None:
    patcher = model(kind)
    guided = diversity(patcher, **window)
    assert torch.equal(sample(guided, 2), sample(patcher, 2)) == (steps == 0)
    assert (summary(guided).guided, summary(guided).forwards) == (steps, 4)


def test_the_window_follows_a_sampling_that_is_patched_later() -> None:
    guided = diversity(model("Flux"), end=0.3).clone()
    shifted = SimpleNamespace(sigma_max=1.0, percent_to_sigma=lambda percent: 1 - percent / 4)
    guided.object_patches["model_sampling"] = shifted
    sample(guided, 2)
    assert summary(guided).guided == 1


@by_kind
def test_clones_of_a_guided_model_are_guided_by_the_same(kind: str) -> None:
    guided = diversity(model(kind))
    again = guided.clone().clone()
    assert guides_of(again) == guides_of(guided)
    assert torch.equal(sample(again, 2), sample(guided, 2))


@by_kind
def test_blocks_are_chosen_by_name_and_grid(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    names = {"UNetModel": "attn1", "Flux": "single_blocks"}
    guided = diversity(model(kind), blocks=f" {names[kind]}, unknown")
    sample(guided, 2)
    (row,) = summary(guided).rows
    expected = {
        "UNetModel": "output_blocks.3.transformer_blocks.0.attn1",
        "Flux": "single_blocks.0",
    }
    assert row.block == expected[kind]
    small = diversity(model(kind), min_grid=9)
    for _ in range(2):
        sample(small, 2)
        (record,) = caplog.records
        assert "not guided: none of the 2 attention modules" in record.getMessage()
        assert "min_grid=9" in record.getMessage()
        assert record.getMessage().split(": ", 1)[1] in nodes.info(small, None)[1]
        caplog.clear()


@by_kind
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_single_image_avoids_pictures(kind: str, joined: bool, count: int) -> None:
    patcher = model(kind)
    guided = avoid(patcher, count)
    moved = sample(guided, 1, joined)
    assert not torch.equal(moved, sample(patcher, 1, joined))
    assert torch.equal(sample(avoid(patcher, count, alpha=0.0), 1), sample(patcher, 1))
    patcher.model.forwards.clear()
    again = sample(guided, 1, joined)
    assert torch.equal(again, moved)  # the same seed draws the same noise for the references
    sizes = [2] * 4 * (count + 1) if joined else [1] * 8 * (count + 1)
    assert patcher.model.forwards == sizes
    torch.testing.assert_close(sample(guided, 1, not joined), moved, rtol=1e-4, atol=1e-4)


@by_kind
def test_a_mask_limits_what_is_avoided(kind: str) -> None:
    patcher, mask = model(kind), torch.zeros(1, 40, 56)
    mask[..., :28] = 1
    whole, region = sample(avoid(patcher), 1), sample(avoid(patcher, mask=mask), 1)
    everywhere = sample(avoid(patcher, mask=torch.ones(1, 40, 56)), 1)
    assert torch.equal(whole, everywhere) and not torch.equal(whole, region)
    with pytest.raises(ValueError, match="the mask is empty"):
        avoid(patcher, mask=torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="2 images need"):
        avoid(patcher, 2, mask=torch.ones(3, 40, 56))


@by_kind
def test_two_nodes_do_not_guide_each_others_references(kind: str) -> None:
    patcher = model(kind)
    avoiding = avoid(patcher, 2)
    both = diversity(avoiding)
    alone, together = sample(avoiding, 2), sample(both, 2)
    assert torch.equal(alone[0], together[0]) and not torch.equal(alone[1], together[1])
    first, second = guides_of(both)
    assert first.guidance.summary().forwards == second.guidance.summary().forwards == 4
    other = avoid(diversity(patcher), 2)
    assert not torch.equal(sample(other, 2), sample(diversity(patcher), 2))
    assert [guide.guidance.summary().guided for guide in guides_of(other)] == [4, 4]


@by_kind
def test_an_error_leaves_the_model_as_it_was(kind: str) -> None:
    patcher = model(kind)
    plain = sample(patcher, 1)
    guided = diversity(patcher, reference="others")
    with pytest.raises(ValueError, match="others"):
        sample(guided, 1)
    modules = patcher.model.diffusion_model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert torch.equal(sample(patcher, 1), plain)
    assert sample(guided, 2).isfinite().all()


def test_what_cannot_be_guided_is_refused() -> None:
    with pytest.raises(ValueError, match="where the image tokens of Linear are"):
        diversity(ModelPatcher(BaseModel(torch.nn.Linear(1, 1))))
    with pytest.raises(ValueError, match="temporal layers"):
        diversity(ModelPatcher(BaseModel(UNetModel(), temporal=True)))
    compiled = diversity(model("Flux"))
    compiled.add_wrapper_with_key("apply_model", "torch.compile", lambda executor, *args: None)
    with pytest.raises(ValueError, match="compiled by a node"):
        sample(compiled, 2)
    with pytest.raises(ValueError, match="start >= end"):
        diversity(model("Flux"), window="sigma", start=0.2, end=0.9)
    with pytest.raises(ValueError, match="the window ends at sigma 5"):
        sample(diversity(model("Flux"), window="sigma", start=9.0, end=5.0), 2)


def test_tokens_that_do_not_fit_the_latents_are_refused() -> None:
    patcher = model("Flux")
    flux = patcher.model.diffusion_model
    flux.inputs.register_forward_hook(lambda module, given, tokens: tokens[:, 1:])
    with pytest.raises(ValueError, match="23 tokens where the latents make 24"):
        sample(diversity(patcher), 2)


def test_info_tells_what_was_done_in_the_last_run() -> None:
    guided = diversity(avoid(model("Flux")))
    sample(guided, 2)
    sample(guided, 2)
    samples, text = nodes.info(guided, {"samples": 1})
    assert samples == {"samples": 1}
    assert text.count("guided 4 of 4 model forwards, 2 guidance parts, 1 group in each") == 2
    assert text.index("NegToMe (avoid image)") < text.index("NegToMe (batch diversity)")
    assert "single_blocks.0" in text
    shown = nodes.NODE_CLASS_MAPPINGS["NegToMeInfo"]().run(model=guided, samples=samples)
    assert shown == {"ui": {"text": [text]}, "result": (samples, text)}
    assert nodes.info(model("Flux"), samples)[1] == "this model is not guided by NegToMe"


def test_the_classic_schema_is_complete() -> None:
    assert set(comfyui.NODE_CLASS_MAPPINGS) == set(comfyui.NODE_DISPLAY_NAME_MAPPINGS)
    for node in nodes.NODES:
        kind = comfyui.NODE_CLASS_MAPPINGS[node.name]
        inputs = kind.INPUT_TYPES()
        assert list({**inputs["required"], **inputs["optional"]}) == [i.name for i in node.inputs]
        for name, (form, options) in {**inputs["required"], **inputs["optional"]}.items():
            if isinstance(form, list):
                assert options["default"] in form, name
            elif form in ("FLOAT", "INT"):
                assert options["min"] <= options["default"] <= options["max"], name
        assert len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES)
        assert callable(getattr(kind(), kind.FUNCTION))
    kind = comfyui.NODE_CLASS_MAPPINGS["NegToMeBatchDiversity"]
    (guided,) = kind().run(model=model("Flux"), reference="first", **SETTINGS)
    assert sample(guided, 2).isfinite().all()


class Types:
    """`comfy_api.latest.io` as far as it is used; a socket becomes what it was made of."""

    ComfyNode = object

    def __getattr__(self, kind: str) -> Any:
        def made(direction: str) -> Any:
            return lambda name, **options: (direction, kind, name, options)

        return SimpleNamespace(Input=made("input"), Output=made("output"))

    def Schema(self, **schema: Any) -> dict[str, Any]:
        return schema

    def NodeOutput(self, *outputs: Any, ui: Any = None) -> tuple[Any, Any]:
        return outputs, ui


def test_the_newer_schema_has_the_same_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    api = ModuleType("comfy_api.latest")
    api.ComfyExtension, api.io = object, Types()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", api)

    async def listed() -> Any:
        extension = await comfyui.comfy_entrypoint()
        return await extension.get_node_list()

    for node, kind in zip(nodes.NODES, asyncio.run(listed()), strict=True):
        schema = kind.define_schema()
        names = [name for _, _, name, _ in (*schema["inputs"], *schema["outputs"])]
        assert len(set(names)) == len(names) == len(node.inputs) + len(node.outputs)
        assert (schema["node_id"], schema["is_output_node"]) == (node.name, node.shows)
        kinds = {"Model", "Image", "Vae", "Mask", "Latent", "Float", "Int", "String", "Combo"}
        kinds |= {"Boolean"}
        assert {kind for _, kind, _, _ in schema["inputs"]} <= kinds
    (text,), ui = asyncio.run(listed())[2].execute(model=model("Flux"), samples=1)[0][1:], None
    assert text == "this model is not guided by NegToMe" and ui is None


def load_copy(folder: Path) -> ModuleType:
    """The pack as ComfyUI imports a folder of its custom_nodes."""
    name = "copied_custom_node"
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
            del sys.modules[loaded]
    return module


def test_a_copy_of_the_folder_alone_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = shutil.copytree(PACK, tmp_path / "negtome")
    loaded = load_copy(copied)
    assert set(loaded.NODE_CLASS_MAPPINGS) == {node.name for node in nodes.NODES}
    monkeypatch.setitem(sys.modules, "negtome_fast.guidance", None)
    with pytest.raises(ImportError, match="need the package negtome_fast"):
        load_copy(copied)


def test_the_example_workflows_use_the_nodes_as_they_are() -> None:
    used = set()
    workflows = sorted((PACK / "example_workflows").glob("*.json"))
    assert workflows
    for path in workflows:
        workflow = json.loads(path.read_text())
        made = {node["id"]: node for node in workflow["nodes"]}
        for number, source, output, target, place, kind in workflow["links"]:
            assert kind in (made[source]["outputs"][output]["type"], "*")
            assert made[target]["inputs"][place]["link"] == number
        for node in made.values():
            if node["type"] not in comfyui.NODE_CLASS_MAPPINGS:
                continue
            used.add(node["type"])
            (own,) = [one for one in nodes.NODES if one.name == node["type"]]
            kinds = ("FLOAT", "INT", "STRING", "COMBO", "BOOLEAN")
            values = [one for one in own.inputs if one.kind in kinds]
            given = node.get("widgets_values", [])
            for socket, value in zip(values, given, strict=True):
                options = socket.options
                assert value in options.get("options", [value])
                if "min" in options:
                    assert options["min"] <= value <= options["max"]
    assert used == set(comfyui.NODE_CLASS_MAPPINGS)
