"""Seconds per image of every method, in interleaved rounds: a slow minute strikes all methods.

A round times each method once on the same prompts and seeds. The added time of a method is its time
over the unguided time of the same round. Times in other studies do not compare, because the machine
did other work meanwhile.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..conditions import Condition, batches_of, groups_of
from ..rivals import CADS, SPELL, IntervalGuidance, ParticleGuidance
from . import figures
from .diversity import preset
from .figures import BLUE, GREY
from .study import PROMPTS, Study, StudyRun
from .tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNGUIDED = "unguided"
ROUNDS = 3
FEW_ROUNDS = 2
WARM_UP_STEPS = 2


def conditions() -> list[Condition]:
    """Return one condition per method, at the model's own guidance scale.

    Only the window of a setting decides its time.
    """
    return [
        Condition(UNGUIDED),
        Condition("guidance scale 1", guidance_scale=1.0),
        Condition("NegToMe, others", negtome=preset()),
        Condition("NegToMe, first", negtome=preset(reference="first")),
        Condition(IntervalGuidance.name, baseline=IntervalGuidance()),
        Condition(CADS.name, baseline=CADS()),
        Condition("particle guidance, latents", baseline=ParticleGuidance(100.0, "clean", 0.5)),
        Condition("particle guidance, features", baseline=ParticleGuidance(60.0)),
        Condition(SPELL.name, baseline=SPELL(20.0)),
    ]


def run(run: StudyRun) -> dict[str, Any]:
    """Time all methods."""
    from tqdm import tqdm

    sizes, draw = run.sizes, run.sampler.draw
    rounds = FEW_ROUNDS if sizes.quick else ROUNDS
    prompts = PROMPTS[: max(1, sizes.images // sizes.group)]
    groups = groups_of(prompts, sizes.images // len(prompts), size=sizes.group)
    batches = list(batches_of(groups, run.sampler.batch))
    compared = [replace(condition, steps=sizes.steps) for condition in conditions()]
    for condition in compared:
        draw(replace(condition, steps=WARM_UP_STEPS), batches[0])
    times: dict[str, list[float]] = {condition.name: [] for condition in compared}
    with tqdm(total=rounds * len(compared), unit="method", disable=not run.progress) as bar:
        for _ in range(rounds):
            for condition in compared:
                began = time.perf_counter()
                for batch in batches:
                    draw(condition, batch)
                times[condition.name].append((time.perf_counter() - began) / sizes.images)
                bar.update()
    return {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "methods": {name: figures_of(own, times[UNGUIDED]) for name, own in times.items()},
    }


def figures_of(seconds: list[float], base: list[float]) -> dict[str, Any]:
    """Return median seconds per image, and median and range of the share added to `base`."""
    added = [own / other - 1 for own, other in zip(seconds, base, strict=True)]
    return {
        "seconds_per_image": round(statistics.median(seconds), 5),
        "added": [round(v, 4) for v in (statistics.median(added), min(added), max(added))],
        "rounds": [round(value, 5) for value in seconds],
    }


def table(result: dict[str, Any]) -> str:
    """Return Markdown with a row per method."""
    rows = []
    for name, method in result["methods"].items():
        middle, low, high = method["added"]
        added = "" if name == UNGUIDED else f"{middle:+.1%} ({low:+.1%} to {high:+.1%})"
        rows.append([name, f"{method['seconds_per_image']:.3f}", added])
    sizes = result["sizes"]
    note = (
        f"Medians of {result['rounds']} interleaved rounds of {sizes['images']} images in groups "
        f"of {sizes['group']}, {sizes['steps']} steps, {result['threads']} thread(s); in "
        f"parentheses the range over rounds. {result['date'][:10]}, torch "
        f"{result['versions']['torch']}. Made by `{result['command']}`, which needs a machine "
        "that does nothing else."
    )
    return "\n\n".join([markdown(["method", "seconds an image", "added to unguided"], rows), note])


def draw_figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Draw bars of the added time, with the range over rounds."""
    figure, grid = figures.panels(7.5, 3.6)
    axes = grid[0][0]
    added = {n: m["added"] for n, m in result["methods"].items() if n != UNGUIDED}
    for place, (name, (middle, low, high)) in enumerate(added.items()):
        colour = BLUE if name.startswith("NegToMe") else GREY
        axes.barh(place, 100 * middle, color=colour)
        axes.plot([100 * low, 100 * high], [place, place], color="black", linewidth=1.2)
    axes.set_yticks(range(len(added)), list(added))
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    figures.tidy(axes, "Time added to unguided sampling", "% of unguided", "")
    return {"added": figure}


STUDY = Study("overheads", "time of every method, on a quiet machine", 16, run, table, draw_figures)
