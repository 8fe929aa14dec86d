"""ComfyUI's page in headless Chromium: makes the example workflows and their picture.

    COMFYUI_PATH=... python tests/helpers/comfyui_page.py FOLDER

writes `example_workflows/*.json` of the node pack, as the page itself stores them, and
docs/pictures/comfyui.png. Needs what `comfyui_program` needs, playwright and Chromium; FOLDER keeps
the checkpoints.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import comfyui_program
from helpers.comfyui_program import PACK, Program

PICTURE = PACK.parents[2] / "docs" / "pictures" / "comfyui.png"
SIZE = {"width": 1640, "height": 900}

PROMPT = "a pixel art person"

BUILD = """
([nodes, links]) => {
  const made = {};
  app.graph.clear();
  for (const one of nodes) {
    const node = LiteGraph.createNode(one.kind);
    if (!node) throw new Error(`there is no node ${one.kind}`);
    app.graph.add(node);
    node.pos = one.place;
    for (const [name, value] of Object.entries(one.values)) {
      const widget = node.widgets.find((w) => w.name === name);
      if (!widget) throw new Error(`${one.kind} has no ${name}`);
      widget.value = value;
    }
    const fitting = node.computeSize();
    node.setSize([one.size?.[0] ?? Math.max(fitting[0], 270), one.size?.[1] ?? fitting[1]]);
    made[one.name] = node;
  }
  for (const [source, output, target, input] of links) {
    const slot = made[target].findInputSlot(input);
    if (slot < 0) throw new Error(`${target} has no input ${input}`);
    made[source].connect(output, made[target], slot);
  }
  return app.graph.serialize();
}
"""


@dataclass
class Graph:
    """A workflow to be built in the page."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[tuple[str, int, str, str]] = field(default_factory=list)

    def add(
        self,
        name: str,
        kind: str,
        place: tuple[int, int],
        size: tuple[int, int] | None = None,
        links: dict[str, tuple[str, int]] | None = None,
        **values: Any,
    ) -> None:
        """Adds a node at a place; `links`: input -> the node it comes from, and the output."""
        self.nodes.append(
            {"name": name, "kind": kind, "place": place, "size": size, "values": values}
        )
        for target, (source, output) in (links or {}).items():
            self.links.append((source, output, name, target))


def diversity() -> Graph:
    """Four pictures of one prompt, with FLUX.1."""
    graph = Graph()
    checkpoint = {"ckpt_name": "flux1-dev-fp8.safetensors"}
    graph.add("load", "CheckpointLoaderSimple", (0, 0), (330, 100), **checkpoint)
    graph.add(
        "guide",
        "NegToMeBatchDiversity",
        (370, 0),
        links={"model": ("load", 0)},
        window="sigma",
        start=1.0,
        end=0.9,
    )
    for name, place, text in (("positive", 330, "a portrait of a doctor"), ("negative", 520, "")):
        given = {"clip": ("load", 1)}
        graph.add(name, "CLIPTextEncode", (370, place), (330, 130), links=given, text=text)
    graph.add(
        "distilled",
        "FluxGuidance",
        (740, 330),
        links={"conditioning": ("positive", 0)},
        guidance=3.5,
    )
    empty = {"width": 1024, "height": 1024, "batch_size": 4}
    graph.add("empty", "EmptySD3LatentImage", (740, 460), **empty)
    positive = ("distilled", 0)
    _sampled(graph, "guide", positive, ("negative", 0), 1050, steps=20, cfg=1.0)
    return graph


def avoid() -> Graph:
    """One picture that avoids another, with SDXL."""
    graph = Graph()
    checkpoint = {"ckpt_name": "sd_xl_base_1.0.safetensors"}
    graph.add("load", "CheckpointLoaderSimple", (0, 0), (330, 100), **checkpoint)
    graph.add("picture", "LoadImage", (0, 170), (330, 330), image="example.png")
    graph.add(
        "guide",
        "NegToMeAvoidImage",
        (370, 0),
        links={
            "model": ("load", 0),
            "image": ("picture", 0),
            "vae": ("load", 2),
        },
        threshold=0.7,
        blocks="output_blocks",
        min_grid=32,
    )
    for name, place, text in (("positive", 400, "a superhero"), ("negative", 590, "")):
        given = {"clip": ("load", 1)}
        graph.add(name, "CLIPTextEncode", (370, place), (330, 130), links=given, text=text)
    empty = {"width": 1024, "height": 1024, "batch_size": 1}
    graph.add("empty", "EmptyLatentImage", (740, 400), **empty)
    _sampled(graph, "guide", ("positive", 0), ("negative", 0), 1050, steps=25, cfg=7.0)
    return graph


def _sampled(
    graph: Graph,
    guide: str,
    positive: tuple[str, int],
    negative: tuple[str, int],
    left: int,
    **values: Any,
) -> None:
    graph.add(
        "sample",
        "KSampler",
        (left, 0),
        links={
            "model": (guide, 0),
            "positive": positive,
            "negative": negative,
            "latent_image": ("empty", 0),
        },
        seed=7,
        control_after_generate="fixed",
        sampler_name="euler",
        scheduler="simple",
        **values,
    )
    told = {"model": (guide, 0), "samples": ("sample", 0)}
    graph.add("info", "NegToMeInfo", (left, 330), links=told)
    given = {"samples": ("info", 0), "vae": ("load", 2)}
    graph.add("decode", "VAEDecode", (left, 460), links=given)
    graph.add("text", "PreviewAny", (left + 310, 460), (560, 260), links={"source": ("info", 1)})
    graph.add("save", "SaveImage", (left + 310, 0), (560, 420), links={"images": ("decode", 0)})


