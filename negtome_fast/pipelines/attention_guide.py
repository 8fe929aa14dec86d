"""`AttentionGuide`: hands the image tokens of attention outputs to the guidance.

It holds the state of a guided forward: where the image tokens are, and who may hold an output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..guidance import Guidance
from ..thread_state import PerThread, ThreadState
from .blocks import output_projection
from .compiled import nothing_compiles, outside_of_graphs
from .layouts import ImageTokens, Layout
from .parallel import TokenShards
from .registration import BlockHook, Unsaved
from .replaced_forwards import may_keep_output, merging_advice
from .token_slice import attended_channels, find_image, guide_image_part, holds_single_frames


class AttentionGuide(Unsaved):
    """Guides the attention outputs of one denoiser.

    Args:
        model: the denoiser, for errors.
        layout: where its image tokens are.
        guidance: the guidance, which the other denoisers of the pipeline may share.

    Attributes:
        tokens: the image tokens of the forward, or of the grid module inside it, where known.
        items: number of items in the forward's batch.
    """

    tokens = PerThread[ImageTokens | None](None)
    items = PerThread(0)
    _frames = PerThread(1)
    _shards = PerThread[TokenShards | None](None)
    _exclusive = PerThread[frozenset[nn.Module]](frozenset())

    def __init__(self, model: nn.Module, layout: Layout, guidance: Guidance) -> None:
        self._model = model
        self._layout = layout
        self._guidance = guidance
        self._blocks: tuple[tuple[nn.Module, str], ...] = ()
        self._kept: frozenset[nn.Module] = frozenset()
        self._thread_state = ThreadState()

    def set_blocks(self, blocks: Mapping[nn.Module, str]) -> None:
        """Sets the attention modules that are guided and their names, in the order of numbers."""
        self._blocks = tuple(blocks.items())
        self.begin_run()

    def begin_run(self) -> None:
        """Finds the attention modules whose outputs another library may keep."""
        self._kept = frozenset(
            block
            for block, _ in self._blocks
            if any(may_keep_output(module) for module in block.modules())
        )

    def open(self, tokens: ImageTokens | None, items: int, shards: TokenShards | None) -> None:
        """Opens a guided forward.

        Args:
            tokens: its image tokens, where known.
            items: number of items in its batch.
            shards: how the tokens are distributed over ranks; None if they are not.
        """
        self.tokens, self.items, self._shards = tokens, items, shards
        self._frames = tokens.frames if tokens else 1
        self._exclusive = self._find_exclusive()

    def close(self) -> None:
        """Closes the forward; may be called at any time."""
        self.tokens = self._shards = None

    @outside_of_graphs
    def enter_grid(self, images: torch.Tensor) -> None:
        """Notes that the attention modules from here on see the pixels (B, C, H, W) as tokens."""
        height, width = images.shape[-2:]
        tokens = self._frames * height * width
        self.tokens = ImageTokens(tokens, tokens, (height, width), self._frames)

    def after_attention(self, output: Any, number: torch.Tensor | int) -> Any:
        if not self._guidance.active:
            return None
        if isinstance(output, tuple):
            return (self._guide(output[0], number, True), *output[1:])
        return self._guide(output, number, False)

    def before_projection(self, args: tuple[Any, ...], number: torch.Tensor | int) -> Any:
        if not self._guidance.active:
            return None
        return (self._guide(args[0], number, False), *args[1:])

    def _guide(
        self, tokens: torch.Tensor, number: torch.Tensor | int, all_image: bool
    ) -> torch.Tensor:
        """Returns the attention tokens (B, S, D) of a block with their image part guided.

        Args:
            number: number of the block; a tensor on the CPU in compiled code.
            all_image: all tokens are image, however many there are.
        """
        in_graph = is_differentiable(tokens)
        if torch.compiler.is_compiling() and not in_graph:
            return torch.ops.negtome_fast.guide_block(tokens, number, all_image)
        if not torch.compiler.is_compiling() and nothing_compiles():
            return self._guide_block(tokens, number, all_image, not in_graph)
        return self.guide_block(tokens, number, all_image, inplace=not in_graph)

    @outside_of_graphs
    def guide_block(
        self, tokens: torch.Tensor, number: torch.Tensor | int, all_image: bool, inplace: bool
    ) -> torch.Tensor:
        """Calls `_guide_block`, which dynamo must never trace."""
        return self._guide_block(tokens, number, all_image, inplace)

    def _guide_block(
        self, tokens: torch.Tensor, number: torch.Tensor | int, all_image: bool, inplace: bool
    ) -> torch.Tensor:
        """Guides a block; it may write into the tokens if its outputs are exclusive."""
        module, block = self._blocks[int(number)]
        inplace = inplace and module in self._exclusive
        projected = self.projection_of(module) is not None
        attended = attended_channels(module, tokens) if projected else tokens.shape[2]
        if attended < tokens.shape[2]:
            part = tokens[..., :attended]
            guided = self._guide_attention(part, module, block, all_image, inplace)
            return tokens if guided is part else torch.cat([guided, tokens[..., attended:]], dim=2)
        return self._guide_attention(tokens, module, block, all_image, inplace)

    def _guide_attention(
        self, tokens: torch.Tensor, module: nn.Module, block: str, all_image: bool, inplace: bool
    ) -> torch.Tensor:
        """Guides the image among tokens (B, S, D), or single frames (B * F, H * W, D) as videos."""
        if holds_single_frames(tokens, self.tokens, self.items):
            videos = tokens.reshape(self.items, -1, tokens.shape[2])
            guided = self._guide_attention(videos, module, block, all_image, inplace)
            return tokens if guided is videos else guided.reshape(tokens.shape)
        shards = self._shards_of(module)
        image = shards.image if shards else self.tokens
        found = find_image(tokens, image, self._layout, all_image)
        if found is None:
            expected = "an unknown number of" if image is None else str(image.num_tokens)
            advice = merging_advice(self._model, block) or (
                "describe the model with negtome_fast.pipelines.register_layout"
            )
            raise ValueError(
                f"{type(self._model).__name__}: the attention output of {block} has the shape "
                f"{tuple(tokens.shape)} and the image {expected} tokens, so it is not known which "
                f"tokens are the image; {advice}"
            )
        grid = image.grid if image else None
        branches = 1
        if tokens.shape[0] != self.items:
            branches = self._branches(tokens, block, found[0])

        def guide(image_tokens: torch.Tensor, writable: bool) -> torch.Tensor:
            return self._guidance.apply(
                image_tokens,
                block=block,
                grid=grid,
                inplace=writable,
                shards=shards,
                branches=branches,
            )

        copy_all = not (is_differentiable(tokens) or self._guidance.recording)
        return guide_image_part(tokens, guide, *found, inplace, copy_all)

    def _branches(self, tokens: torch.Tensor, block: str, starts: tuple[int, ...]) -> int:
        """Returns how often the batch of an attention output holds the items of the forward.

        Negative attention guidance computes a positive and a negative branch inside of the blocks.
        """
        branches, rest = divmod(tokens.shape[0], self.items)
        if branches and not rest and len(starts) == 1:
            return branches
        captions = ", and its captions have several lengths" if len(starts) > 1 else ""
        raise ValueError(
            f"{type(self._model).__name__}: the attention output of {block} has {tokens.shape[0]} "
            f"items, but the latents have {self.items}{captions}, so it is not known which items "
            "belong together; another library adds or drops items inside of the model: switch it "
            f'off, or leave the block out by exclude_blocks=["{block}"]'
        )

    def _shards_of(self, module: nn.Module) -> TokenShards | None:
        """Returns how the tokens guided at a block are distributed; None if they are not."""
        shards = self._shards
        if shards is None or (module in shards.gathered and self.projection_of(module) is None):
            return None
        return shards

    def projection_of(self, block: nn.Module) -> nn.Module | None:
        """Returns the output projection to hook; None if the attention output is guided itself."""
        placement = self._guidance.config.placement
        return None if placement == "output" else output_projection(block)

    def _find_exclusive(self) -> frozenset[nn.Module]:
        """Returns the attention modules whose outputs no other code can hold.

        Another hook, a cache or a processor of another library may have kept the tensor that is now
        the output. It may even be a hook further inside: a dropout of 0 returns the projection's
        output itself.
        """
        if not self._layout.fresh_outputs or _has_any_global_hook():
            return frozenset()
        return frozenset(
            block
            for block, _ in self._blocks
            if block not in self._kept
            and all(
                isinstance(hook, BlockHook) and hook.owner is self
                for module in block.modules()
                for hooks in (module._forward_hooks, module._forward_pre_hooks)
                for hook in hooks.values()
            )
        )


def is_differentiable(tensor: torch.Tensor) -> bool:
    """Returns True if autograd records what is done with a tensor."""
    return torch.is_grad_enabled() and tensor.requires_grad
