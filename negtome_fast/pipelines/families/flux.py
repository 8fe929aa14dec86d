"""FLUX and models of its architecture: double blocks, then single blocks, text before image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..encoders import PACKED, ReferenceEncoder, pack_pixels, patchify_and_normalise
from ..image_tokens import grid_of_places, not_known
from ..layouts import ImageTokens, Layout, as_it_is, times_1000


def tokens_by_ids(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads `hidden_states` (B, N, C) and `img_ids` (N, 3 or 4) of (image, row, column, ...).

    Images to edit have a greater number in the first column. They follow the generated image; if
    their keys are cached (FLUX.2 Klein KV), they come before it.
    """
    num_tokens = arguments["hidden_states"].shape[1]
    ids = arguments.get("img_ids")
    if ids is None:
        return ImageTokens(num_tokens, num_tokens)
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[:, 0] == ids[:, 0].min()
    generated = int(own.sum())
    grid = grid_of_places(ids[own, 1:3])
    if grid is not None and len(ids) == num_tokens:
        if bool(own[:generated].all()):
            return ImageTokens(num_tokens, generated, grid)
        if bool(own[-generated:].all()):
            return ImageTokens(num_tokens, generated, grid, offset=num_tokens - generated)
    raise not_known(model, "its img_ids do not place the tokens of one image row by row")


BUILT_LIKE_FLUX = Layout(
    scheduler_timestep=times_1000,
    guidance="sequential",
    image_tokens=tokens_by_ids,
    joint="text_first",
    blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
    fresh_outputs=True,
)
BRIA = replace(BUILT_LIKE_FLUX, scheduler_timestep=as_it_is, guidance="concatenated")

LAYOUTS = {
    "FluxTransformer2DModel": replace(
        BUILT_LIKE_FLUX, family="FLUX.1 (dev, schnell, Kontext)", preset="flux", encode=PACKED
    ),
    "Flux2Transformer2DModel": replace(
        BUILT_LIKE_FLUX,
        family="FLUX.2 (dev, Klein)",
        encode=ReferenceEncoder(normalise=patchify_and_normalise, pack=pack_pixels, packing=2),
    ),
    "ChromaTransformer2DModel": replace(BUILT_LIKE_FLUX, family="Chroma", encode=PACKED),
    "LongCatImageTransformer2DModel": replace(
        BUILT_LIKE_FLUX, family="LongCat-Image", encode=PACKED
    ),
    "OvisImageTransformer2DModel": replace(BUILT_LIKE_FLUX, family="Ovis-Image", encode=PACKED),
    "BriaTransformer2DModel": replace(BRIA, family="Bria 3.2", encode=PACKED),
    "BriaFiboTransformer2DModel": replace(
        BRIA, family="Bria FIBO", encode=ReferenceEncoder(takes="video", pack=pack_pixels)
    ),
}
