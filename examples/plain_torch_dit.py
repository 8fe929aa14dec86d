"""Guidance in a hand-written sampling loop, around a small diffusion transformer.

    python examples/plain_torch_dit.py

It needs torch and negtome_fast only. `begin_step` and `end_step` are in the loop, `apply` is in the
block; `record` is for references from outside of the batch. The weights are random, so the results
are not pictures. The script prints the summaries of the guidance and how far it moved the results.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

import negtome_fast as nf
from negtome_fast.guidance import ReferenceSettings

GRID = (16, 16)
CHANNELS, WIDTH, HEADS, DEPTH = 4, 64, 4, 4


class Block(nn.Module):
    """Attention and feed-forward, both modulated by the condition (adaptive layer norm)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, tokens: Tensor, condition: Tensor, guidance: nf.Guidance | None) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(condition)[:, None].chunk(
            6, dim=2
        )
        normed = nn.functional.layer_norm(tokens, (WIDTH,)) * (1 + scale) + shift
        attended = self.attention(normed, normed, normed, need_weights=False)[0]
        if guidance is not None:
            attended = guidance.apply(attended, block=self.name)  # image tokens only
        tokens = tokens + (1 + gate) * attended
        normed = nn.functional.layer_norm(tokens, (WIDTH,)) * (1 + scale_2) + shift_2
        return tokens + (1 + gate_2) * self.feed_forward(normed)


class DiT(nn.Module):
    """Predicts the velocity of flow matching from latents (B, C, H, W) and a condition (B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.places = nn.Parameter(torch.randn(GRID[0] * GRID[1], WIDTH) * 0.02)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(f"blocks.{i}") for i in range(DEPTH))
        self.out = nn.Linear(WIDTH, CHANNELS)

    def forward(
        self, latents: Tensor, sigma: float, condition: Tensor, guidance: nf.Guidance | None = None
    ) -> Tensor:
        tokens = self.embed(latents.flatten(2).transpose(1, 2)) + self.places
        condition = condition + self.time(condition.new_tensor([[sigma]]))
        for block in self.blocks:
            tokens = block(tokens, condition, guidance)
        return self.out(tokens).transpose(1, 2).unflatten(2, GRID)


@torch.no_grad()
def sample(
    model: DiT,
    noise: Tensor,
    condition: Tensor,
    guidance: nf.Guidance | None = None,
    references: Tensor | None = None,
    steps: int = 12,
    scale: float = 3.0,
) -> Tensor:
    """Euler steps under classifier-free guidance, whose two halves share a batch.

    Args:
        noise: (B, C, H, W).
        condition: (1, D), the same for all images.
        references: clean latents (R, C, H, W) from outside of the batch, one for each of the
            guidance's `ReferenceSettings`.
    """
    unconditional = torch.zeros_like(condition)
    latents = noise
    reference_noise = torch.randn(
        noise.shape[1:], generator=torch.Generator().manual_seed(0)
    )  # drawn once per run
    sigmas = torch.linspace(1, 0, steps + 1).tolist()
    for sigma, following in pairwise(sigmas):
        inside = False
        if guidance is not None:
            # The images of one half are not pushed away from the other half's.
            inside = guidance.begin_step(1000 * sigma, parts=2, grid=GRID)
        if guidance is not None and inside and references is not None:
            noisy = (1 - sigma) * references + sigma * reference_noise
            with guidance.record():  # keeps the tokens that `apply` is given, changes nothing
                model(*doubled(noisy, sigma, unconditional, condition), guidance)
        velocity = model(*doubled(latents, sigma, unconditional, condition), guidance)
        if guidance is not None:
            guidance.end_step()
        uncond, cond = velocity.chunk(2)
        latents = latents + (following - sigma) * (uncond + scale * (cond - uncond))
    return latents


def doubled(
    latents: Tensor, sigma: float, unconditional: Tensor, condition: Tensor
) -> tuple[Tensor, float, Tensor]:
    """Returns the batch of both conditions: latents, sigma and conditions, one half each."""
    count = len(latents)
    both = torch.cat([unconditional.expand(count, -1), condition.expand(count, -1)])
    return torch.cat([latents, latents]), sigma, both


def likeness(images: Tensor) -> float:
    """Returns the mean cosine similarity over all pairs of different images."""
    rows = nn.functional.normalize(images.flatten(1), dim=1)
    pairs = rows @ rows.T
    return float((pairs.sum() - pairs.trace()) / (len(rows) * (len(rows) - 1)))


def main() -> dict[str, Tensor]:
    """Prints the summaries of the guidance; returns the results without and with it."""
    torch.manual_seed(0)
    model, condition = DiT().eval(), torch.randn(1, WIDTH)
    noise = torch.randn(4, CHANNELS, *GRID)
    plain = sample(model, noise, condition)

    # Diversity of a batch: push every image away from all others, in the first steps.
    config = nf.NegToMeConfig(alpha=0.9, threshold=0.3, t_end=700, reference="others")
    guidance = nf.Guidance(config)
    diverse = sample(model, noise, condition, guidance)
    print(guidance.summary())
    print(f"likeness of the batch: {likeness(plain):.3f} -> {likeness(diverse):.3f}")

    # Push away from a given image, from its upper half only. A batch of one is enough.
    upper = torch.zeros(GRID, dtype=torch.bool)
    upper[: GRID[0] // 2] = True
    avoiding = nf.Guidance(config, references=[ReferenceSettings(alpha=1.5, mask=upper)])
    avoided = sample(model, noise[:1], condition, avoiding, references=plain[1:2])
    print(avoiding.summary())
    print(f"mean absolute change: {float((avoided - plain[:1]).abs().mean()):.3f}")
    return {"plain": plain, "diverse": diverse, "avoided": avoided}


if __name__ == "__main__":
    main()
