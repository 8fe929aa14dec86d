"""The ComfyUI nodes: with a double of ComfyUI's patch protocol, and with the real program.

The real one is run where `COMFYUI_PATH` names a checkout of ComfyUI whose requirements this
Python has: on the CPU, with small random checkpoints, through its HTTP API.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import comfyui_program
from helpers.comfyui_program import FLUX, LORA, PACK, SD15, Program

real = pytest.mark.skipif(
    "COMFYUI_PATH" not in os.environ,
    reason="needs ComfyUI: set COMFYUI_PATH to a checkout whose requirements this Python has",
)


class Workflow:
    """A text-to-image workflow in ComfyUI's API format, to which samplers are added."""

    def __init__(self, checkpoint: str, batch: int = 3, size: int = 64, cfg: float = 5.0) -> None:
        self.cfg = cfg
        self.prompt: dict[str, Any] = {}
        self.add("load", "CheckpointLoaderSimple", ckpt_name=checkpoint)
        self.model, self.vae = ["load", 0], ["load", 2]
        latent = "EmptyLatentImage" if checkpoint == SD15 else "EmptySD3LatentImage"
        self.latent = self.add("empty", latent, width=size, height=size, batch_size=batch)
        for number, name in enumerate(("positive", "negative")):
            if checkpoint == SD15:
                self.add(name, "CLIPTextEncode", clip=["load", 1], text=f"a {name} picture")
            else:
                self.add(name, "TestConditioning", seed=number, channels=4096, pooled=768)

    def add(self, name: str, kind: str, **inputs: Any) -> list[Any]:
        self.prompt[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]

    def sample(self, name: str, model: list[Any], after: str = "", **settings: Any) -> None:
        """Samples, after another sampler if one is named, and saves latents and images."""
        latent = self.latent
        if after:
            latent = self.add(f"{name}-after", "TestAfter", samples=latent, after=[after, 0])
        inputs = {
            "seed": 7,
            "steps": 4,
            "cfg": self.cfg,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
            **settings,
        }
        self.add(
            name,
            "KSampler",
            model=model,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=latent,
            **inputs,
        )
        self.add(f"{name}-info", "NegToMeInfo", model=model, samples=[name, 0])
        self.add(f"{name}-latents", "SaveLatent", samples=[name, 0], filename_prefix=name)
        self.add(f"{name}-decode", "VAEDecode", samples=[name, 0], vae=self.vae)
        self.add(f"{name}-images", "SaveImage", images=[f"{name}-decode", 0], filename_prefix=name)

    def diversity(self, name: str, model: list[Any] | None = None, **settings: Any) -> list[Any]:
        inputs = {
            "alpha": 0.9,
            "threshold": 0.3,
            "window": "percent",
            "start": 0.0,
            "end": 1.0,
            "reference": "first",
            **settings,
        }
        return self.add(name, "NegToMeBatchDiversity", model=model or self.model, **inputs)

    def avoid(self, name: str, mask: bool = False, **settings: Any) -> list[Any]:
        inputs = {
            "alpha": 0.9,
            "threshold": 0.3,
            "window": "percent",
            "start": 0.0,
            "end": 1.0,
            **settings,
        }
        self.add("picture", "LoadImage", image="reference.png")
        if mask:
            self.add("mask", "LoadImageMask", image="mask.png", channel="red")
            inputs["mask"] = ["mask", 0]
        return self.add(
            name,
            "NegToMeAvoidImage",
            model=self.model,
            image=["picture", 0],
            vae=self.vae,
            **inputs,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = os.environ.get("COMFYUI_TEST_BASE")  # checkpoints of an earlier run, to save a minute
    path = Path(base) if base else tmp_path_factory.mktemp("comfyui")
    if not (path / "models" / "checkpoints" / FLUX).exists():
        comfyui_program.write_checkpoints(path)
    comfyui_program.write_pictures(path)
    return path


@pytest.fixture(scope="module")
def program(folder: Path) -> Iterator[Program]:
    custom_nodes: dict[str, str | Path] = {
        "negtome": PACK,
        "of_the_tests.py": comfyui_program.CUSTOM_NODES,
    }
    with comfyui_program.running(folder, custom_nodes) as program:
        yield program


def summary(done: dict[str, Any], name: str) -> str:
    (text,) = done["outputs"][f"{name}-info"]["text"]
    return str(text)


@real
@pytest.mark.parametrize("checkpoint", [SD15, FLUX])
@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_a_batch_is_guided_and_the_model_stays_as_it_was(
    program: Program, checkpoint: str, cfg: float
) -> None:
    flow = Workflow(checkpoint, cfg=cfg)
    flow.sample("before", flow.model)
    flow.sample("guided", flow.diversity("diversity"), after="before")
    flow.sample("after", flow.model, after="guided")
    flow.sample("measured", flow.diversity("measure", alpha=0.0), after="after")
    done = program.run(flow.prompt)
    before, guided, after, measured = (
        program.latents(done, f"{name}-latents")
        for name in ("before", "guided", "after", "measured")
    )
    assert before.isfinite().all() and before.std() > 0.1
    assert torch.equal(before, after)
    assert torch.equal(before, measured)
    assert torch.equal(before[0], guided[0])
    assert all(not torch.equal(before[item], guided[item]) for item in (1, 2))
    plain, moved = (program.images(done, f"{name}-images") for name in ("before", "guided"))
    assert len(plain) == len(moved) == 3
    assert np.array_equal(plain[0], moved[0]) and not np.array_equal(plain[1], moved[1])
    grouping = "1 guidance group in the batch" if cfg == 1 else "2 guidance parts, 1 group in each"
    assert f"guided 4 of 4 model forwards, {grouping}" in summary(done, "guided")
    assert "not guided" in summary(done, "before")


@real
@pytest.mark.parametrize("checkpoint", [SD15, FLUX])
def test_the_window_is_in_percent_or_sigmas(program: Program, checkpoint: str) -> None:
    flow = Workflow(checkpoint, batch=2, cfg=1.0)
    flow.sample("plain", flow.model)
    names = {
        # 4 steps of the scheduler "simple" begin at percent 0, 0.25, 0.5 and 0.75, about.
        "early": {"end": 0.1},
        "late": {"start": 0.4},
        "between": {"start": 0.1, "end": 0.2},
        "low": {"window": "sigma", "start": 0.02, "end": 0.01},
    }
    for name, settings in names.items():
        flow.sample(name, flow.diversity(f"{name}-node", **settings))
    done = program.run(flow.prompt)
    latents = {name: program.latents(done, f"{name}-latents") for name in ("plain", *names)}
    guided = {"early": 1, "late": 2, "between": 0, "low": 0}
    for name, count in guided.items():
        assert f"guided {count} of 4 model forwards" in summary(done, name)
        assert torch.equal(latents["plain"], latents[name]) == (count == 0)
    assert not torch.equal(latents["early"], latents["late"])


@real
def test_the_program_says_why_nothing_was_guided(program: Program) -> None:
    flow = Workflow(SD15, batch=2)
    flow.sample("late", flow.diversity("default-window", end=0.2), denoise=0.5)
    cache = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    done = program.run(flow.prompt)
    assert "guided 0 of 4 model forwards" in summary(done, "late")
    assert "To guide its first steps, set window=percent, start=0." in summary(done, "late")
    log = (program.folder / "comfyui.log").read_text()
    assert "NegToMe (batch diversity): not guided: no step of this run lies in the window" in log

    flow = Workflow(SD15, batch=2)
    tiles = {"tile_size": 32, "swap_size": 2, "max_depth": 1, "scale_depth": False}
    flow.sample("tiled", flow.add("tiles", "HyperTile", model=flow.diversity("guided"), **tiles))
    with pytest.raises(RuntimeError, match="Put the NegToMe node after that node"):
        program.run(flow.prompt)
    flow = Workflow(SD15, batch=2)
    flow.sample("cached", flow.add("lazy", "LazyCache", model=flow.diversity("guided"), **cache))
    with pytest.raises(RuntimeError, match="lazycache, reuses outputs of earlier steps"):
        program.run(flow.prompt)


@real
def test_loras_go_before_or_after_the_node(program: Program) -> None:
    flow = Workflow(SD15, batch=2)
    lora = {"lora_name": LORA, "strength_model": 1.0}
    flow.sample("without", flow.diversity("alone"))
    first = flow.add("lora-first", "LoraLoaderModelOnly", model=flow.model, **lora)
    flow.sample("before", flow.diversity("guide-second", first))
    guided = flow.diversity("guide-first")
    flow.sample("after", flow.add("lora-second", "LoraLoaderModelOnly", model=guided, **lora))
    flow.sample("plain", first)
    done = program.run(flow.prompt)
    without, before, after, plain = (
        program.latents(done, f"{name}-latents") for name in ("without", "before", "after", "plain")
    )
    assert torch.equal(before, after)
    assert torch.equal(plain[0], before[0]) and not torch.equal(plain[1], before[1])
    assert not torch.equal(without, before)
    assert "guided 4 of 4 model forwards" in summary(done, "after")


@real
@pytest.mark.parametrize("checkpoint", [SD15, FLUX])
def test_a_single_image_avoids_a_picture_or_a_region_of_it(
    program: Program, checkpoint: str
) -> None:
    flow = Workflow(checkpoint, batch=1)
    flow.sample("plain", flow.model)
    flow.sample("measured", flow.avoid("measure", alpha=0.0))
    flow.sample("whole", flow.avoid("avoid"))
    flow.sample("region", flow.avoid("avoid-region", mask=True))
    flow.sample("after", flow.model, after="region")
    done = program.run(flow.prompt)
    plain, measured, whole, region, after = (
        program.latents(done, f"{name}-latents")
        for name in ("plain", "measured", "whole", "region", "after")
    )
    assert torch.equal(plain, measured) and torch.equal(plain, after)
    assert not torch.equal(plain, whole) and not torch.equal(plain, region)
    assert not torch.equal(whole, region)
    assert len(program.images(done, "whole-images")) == 1
    assert "guided 4 of 4 model forwards, 2 guidance parts, 1 group in each" in summary(
        done, "region"
    )


@real
def test_two_nodes_guide_one_after_the_other(program: Program) -> None:
    flow = Workflow(SD15, batch=2)
    flow.sample("diverse", flow.diversity("diversity"))
    avoiding = flow.avoid("avoid")
    flow.sample("avoiding", avoiding)
    flow.sample("both", flow.diversity("and-diversity", avoiding))
    done = program.run(flow.prompt)
    diverse, avoiding_latents, both = (
        program.latents(done, f"{name}-latents") for name in ("diverse", "avoiding", "both")
    )
    assert torch.equal(both[0], avoiding_latents[0])  # the batch's reference
    assert not torch.equal(both[1], avoiding_latents[1])
    assert not torch.equal(both, diverse)
    avoided, pushed = summary(done, "both").split("\n\n")
    # The references' own forwards are not guided by the other node and are in no summary.
    assert avoided.splitlines()[0] == summary(done, "avoiding").splitlines()[0]
    assert "guided 4 of 4 model forwards" in pushed


@real
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.5, "end": 0.2}, "0 <= start <= end <= 1"),
        ({"window": "sigma", "start": 200.0, "end": 100.0}, "above the highest of this model"),
        ({"blocks": "no_such_block"}, ""),
    ],
)
def test_settings_that_cannot_be_right_are_reported(
    program: Program, settings: dict[str, Any], message: str
) -> None:
    flow = Workflow(SD15, batch=2, cfg=1.0)
    flow.sample("guided", flow.diversity("diversity", **settings))
    if message:
        with pytest.raises(RuntimeError, match=message):
            program.run(flow.prompt)
    else:
        assert "no token was compared" in summary(program.run(flow.prompt), "guided")


