"""Conventions of matching, compared on a real model's tokens.

Three pairs are compared: `paper` and `official` (the order of the authors' code), `first` and
`others`, attention outputs and the inputs of their projection. The study counts how often they
choose the same token, measures how similar matched and pushed tokens are, and shows the effect on
diversity and quality.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...config import NegToMeConfig
from ...functional import match_tokens
from ..conditions import Condition, groups_of
from ..scores import record
from . import figures
from .diversity import preset
from .figures import BLUE, COLOURS, GREY
from .study import PROMPTS, SEED, Study, StudyRun
from .tables import markdown, measures_table, origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Differences of each condition from the package's settings for diversity.
CONDITIONS: dict[str, dict[str, Any]] = {
    "others": {},
    "first": {"reference": "first"},
    "first, official": {"reference": "first", "matching": "official"},
    "others, before the projection": {"placement": "pre_projection"},
    "first, official, before the projection": {
        "reference": "first",
        "matching": "official",
        "placement": "pre_projection",
    },
}
FEW = ("others", "first, official")
GROUPS = 2
"""Number of groups per prompt whose tokens are compared."""

PLACEMENTS = ("output", "pre_projection")


def run(run: StudyRun) -> dict[str, Any]:
    """Draw all conditions, and compare the conventions on tokens."""
    names = run.sizes.chosen(tuple(CONDITIONS), FEW)
    conditions = [Condition("off")]
    conditions += [Condition(name, negtome=preset(**CONDITIONS[name])) for name in names]
    scores = run.scores(run.samples(conditions, seed=SEED))
    return {
        "conditions": [record(one, scores["off"]) for one in scores.values()],
        "matching": {where: compare(run, where) for where in PLACEMENTS},
    }


def compare(run: StudyRun, placement: str) -> dict[str, Any]:
    """Return means over blocks and images of unguided runs, step by step; nothing is pushed."""
    sums: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    groups = groups_of(PROMPTS, GROUPS * run.sizes.group, size=run.sizes.group, seed=SEED)
    config = NegToMeConfig(
        alpha=0.0,
        t_end=0,
        reference="others",
        placement=placement,  # type: ignore[arg-type]
    )
    # Each group is a batch of its own, so that item 0 is the reference of all others.
    for group in groups:
        with recorded() as tokens:
            run.sampler.draw(Condition("measure", steps=run.sizes.steps, negtome=config), [group])
        for timestep, block in tokens:
            for name, value in compared(block).items():
                sums[name][timestep].append(value)
    return {
        name: {
            "by_timestep": {
                f"{t:.0f}": round(sum(v) / len(v), 4)
                for t, v in sorted(found.items(), reverse=True)
            },
            "mean": round(_mean([x for v in found.values() for x in v]), 4),
        }
        for name, found in sums.items()
    }


def compared(tokens: Tensor) -> dict[str, float]:
    """Compare the conventions on image tokens (B, N, D) of one block; item 0 is the reference."""
    reference, sources = tokens[:1], tokens[1:]
    items, count, _ = sources.shape
    # The paper: each source token's best reference token.
    similarity, index = match_tokens(sources, reference)
    # The authors' code: each reference token j's best source token i; source token j is then pushed
    # away from reference token i.
    back = [match_tokens(reference, item[None]) for item in sources]
    official_similarity = torch.cat([found[0] for found in back])
    official_index = torch.cat([found[1] for found in back])
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    pushed_apart = (unit[1:] * unit[0][official_index]).sum(-1)
    # Others: the best token of all other items; match_tokens numbers their tokens consecutively.
    other_similarity, from_first = [], []
    for item in range(len(tokens)):
        rest = torch.cat([tokens[:item], tokens[item + 1 :]])
        found = match_tokens(tokens[item : item + 1], rest)
        other_similarity.append(found[0].mean())
        if item:
            from_first.append((found[1] < count).float().mean())
    position = torch.arange(count).expand(items, count)
    return {
        "same token as official": float((index == official_index).float().mean()),
        "own position, paper": float((index == position).float().mean()),
        "own position, official": float((official_index == position).float().mean()),
        "similarity, paper": float(similarity.mean()),
        "similarity, official": float(official_similarity.mean()),
        "similarity of the pair pushed apart, official": float(pushed_apart.mean()),
        "similarity, others": float(torch.stack(other_similarity).mean()),
        "others choose item 0": float(torch.stack(from_first).mean()),
    }


@contextmanager
def recorded() -> Iterator[list[tuple[float, Tensor]]]:
    """Record the timestep and image tokens of every guided block while the context is open."""
    from ...guidance import Guidance

    found: list[tuple[float, Tensor]] = []
    begin, apply = Guidance.begin_step, Guidance.apply
    now = [0.0]

    def beginning(self: Guidance, *args: Any, **kwargs: Any) -> bool:
        timestep = kwargs.get("timestep", args[0] if args else 0.0)
        now[0] = float(torch.as_tensor(timestep).reshape(-1)[0])
        return begin(self, *args, **kwargs)

    def applied(self: Guidance, image_tokens: Tensor, **kwargs: Any) -> Tensor:
        found.append((now[0], image_tokens.detach().clone()))
        return apply(self, image_tokens, **kwargs)

    Guidance.begin_step, Guidance.apply = beginning, applied  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Guidance.begin_step, Guidance.apply = begin, apply  # type: ignore[method-assign]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(result: dict[str, Any]) -> str:
    """Return Markdown: the comparison on tokens, and the measures of all conditions."""
    found = result["matching"]
    rows = [
        [name, *(f"{found[where][name]['mean']:.3f}" for where in PLACEMENTS)]
        for name in found[PLACEMENTS[0]]
    ]
    header = ["mean over blocks, steps and tokens", "attention output", "before its projection"]
    note = (
        f"Matching: unguided runs, {GROUPS} groups of {result['sizes']['group']} images for each "
        "of four prompts, all steps. Chance of the same token: 1 of 64."
    )
    return "\n\n".join(
        [markdown(header, rows), note, measures_table(result["conditions"]), origin(result)]
    )


def draw_figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Draw the comparison on tokens over timesteps, and the effect of each condition."""
    figure, grid = figures.panels(12, 4, 2)
    shares, similarities = grid[0]
    found = result["matching"]["output"]
    lines = {
        shares: {
            "same token as official": BLUE,
            "own position, paper": GREY,
            "own position, official": COLOURS[0],
            "others choose item 0": COLOURS[1],
        },
        similarities: {
            "similarity, paper": BLUE,
            "similarity, official": COLOURS[2],
            "similarity of the pair pushed apart, official": COLOURS[0],
            "similarity, others": COLOURS[1],
        },
    }
    for axes, names in lines.items():
        for name, colour in names.items():
            points = found[name]["by_timestep"]
            axes.plot(
                [float(t) for t in points], list(points.values()), "o-", color=colour,
                markersize=3.5, label=name,
            )  # fmt: skip
        axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=8)
    figures.tidy(shares, "Share of tokens", "timestep, from noise to image", "share")
    figures.tidy(similarities, "Cosine similarity", "timestep, from noise to image", "cosine")
    effect, grid = figures.panels(11, 4, 3)
    conditions = result["conditions"]
    for axes, measure, label in zip(
        grid[0],
        ("entropy", "cosine", "precision"),
        ("attribute entropy, nats", "pairwise cosine", "precision"),
        strict=True,
    ):
        rows = list(range(len(conditions)))
        values = [one["measures"][measure] for one in conditions]
        axes.barh(
            rows,
            [v[0] for v in values],
            xerr=figures.bar_ends(values),
            color=[GREY, *[BLUE] * (len(conditions) - 1)],
            error_kw={"elinewidth": 0.9},
        )
        axes.set_yticks(rows, [one["name"] for one in conditions] if measure == "entropy" else [])
        axes.invert_yaxis()
        figures.tidy(axes, label, "", "")
    return {"matching": figure, "effect": effect}


STUDY = Study(
    "conventions",
    "paper or authors' order, first or others, before or after the projection",
    256,
    run,
    table,
    draw_figures,
)
