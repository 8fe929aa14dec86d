"""The nodes: one description of each, for both of ComfyUI's schemas.

`NODE_CLASS_MAPPINGS` holds them as plain classes, which every ComfyUI reads. `comfy_entrypoint`
makes them in the V3 schema of `comfy_api`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from negtome_fast.config import NegToMeConfig

from .guide import Guide, guides_of
from .references import ReferenceImages
from .window import Window

CATEGORY = "model_patches/negtome"


@dataclass(frozen=True)
class Socket:
    """An input or output of a node.

    Attributes:
        name: its name.
        kind: ComfyUI's type, such as `"FLOAT"`.
        options: ComfyUI's options, such as `default` and `tooltip`.
        optional: it may be left unconnected.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    optional: bool = False

    @property
    def v1(self) -> tuple[Any, ...]:
        if self.kind != "COMBO":
            return self.kind, self.options
        options = dict(self.options)
        return options.pop("options"), options

    def v3_input(self, io: Any) -> Any:
        """Returns it as an input of `comfy_api.latest.io`, whose types differ in case only."""
        kind = getattr(io, self.kind.capitalize())
        return kind.Input(self.name, optional=self.optional, **self.options)

    def v3_output(self, io: Any) -> Any:
        """Returns it as an output; its id must differ from those of the inputs."""
        kind = getattr(io, self.kind.capitalize())
        return kind.Output(f"{self.name}_out", display_name=self.name)


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        name, title, description: its id, and what the user reads.
        inputs, outputs: its sockets.
        run: takes the inputs by name and returns a value for each output.
        shows: it is an output node, whose last output, a text, is shown in the user interface.
    """

    name: str
    title: str
    description: str
    inputs: tuple[Socket, ...]
    outputs: tuple[Socket, ...]
    run: Callable[..., tuple[Any, ...]]
    shows: bool = False

    def v1(self) -> type:
        """Returns a class for ComfyUI's NODE_CLASS_MAPPINGS."""

        def run(_: Any, **inputs: Any) -> Any:
            outputs = self.run(**inputs)
            return {"ui": {"text": [outputs[-1]]}, "result": outputs} if self.shows else outputs

        def input_types(_: type) -> dict[str, dict[str, Any]]:
            return {
                "required": {one.name: one.v1 for one in self.inputs if not one.optional},
                "optional": {one.name: one.v1 for one in self.inputs if one.optional},
            }

        members = {
            "INPUT_TYPES": classmethod(input_types),
            "RETURN_TYPES": tuple(one.kind for one in self.outputs),
            "RETURN_NAMES": tuple(one.name for one in self.outputs),
            "FUNCTION": "run",
            "CATEGORY": CATEGORY,
            "DESCRIPTION": self.description,
            "OUTPUT_NODE": self.shows,
            "run": run,
        }
        return type(self.name, (), members)

    def v3(self, io: Any) -> type:
        """Returns a class in the V3 schema; `io` is `comfy_api.latest.io`."""

        def define_schema(_: type) -> Any:
            outputs = [one.v3_output(io) for one in self.outputs]
            return io.Schema(
                node_id=self.name,
                display_name=self.title,
                category=CATEGORY,
                description=self.description,
                inputs=[one.v3_input(io) for one in self.inputs],
                outputs=outputs,
                is_output_node=self.shows,
            )

        def execute(_: type, **inputs: Any) -> Any:
            outputs = self.run(**inputs)
            ui = {"text": [outputs[-1]]} if self.shows else None
            return io.NodeOutput(*outputs, ui=ui)

        members = {
            "define_schema": classmethod(define_schema),
            "execute": classmethod(execute),
        }
        return type(self.name, (io.ComfyNode,), members)


def _number(
    name: str, default: float, lowest: float, highest: float, step: float, tooltip: str
) -> Socket:
    options = {"default": default, "min": lowest, "max": highest, "step": step, "tooltip": tooltip}
    return Socket(name, "FLOAT", options)


MODEL = Socket("model", "MODEL", {"tooltip": "The model to guide; the output is a guided clone."})
STRENGTH = (
    _number(
        "alpha",
        0.9,
        -10.0,
        10.0,
        0.05,
        "Push strength: positive pushes away, negative pulls toward, 0 only measures.",
    ),
    _number(
        "threshold",
        0.65,
        -1.0,
        1.0,
        0.01,
        "Cosine similarity that a match must exceed. The authors: 0.65 for FLUX, 0.7 for SDXL.",
    ),
)
WINDOW = (
    Socket(
        "window",
        "COMBO",
        {
            "options": ["percent", "sigma"],
            "default": "percent",
            "tooltip": "Unit of start and end: percent of the sampling, 0 to 1, or sigmas.",
        },
    ),
    _number(
        "start",
        0.0,
        0.0,
        1000.0,
        0.001,
        "First guided step: percent 0.0, or the highest sigma. The authors: sigma 1.0 for FLUX, "
        "percent 0.0 for SDXL. A run with denoise 0.5 begins at percent 0.5 or so.",
    ),
    _number(
        "end",
        0.2,
        0.0,
        1000.0,
        0.001,
        "Last guided step: a higher percent, or a lower sigma. The authors: sigma 0.9 for FLUX, "
        "percent 0.2 for SDXL.",
    ),
)
FILTERS = (
    Socket(
        "blocks",
        "STRING",
        {
            "default": "",
            "tooltip": "Names or patterns of blocks to guide, with commas between; empty: all. "
            "The authors for SDXL: output_blocks. NegToMe info lists the names.",
        },
        optional=True,
    ),
    Socket(
        "min_grid",
        "INT",
        {
            "default": 0,
            "min": 0,
            "max": 1024,
            "tooltip": "Guide only blocks with at least this many tokens in height and in width. "
            "The authors: 32 for SDXL, 0 for FLUX.",
        },
        optional=True,
    ),
)