@real
def test_the_other_schema_has_the_same_nodes(folder: Path, program: Program) -> None:
    classic = program.get("/object_info")
    entry = "from negtome_fast.integrations.comfyui import comfy_entrypoint\n"
    with comfyui_program.running(folder, {"negtome_v3.py": entry}) as other:
        described = other.get("/object_info")
        for name in ("NegToMeBatchDiversity", "NegToMeAvoidImage", "NegToMeInfo"):
            for key in ("display_name", "category", "description", "output", "output_name"):
                assert described[name][key] == classic[name][key]
            assert described[name]["output_node"] == classic[name]["output_node"]
            for kind in ("required", "optional"):
                assert list(described[name]["input"].get(kind, {})) == list(
                    classic[name]["input"].get(kind, {})
                )
        flow = Workflow(SD15, batch=2, cfg=1.0)
        flow.sample("guided", flow.diversity("diversity"))
        assert "guided 4 of 4 model forwards" in summary(other.run(flow.prompt), "guided")


@real
def test_a_trained_model_makes_the_pictures_that_it_makes_in_diffusers(program: Program) -> None:
    """The embedded model, its weights in ComfyUI's own FLUX class: plain and guided."""
    pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
    import negtome_fast as nf
    from negtome_fast.models import GUIDANCE_SCALE, TEXT_LENGTH, load_pipeline

    prompt, batch, steps = "a pixel art person", 3, 10
    flow = Workflow(FLUX, batch=batch)
    flow.prompt.clear()
    flow.model = flow.add("load", "TestEmbeddedModel", prompt=prompt)
    flow.add("load-empty", "TestEmbeddedModel", prompt="")
    flow.vae = ["load", 2]
    # Its latents are 8 x 16 x 16; ComfyUI makes as many channels of an empty latent as it takes.
    flow.latent = flow.add("empty", "EmptyLatentImage", width=128, height=128, batch_size=batch)
    window = {"window": "sigma", "start": 1.0, "end": 0.6, "threshold": 0.65}
    for name, model in (("plain", flow.model), ("guided", flow.diversity("guide", **window))):
        flow.sample(name, model, cfg=GUIDANCE_SCALE, steps=steps)
        flow.prompt[name]["inputs"] |= {"positive": ["load", 1], "negative": ["load-empty", 1]}
    done = program.run(flow.prompt)

    pipe = load_pipeline()
    noise = torch.randn(batch, 8, 16, 16, generator=torch.Generator().manual_seed(7))
    packed = pipe._pack_latents(noise, batch, 8, 16, 16)
    arguments = {
        "prompt": prompt,
        "negative_prompt": "",
        "true_cfg_scale": GUIDANCE_SCALE,
        "num_images_per_prompt": batch,
        "num_inference_steps": steps,
        "latents": packed,
        "height": 64,
        "width": 64,
        "max_sequence_length": TEXT_LENGTH,
        "output_type": "np",
    }
    expected = {"plain": pipe(**arguments).images}
    with nf.negtome_guidance(pipe, nf.NegToMeConfig(t_end=600.0)) as handle:
        expected["guided"] = pipe(**arguments).images
    for name, pictures in expected.items():
        for mine, theirs in zip(program.images(done, f"{name}-images"), pictures, strict=True):
            assert np.abs(mine / 255 - theirs).max() < 0.02
    assert np.abs(expected["plain"][1] - expected["guided"][1]).max() > 0.2
    told = summary(done, "guided").splitlines()
    assert told[0].endswith("guided 5 of 10 model forwards, 2 guidance parts, 1 group in each")
    assert handle.summary().guided == 10  # diffusers calls FLUX once for each half


