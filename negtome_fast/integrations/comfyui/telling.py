"""The words for a run: why nothing was guided, and which inputs of the nodes would change it."""

from __future__ import annotations

from typing import Any

from negtome_fast.config import NegToMeConfig

from .run import Run
from .window import Window, percents


def tell_of_one_image(run: Run, config: NegToMeConfig) -> None:
    """Tells that a batch of one has nothing to be pushed from.

    Raises:
        ValueError: the reference is `"others"`.
    """
    remedy = "Set batch_size to 2 or more, or use NegToMe (avoid image), which works with one image"
    if config.reference == "others":
        raise ValueError(
            "reference=others pushes each image away from the others, and the batch has one image. "
            + remedy
        )
    run.tell(
        "not guided: the batch has one image, and nothing that it could be pushed away from. "
        + remedy
    )


def tell_of_window(run: Run, window: Window, model_sampling: Any) -> None:
    """Tells that no step lies in the window, and of one that would hold the first steps."""
    if len(run.sigmas) < 2:
        run.tell(f"not guided: no step of this run lies in the window, {window}")
        return
    first, fitting = run.sigmas[0], window.for_run(run.sigmas, model_sampling)
    percent = percents(first, model_sampling)[0]
    steps = ", ".join(f"{sigma:.3g}" for sigma in run.sigmas[:-1][:4])
    highest, lowest = window.sigmas(model_sampling)
    highest = min(highest, float(model_sampling.sigma_max))
    in_sigmas = f" (sigma {highest:.3g} to {lowest:.3g})" if window.unit == "percent" else ""
    run.tell(
        f"not guided: no step of this run lies in the window, {window}{in_sigmas}. The run begins "
        f"at sigma {first:.3g}, percent {percent:.3g}; its steps are at {steps}"
        f"{', ...' if len(run.sigmas) > 5 else ''}. To guide its first steps, set window="
        f"{fitting.unit}, start={fitting.start:g}, end={fitting.end:g}"
    )


def tell_of_blocks(run: Run, config: NegToMeConfig) -> None:
    """Tells that no attention module was guided in the window."""
    if run.blocks == 0:
        run.tell(
            "not guided: no attention module of the model ran in the window, so another node "
            "replaces the model's forward. Remove it, or guide a model without it"
        )
        return
    blocks, min_grid = ", ".join(config.blocks or ()), config.min_grid[0] if config.min_grid else 0
    run.tell(
        f"not guided: none of the {run.blocks} attention modules that ran passes blocks={blocks} "
        f"and min_grid={min_grid}. Leave blocks empty and min_grid 0 to guide all; NegToMe info "
        "then lists their names and grids"
    )


def tell_of_missing_forwards(run: Run, window: Window, model_sampling: Any) -> None:
    """Tells of steps in the window in which the model did not run."""
    highest, lowest = window.sigmas(model_sampling)
    steps = dict.fromkeys(run.sigmas[:-1])
    inside = [sigma for sigma in steps if lowest <= sigma <= highest]
    slack = 1e-5 * float(model_sampling.sigma_max)
    missing = [
        sigma for sigma in inside if not any(abs(sigma - one) <= slack for one in run.forwards)
    ]
    if missing and len(set(run.forwards)) < len(steps):
        run.tell(
            f"in {len(missing)} of the {len(inside)} steps in the window the model did not run, so "
            "nothing was guided there: another node reuses earlier outputs. Remove it"
        )