def _config(
    alpha: float, threshold: float, blocks: str, min_grid: int, **settings: Any
) -> NegToMeConfig:
    names = [name.strip() for name in blocks.split(",") if name.strip()]
    return NegToMeConfig(
        alpha=alpha,
        threshold=threshold,
        blocks=names or None,
        min_grid=(min_grid, min_grid) if min_grid else None,
        **settings,
    )


def batch_diversity(
    model: Any,
    alpha: float,
    threshold: float,
    window: Any,
    start: float,
    end: float,
    reference: Any,
    blocks: str = "",
    min_grid: int = 0,
    across_prompts: bool = False,
) -> tuple[Any]:
    """Returns a clone of the model that pushes the images of a batch away from each other."""
    config = _config(alpha, threshold, blocks, min_grid, reference=reference)
    guide = Guide(
        "NegToMe (batch diversity)",
        config,
        Window(start, end, window),
        across_prompts=across_prompts,
    )
    return (guide.attach(model),)


def avoid_image(
    model: Any,
    image: torch.Tensor,
    vae: Any,
    alpha: float,
    threshold: float,
    window: Any,
    start: float,
    end: float,
    mask: torch.Tensor | None = None,
    blocks: str = "",
    min_grid: int = 0,
) -> tuple[Any]:
    """Returns a clone of the model that pushes its images away from the given ones."""
    config = _config(alpha, threshold, blocks, min_grid)
    references = ReferenceImages(image, vae, mask)
    guide = Guide("NegToMe (avoid image)", config, Window(start, end, window), references)
    return (guide.attach(model),)


def info(model: Any, samples: Any) -> tuple[Any, str]:
    """Returns the samples, and what is known of the model's last run."""
    texts = map(_report, guides_of(model))
    return samples, "\n\n".join(texts) or "this model is not guided by NegToMe"


def _report(guide: Guide) -> str:
    """Returns the counts of a guide's last run, block by block, and what the user was told."""
    notes = list(guide.run.notes) if guide.run is not None else []
    if guide.guidance.config.alpha == 0:
        notes.append("measured only: alpha is 0, so nothing was pushed")
    return "\n".join([f"{guide.title}: {guide.guidance.summary()}", *notes])


NODES = (
    Node(
        "NegToMeBatchDiversity",
        "NegToMe (batch diversity)",
        "Pushes the images of one batch away from each other: every image token away from its "
        "most similar token in the first image of the batch, or in all others. Needs a batch of "
        "at least 2; for a single image use NegToMe (avoid image). Put it after HyperTile and "
        "TomePatchModel, nearer to the sampler.",
        (
            MODEL,
            *STRENGTH,
            *WINDOW,
            Socket(
                "reference",
                "COMBO",
                {
                    "options": ["first", "others"],
                    "default": "first",
                    "tooltip": "first: the others are pushed away from the first image, which "
                    "stays as it is. others: each is pushed away from all others.",
                },
            ),
            *FILTERS,
            Socket(
                "across_prompts",
                "BOOLEAN",
                {
                    "default": False,
                    "tooltip": "For batches in which images have different prompts. Off: images "
                    "are pushed away from images of their own prompt. On: all are one group.",
                },
                optional=True,
            ),
        ),
        (Socket("model", "MODEL"),),
        batch_diversity,
    ),
    Node(
        "NegToMeAvoidImage",
        "NegToMe (avoid image)",
        "Pushes what is generated away from a picture, or from a region of it; a negative alpha "
        "pulls toward it. Works with a single image. Guided steps run the model once more for "
        "each picture. Put it after HyperTile and TomePatchModel, nearer to the sampler.",
        (
            MODEL,
            Socket(
                "image",
                "IMAGE",
                {"tooltip": "To avoid; it is stretched to the run's size."},
            ),
            Socket("vae", "VAE", {"tooltip": "The VAE of this model."}),
            *STRENGTH,
            *WINDOW,
            Socket(
                "mask",
                "MASK",
                {"tooltip": "Region of the image to avoid, as drawn in the mask editor."},
                optional=True,
            ),
            *FILTERS,
        ),
        (Socket("model", "MODEL"),),
        avoid_image,
    ),
    Node(
        "NegToMeInfo",
        "NegToMe info",
        "Shows what NegToMe did in the sampling that made these samples: for each block, the share "
        "of tokens matched and pushed, and their mean similarity; and why it did nothing, if it "
        "did nothing.",
        (
            Socket("model", "MODEL", {"tooltip": "The guided model that the sampler was given."}),
            Socket("samples", "LATENT", {"tooltip": "The sampler's output. It is passed through."}),
        ),
        (Socket("samples", "LATENT"), Socket("text", "STRING")),
        info,
        shows=True,
    ),
)

NODE_CLASS_MAPPINGS = {node.name: node.v1() for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.name: node.title for node in NODES}


async def comfy_entrypoint() -> Any:
    """Returns the nodes in ComfyUI's V3 schema."""
    from comfy_api.latest import ComfyExtension, io

    class NegToMeExtension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [node.v3(io) for node in NODES]

    return NegToMeExtension()