def embedded() -> Graph:
    """Both nodes on the embedded model, for the picture of the docs."""
    graph = Graph()
    graph.add("load", "TestEmbeddedModel", (0, 0), (300, 100), prompt=PROMPT)
    graph.add("none", "TestEmbeddedModel", (0, 145), (300, 100), prompt="")
    empty = {"width": 128, "height": 128, "batch_size": 4}
    graph.add("empty", "EmptyLatentImage", (0, 290), (300, 106), **empty)
    graph.add("picture", "LoadImage", (0, 440), (300, 314), image="avatar.png")
    mask = {"image": "mask.png", "channel": "red"}
    graph.add("mask", "LoadImageMask", (0, 800), (300, 314), **mask)
    window = {"window": "sigma", "start": 1.0, "end": 0.75}
    rows = (
        ("plain", "", {}, 0),
        ("diverse", "NegToMeBatchDiversity", {"reference": "others", "alpha": 0.5}, 1),
        ("avoiding", "NegToMeAvoidImage", {"alpha": 1.5}, 2),
    )
    for name, kind, values, row in rows:
        top, model = 300 * row, ("load", 0)
        if kind:
            links = {"model": ("load", 0)}
            if row == 2:
                links |= {"image": ("picture", 0), "vae": ("load", 2), "mask": ("mask", 0)}
            graph.add(f"{name}-guide", kind, (345, top), links=links, **values, **window)
            model = (f"{name}-guide", 0)
        links = {
            "model": model,
            "positive": ("load", 1),
            "negative": ("none", 1),
            "latent_image": ("empty", 0),
        }
        settings = {"seed": 7, "control_after_generate": "fixed", "steps": 20, "cfg": 2.5}
        settings |= {"sampler_name": "euler", "scheduler": "simple"}
        graph.add(name, "KSampler", (670, top), links=links, **settings)
        samples = (name, 0)
        if kind:
            told = {"model": model, "samples": samples}
            graph.add(f"{name}-info", "NegToMeInfo", (985, top), (250, 50), links=told)
            text = {"source": (f"{name}-info", 1)}
            graph.add(f"{name}-text", "PreviewAny", (1580, top), (620, 262), links=text)
            samples = (f"{name}-info", 0)
        given = {"samples": samples, "vae": ("load", 2)}
        graph.add(f"{name}-decode", "VAEDecode", (985, top + 100), (250, 50), links=given)
        shown = {"images": (f"{name}-decode", 0)}
        graph.add(f"{name}-show", "PreviewImage", (1270, top), (280, 262), links=shown)
    return graph


@contextmanager
def opened(program: Program) -> Iterator[Any]:
    """ComfyUI's page, ready, with its greetings switched off."""
    from playwright.sync_api import sync_playwright

    settings = program.folder / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    quiet = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "9.9.9"}
    quiet |= {"Comfy.Graph.CanvasInfo": False, "Comfy.Minimap.Visible": False}
    settings.write_text(json.dumps(quiet))
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--use-gl=swiftshader"],
        )
        page = browser.new_page(viewport=SIZE)
        page.goto(program.address, timeout=120_000)
        page.wait_for_function("window.app?.graph && window.LiteGraph", timeout=120_000)
        page.wait_for_function("'NegToMeInfo' in LiteGraph.registered_node_types", timeout=120_000)
        time.sleep(2)
        yield page
        browser.close()


def build(page: Any, graph: Graph) -> dict[str, Any]:
    """Makes the workflow in the page; returns it in the format that the page stores."""
    workflow: dict[str, Any] = page.evaluate(BUILD, [graph.nodes, graph.links])
    return workflow


def without_nulls(value: Any) -> Any:
    """The workflow without values that the page leaves open, except inputs without a link."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None or k == "link"}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def execute(page: Any, program: Program, seconds: float = 300) -> dict[str, Any]:
    """Runs what the page shows, as its button does; returns the entry of the history."""
    before = set(program.get("/history"))
    page.evaluate("() => app.queuePrompt(0)")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        new = [done for name, done in program.get("/history").items() if name not in before]
        if new:
            status = new[0]["status"]
            if not status["completed"]:
                raise RuntimeError(json.dumps(status["messages"]))
            return dict(new[0])
        time.sleep(0.5)
    raise RuntimeError(f"not done after {seconds} seconds; the page may have refused the workflow")


def write_avatar(folder: Path) -> None:
    """Writes `input/avatar.png`, a picture by the embedded model."""
    from negtome_fast.models import generate, load_pipeline

    (picture,) = generate(load_pipeline(), PROMPT, [7], output_type="pil")
    picture.resize((128, 128)).save(folder / "input" / "avatar.png")


def main(folder: Path) -> None:
    custom_nodes: dict[str, str | Path] = {
        "negtome": PACK,
        "of_the_tests.py": comfyui_program.CUSTOM_NODES,
    }
    comfyui_program.write_pictures(folder)
    write_avatar(folder)
    with comfyui_program.running(folder, custom_nodes) as program, opened(program) as page:
        for name, graph in (("batch_diversity", diversity()), ("avoid_image", avoid())):
            workflow = build(page, graph)
            path = PACK / "example_workflows" / f"{name}.json"
            path.write_text(json.dumps(without_nulls(workflow), indent=1) + "\n")
        build(page, embedded())
        execute(page, program)
        page.evaluate(
            "() => { app.canvas.ds.scale = 0.66; app.canvas.ds.offset = [120, 100];"
            " app.canvas.setDirty(true, true); }"
        )
        time.sleep(3)
        page.screenshot(path=PICTURE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