@real
def test_the_example_workflows_run_in_the_page(program: Program) -> None:
    pytest.importorskip("playwright", reason="needs playwright and Chromium, for the page")
    if shutil.which("chromium") is None:
        pytest.skip("needs Chromium, for the page")
    from helpers import comfyui_page

    # The checkpoints of the examples are replaced by a small one, and what takes long by less.
    small = {"ckpt_name": SD15, "width": 64, "height": 64, "steps": 2, "image": "reference.png"}
    small |= {"min_grid": 0, "threshold": 0.0, "window": "percent", "start": 0.0, "end": 1.0}
    with comfyui_page.opened(program) as page:
        for path in sorted((PACK / "example_workflows").glob("*.json")):
            page.evaluate("(workflow) => app.loadGraphData(workflow)", json.loads(path.read_text()))
            page.evaluate(
                "(values) => { for (const node of app.graph._nodes)"
                " for (const widget of node.widgets ?? [])"
                " if (widget.name in values) widget.value = values[widget.name]; }",
                small,
            )
            outputs = comfyui_page.execute(page, program)["outputs"].values()
            told = next(one["text"][0] for one in outputs if "matched" in str(one.get("text")))
            assert "model forwards" in told and "guided 0" not in told
            assert sum(len(one.get("images", ())) for one in outputs) in (1, 4)
