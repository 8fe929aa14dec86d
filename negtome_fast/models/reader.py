"""The attribute reader: a small classifier of the attributes that an avatar image shows.

It is trained on the true attributes of balanced renderings. Prompt agreement, attribute entropy and
the recognition of protected characters are measured with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .avatars import ATTRIBUTES, CHARACTERS, IMAGE_SIZE, model_folder

#: Classes of each head; `character` has "none" for every avatar that is not protected.
HEADS: dict[str, tuple[str, ...]] = {**ATTRIBUTES, "character": ("none", *CHARACTERS)}


class AttributeReader(nn.Module):
    """Convolutional classifier: images `(B, 3, 64, 64)` in [-1, 1] -> `{head: (B, classes)}`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out_channels in (width, 2 * width, 3 * width, 4 * width):
            layers += [
                nn.Conv2d(channels, out_channels, 3, stride=2, padding=1),
                nn.GroupNorm(8, out_channels),
                nn.SiLU(),
            ]
            channels = out_channels
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2))
        features = channels * (IMAGE_SIZE // 16) ** 2
        self.heads = nn.ModuleDict(
            {name: nn.Linear(features, len(values)) for name, values in HEADS.items()}
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits of every head.

        Raises:
            ValueError: images of another size.
        """
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"the reader takes images (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), "
                f"got {tuple(images.shape)}"
            )
        features = self.body(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> list[dict[str, str]]:
        """Return the most likely value of every head, one dictionary per image."""
        indices = {name: logits.argmax(-1).tolist() for name, logits in self(images).items()}
        return [
            {name: HEADS[name][indices[name][item]] for name in HEADS}
            for item in range(images.shape[0])
        ]


def load_reader(folder: str | Path | None = None) -> tuple[AttributeReader, dict[str, Any]]:
    """Return the reader in eval mode, and its card with the held-out accuracy of every head.

    Args:
        folder: folder of the weights. Default: the shipped ones.
    """
    from safetensors.torch import load_file

    root = Path(folder) if folder is not None else Path(str(model_folder())) / "reader"
    card = json.loads((root / "reader.json").read_text(encoding="utf-8"))
    reader = AttributeReader(card["width"])
    reader.load_state_dict(
        {k: v.float() for k, v in load_file(root / "reader.safetensors").items()}
    )
    return reader.eval(), card
