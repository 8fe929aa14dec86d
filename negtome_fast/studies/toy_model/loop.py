"""One resumable training loop for all parts of the embedded model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def train_loop(
    name: str,
    modules: dict[str, nn.Module],
    loss_of_step: Callable[[int], Tensor],
    checkpoint: Path,
    steps: int,
    learning_rate: float,
    ema_decay: float = 0.0,
    save_every: int = 200,
    on_save: Callable[[int, dict[str, nn.Module]], None] | None = None,
) -> dict[str, Any]:
    """Train `modules` in place, from the checkpoint on if there is one.

    The learning rate warms up over 100 steps, holds, and decays over the last quarter.

    Args:
        name: label of the progress bar.
        modules: what is trained, by the name in the checkpoint.
        loss_of_step: loss of a step, from 0; the random state is seeded before each call.
        checkpoint: file of the training's state.
        steps: number of steps, those of the checkpoint included.
        learning_rate: highest learning rate of AdamW.
        ema_decay: decay of the exponential moving average, which the modules hold at the end; 0:
            no average.
        save_every: number of steps between two checkpoints.
        on_save: called with the number of steps and the averaged modules after each checkpoint.

    Returns:
        The record: steps, seconds and last smoothed loss.
    """
    from tqdm import tqdm

    state = _State(modules, learning_rate, ema_decay)
    if checkpoint.exists():
        state.load(checkpoint)
    smoothed = None
    bar = tqdm(range(state.step, steps), initial=state.step, total=steps, desc=name, unit="step")
    for step in bar:
        began = time.perf_counter()
        decay = min(1.0, (steps - step) / max(1, steps // 4))
        torch.manual_seed(step + 1)
        value = state.update(loss_of_step(step), decay * min(1.0, (step + 1) / 100))
        smoothed = value if smoothed is None else 0.98 * smoothed + 0.02 * value
        state.seconds += time.perf_counter() - began
        bar.set_postfix(loss=f"{smoothed:.4f}")
        if state.step % save_every == 0 or state.step == steps:
            state.history.append([state.step, round(smoothed, 5)])
            state.save(checkpoint)
            if on_save is not None:
                state.swap_average()
                on_save(state.step, modules)
                state.swap_average()
    state.swap_average()
    loss = state.history[-1][1] if state.history else None
    return {"steps": steps, "seconds": round(state.seconds), "loss": loss}


class _State:
    """Everything that a checkpoint holds: modules, optimizer, their average, and the progress."""

    def __init__(
        self, modules: dict[str, nn.Module], learning_rate: float, ema_decay: float
    ) -> None:
        self._modules, self._learning_rate, self._decay = modules, learning_rate, ema_decay
        self._parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=learning_rate, weight_decay=0.01, fused=True
        )
        self._average = [p.detach().clone() for p in self._parameters]
        self.step, self.seconds = 0, 0.0
        self.history: list[list[Any]] = []

    def update(self, loss: Tensor, share: float) -> float:
        """Take a step at this share of the learning rate; return the loss."""
        self._optimizer.param_groups[0]["lr"] = self._learning_rate * share
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        if self._decay:
            weight = min(self._decay, (1 + self.step) / (10 + self.step))
            current = [p.detach() for p in self._parameters]
            torch._foreach_lerp_(self._average, current, 1 - weight)
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the parameters and their average, if one is kept."""
        if self._decay:
            for parameter, smooth in zip(self._parameters, self._average, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(smooth)
                smooth.copy_(kept)

    def load(self, checkpoint: Path) -> None:
        """Continue from the checkpoint."""
        state = torch.load(checkpoint, weights_only=True)
        for key, module in self._modules.items():
            module.load_state_dict(state["modules"][key])
        self._optimizer.load_state_dict(state["optimizer"])
        self._average = state["average"]
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]

    def save(self, checkpoint: Path) -> None:
        """Write the checkpoint; an interruption leaves the old one."""
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "modules": {key: module.state_dict() for key, module in self._modules.items()},
                "optimizer": self._optimizer.state_dict(),
                "average": self._average,
                "step": self.step,
                "seconds": self.seconds,
                "history": self.history,
            },
            partial,
        )
        partial.replace(checkpoint)
