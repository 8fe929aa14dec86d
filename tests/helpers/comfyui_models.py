"""Doubles of ComfyUI's diffusion transformers: where each keeps its attentions and its image.

`comfyui_double` has the UNet and FLUX. As there, an attention's output at a token depends on that
token alone, so that a change to the latents shows which tokens are the image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from helpers.comfyui_double import CHANNELS, Attended, Flux, UNetModel, linear


def block(**parts: nn.Module) -> nn.Module:
    """A module with parts of these names; `__` stands for a dot in them."""
    made = nn.Module()
    for name, part in parts.items():
        *path, last = name.split("__")
        here = made
        for step in path:
            if not hasattr(here, step):
                here.add_module(step, nn.Module())
            here = getattr(here, step)
        here.add_module(last, part)
    return made


class Transformer(nn.Module, ABC):
    """Latents (B, 4, H, W), or (B, 4, F, H, W), in patches of 2."""

    patch_size: Any = 2

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = linear(16, CHANNELS, 0), linear(CHANNELS, 16, 1)
        self.seen = 0

    def attended(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns an attention's output; each call in a forward has a module of its own."""
        name = f"attended_{self.seen}"
        if not hasattr(self, name):
            self.add_module(name, Attended())
        self.seen += 1
        result: torch.Tensor = getattr(self, name)(tokens)
        return result

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        frames = latents if latents.ndim == 5 else latents.unsqueeze(2)
        patches = nn.functional.pixel_unshuffle(frames.transpose(1, 2), 2)  # (B, F, 16, h, w)
        return self.inputs(patches.movedim(2, -1).flatten(1, 3))

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, options: Any, ref_latents: Any = None
    ) -> torch.Tensor:
        self.seen = 0
        image = torch.cat([self.tokens(one) for one in (x, *(ref_latents or []))], dim=1)
        image = self.blocks_of(image, context)
        frames = x if x.ndim == 5 else x.unsqueeze(2)
        size = frames.shape[2], frames.shape[3] // 2, frames.shape[4] // 2
        count = size[0] * size[1] * size[2]
        patches = self.outputs(image[:, :count]).unflatten(1, size).movedim(-1, 2)
        return nn.functional.pixel_shuffle(patches, 2).transpose(1, 2).reshape(x.shape)

    @abstractmethod
    def blocks_of(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Returns the image tokens after all blocks."""

    def joint(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One attention over two streams, whose outputs it returns apart."""
        count = first.shape[1]
        attended = self.attended(torch.cat([first, second], dim=1))
        return attended[:, :count], attended[:, count:]


class Chroma(Flux):
    pass


class OpenAISignatureMMDITWrapper(Transformer):
    """SD3.5 medium: the image stream's blocks have a second attention of their own."""

    def __init__(self) -> None:
        super().__init__()
        image = block(
            x_block__attn__proj=linear(CHANNELS, CHANNELS, 2),
            x_block__attn2__proj=linear(CHANNELS, CHANNELS, 3),
            context_block__attn__proj=linear(CHANNELS, CHANNELS, 4),
        )
        self.joint_blocks = nn.ModuleList([image])

    def blocks_of(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        one = self.joint_blocks[0]
        of_text, of_image = self.joint(text, image)
        text = text + one.context_block.attn.proj(of_text)
        image = image + one.x_block.attn.proj(of_image)
        return image + one.x_block.attn2.proj(self.attended(image))


class MMDiT(Transformer):
    """AuraFlow."""

    def __init__(self) -> None:
        super().__init__()
        double = block(attn__w2o=linear(CHANNELS, CHANNELS, 2), attn__w1o=linear(CHANNELS, 16, 3))
        self.double_layers = nn.ModuleList([double])
        self.single_layers = nn.ModuleList([block(attn__w1o=linear(CHANNELS, CHANNELS, 4))])

    def blocks_of(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        of_text, of_image = self.joint(text, image)
        image = image + self.double_layers[0].attn.w2o(of_image)
        text = text + self.double_layers[0].attn.w1o(of_text)
        both = torch.cat([text, image], dim=1)
        both = both + self.single_layers[0].attn.w1o(self.attended(both))
        return both[:, text.shape[1] :]


class PixArtMS(Transformer):
    def __init__(self) -> None:
        super().__init__()
        one = block(
            attn__proj=linear(CHANNELS, CHANNELS, 2), cross_attn__proj=linear(CHANNELS, CHANNELS, 3)
        )
        self.blocks = nn.ModuleList([one])

    def blocks_of(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        image = image + self.blocks[0].attn.proj(self.attended(image))
        attended = self.attended(image) + text.mean(1, keepdim=True)
        return image + self.blocks[0].cross_attn.proj(attended)


class WanModel(Transformer):
    patch_size = (1, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        one = block(
            self_attn__o=linear(CHANNELS, CHANNELS, 2), cross_attn__o=linear(CHANNELS, CHANNELS, 3)
        )
        self.blocks = nn.ModuleList([one])

    def blocks_of(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        image = image + self.blocks[0].self_attn.o(self.attended(image))
        attended = self.attended(image) + text.mean(1, keepdim=True)
        return image + self.blocks[0].cross_attn.o(attended)


class QwenImageTransformer2DModel(Transformer):
    """`ref_latents` are given images, whose tokens follow those of the generated one."""

    patch_size = (1, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        one = block(attn__to_out=nn.ModuleList([linear(CHANNELS, CHANNELS, 2)]))
        one.attn.to_add_out = linear(CHANNELS, CHANNELS, 3)
        self.transformer_blocks = nn.ModuleList([one])

    def blocks_of(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        of_text, of_image = self.joint(text, image)
        self.transformer_blocks[0].attn.to_add_out(of_text)
        return image + self.transformer_blocks[0].attn.to_out[0](of_image)


class HunyuanVideo(Transformer):
    """The single blocks have the image first; an attention of the text alone comes before all."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size = [1, 2, 2]
        double = block(
            img_attn__proj=linear(CHANNELS, CHANNELS, 2), txt_attn__proj=linear(CHANNELS, 16, 3)
        )
        self.double_blocks = nn.ModuleList([double])
        self.single_blocks = nn.ModuleList([block(linear2=linear(3 * CHANNELS, CHANNELS, 4))])

    def blocks_of(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        text = text + self.attended(text)
        of_image, of_text = self.joint(image, text)
        image = image + self.double_blocks[0].img_attn.proj(of_image)
        text = text + self.double_blocks[0].txt_attn.proj(of_text)
        both = torch.cat([image, text], dim=1)
        wide = torch.cat([self.attended(both), both, both], dim=2)
        return (both + self.single_blocks[0].linear2(wide))[:, : image.shape[1]]


MODELS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        UNetModel,
        Flux,
        Chroma,
        OpenAISignatureMMDITWrapper,
        MMDiT,
        PixArtMS,
        WanModel,
        QwenImageTransformer2DModel,
        HunyuanVideo,
    )
}
VIDEO = ("WanModel", "HunyuanVideo")
