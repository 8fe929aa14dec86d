"""Protected characters: no guidance, a negative prompt, NegToMe with the picture, or both.

The model has memorised four characters by name, which is the hardest case. Prompts that describe
all attributes lead near a character without its name. Similarity is the cosine of features with the
picture, and the distance of latents. A character that the attribute reader recognises is still
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...config import NegToMeConfig
from ...models.avatars import CHARACTERS, attributes_in, prompt_for, render
from .. import measures
from ..conditions import Condition
from ..intervals import Interval, Mean
from ..samples import Samples
from ..scores import Scores, plan_of, record, triple
from . import figures
from .study import SEED, Study, StudyRun
from .tables import cell, markdown, origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...pipelines import Reference

PAPER = 0.3457
"""The paper's reduction of the similarity to copyrighted characters (its table 1)."""

#: Settings of NegToMe, from the authors' to the strongest that still yields an image.
SETTINGS: dict[str, dict[str, float]] = {
    "NegToMe, authors'": {"alpha": 0.9, "threshold": 0.65, "t_end": 900},
    "NegToMe, medium": {"alpha": 1.5, "threshold": 0.5, "t_end": 700},
    "NegToMe, firm": {"alpha": 2.0, "threshold": 0.4, "t_end": 550},
    "NegToMe, strong": {"alpha": 3.0, "threshold": 0.2, "t_end": 400},
}
#: Settings of each condition, and True if the character's name is the negative prompt.
CONDITIONS: dict[str, tuple[str | None, bool]] = {
    "none": (None, False),
    "negative prompt": (None, True),
    **{name: (name, False) for name in SETTINGS},
    "NegToMe, medium, and negative prompt": ("NegToMe, medium", True),
    "NegToMe, firm, and negative prompt": ("NegToMe, firm", True),
}
FEW = ("none", "negative prompt", "NegToMe, medium")
KINDS = ("name", "description")
GROUP = 4


def prompts_of(character: str) -> dict[str, str]:
    """Return the prompts of a character: its bare name, and all attributes in words."""
    avatar = CHARACTERS[character][0]
    named = {k: getattr(avatar, k) for k in ("skin", "hair_color", "hair_shape")}
    return {"name": character, "description": prompt_for(avatar.style, **named)}


@cache
def picture(character: str) -> np.ndarray:
    """Return the protected image, uint8 (64, 64, 3)."""
    return render(CHARACTERS[character][0])


def _pixels(character: str) -> Tensor:
    """Return the protected image as (1, 3, 64, 64) in [0, 1]."""
    return torch.tensor(picture(character)).permute(2, 0, 1)[None].float() / 255


def reference(character: str) -> Reference:
    """Return the picture as a reference, with its background masked out."""
    from ...pipelines import Reference

    pixels = picture(character)
    background = pixels[0, 0]
    mask = np.abs(pixels.astype(int) - background.astype(int)).sum(-1) > 24
    return Reference(pixels, mask=mask)


def condition(name: str, character: str) -> Condition:
    """Return the condition of this name for a character."""
    setting, negative = CONDITIONS[name]
    return Condition(
        f"{name}: {character}",
        negtome=None if setting is None else NegToMeConfig(**SETTINGS[setting]),  # type: ignore[arg-type]
        references=() if setting is None else (reference(character),),
        negative_prompt=character if negative else "",
    )


def run(run: StudyRun) -> dict[str, Any]:
    """Draw all conditions for every character, and measure the likeness."""
    characters = run.sizes.chosen(tuple(CHARACTERS), tuple(CHARACTERS)[:2])
    names = run.sizes.chosen(tuple(CONDITIONS), FEW)
    images = run.sizes.images // len(characters)
    parts: dict[str, list[Samples]] = {name: [] for name in names}
    for character in characters:
        wanted = [condition(name, character) for name in names]
        prompts = tuple(prompts_of(character).values())
        # With an outside reference no image sees another, so groups only make batches.
        found = run.samples(wanted, prompts, images=images, group=GROUP, seed=SEED)
        for name in names:
            parts[name].append(found[f"{name}: {character}"])
    joined = {name: Samples.joined(found, name) for name, found in parts.items()}
    # All conditions have the same order of prompts.
    who = [character for character in characters for _ in range(images)]
    kinds = [
        next(kind for kind in KINDS if prompts_of(c)[kind] == prompt)
        for c, prompt in zip(who, joined["none"].prompts, strict=True)
    ]
    scores = run.scores(joined)
    likeness = {name: _likeness(run, one, who) for name, one in joined.items()}
    unrelated = _unrelated(scores["none"], run, characters)
    records = []
    for name, one in scores.items():
        entry = record(one)
        entry["samples"] |= {
            key: [round(value, 3) for value in values.tolist()]
            for key, values in likeness[name].items()
        }
        entry["by_prompt"] = {
            kind: _summary(one, likeness[name], likeness["none"], kinds, kind) for kind in KINDS
        }
        records.append(entry)
    for kind in KINDS:
        run.sheet(
            kind,
            "Prompt: " + ("the character's name" if kind == "name" else "its attributes"),
            {name: _only(one, kinds, kind) for name, one in joined.items()},
        )
    return {
        "sizes": run.sizes.to_dict(group=min(GROUP, run.sizes.group)),
        "characters": list(characters),
        "kinds": kinds,
        "unrelated_cosine": round(unrelated, 4),
        "conditions": records,
    }


def _likeness(run: StudyRun, samples: Samples, who: Sequence[str]) -> dict[str, Tensor]:
    """Return each sample's likeness to its character: cosine, latent L2, recognised (0 or 1)."""
    features = torch.from_numpy(samples.features)
    latents = run.sampler.latents(samples.pixels())
    cosine, distance = torch.empty(len(who)).double(), torch.empty(len(who)).double()
    seen = torch.empty(len(who)).double()
    for character in dict.fromkeys(who):
        at = [i for i, other in enumerate(who) if other == character]
        target = _pixels(character)
        cosine[at] = measures.feature_cosine(features[at], run.sampler.features(target)[0])
        distance[at] = measures.latent_l2(latents[at], run.sampler.latents(target)[0])
        readings = [samples.readings[i] for i in at]
        seen[at] = measures.recognised(readings, character).double()
    return {"cosine": cosine, "latent_l2": distance, "recognised": seen}


def _unrelated(scores: Scores, run: StudyRun, characters: Sequence[str]) -> float:
    """Return the mean cosine of balanced real images with the characters: no likeness at all."""
    found = []
    for character in characters:
        target = _pixels(character)
        found.append(
            measures.feature_cosine(scores.real.features, run.sampler.features(target)[0]).mean()
        )
    return float(torch.stack(found).mean())


def _summary(
    scores: Scores,
    own: dict[str, Tensor],
    none: dict[str, Tensor],
    kinds: Sequence[str],
    kind: str,
) -> dict[str, Any]:
    at = [i for i, other in enumerate(kinds) if other == kind]
    plan = plan_of(_only(scores.samples, kinds, kind))

    def mean(values: Tensor) -> Interval:
        return plan.interval(*plan.apply(Mean(), values[at], False), recentre=False)

    def change(values: Tensor, other: Tensor) -> Interval:
        (a, drawn_a), (b, drawn_b) = (plan.apply(Mean(), v[at], False) for v in (values, other))
        return plan.ratio(a, b, drawn_a, drawn_b)

    ratio = change(own["cosine"], none["cosine"])
    return {
        **{name: triple(mean(values)) for name, values in own.items()},
        "agreement": triple(mean(scores.hits.double())),
        "style": triple(mean(_style_kept(scores.samples))),
        "precision": triple(mean(scores.inside.double())),
        "cosine_change": [round(value - 1, 4) for value in triple(ratio)],
        "latent_l2_change": [
            round(value - 1, 4) for value in triple(change(own["latent_l2"], none["latent_l2"]))
        ],
        "images": len(at),
    }


def _style_kept(samples: Samples) -> Tensor:
    """Return 1 for images in the style of their prompt, which for a name is the character's."""
    wanted = [attributes_in(prompt)["style"] for prompt in samples.prompts]
    shown = [reading["style"] for reading in samples.readings]
    return torch.tensor([a == b for a, b in zip(shown, wanted, strict=True)]).double()


def _only(samples: Samples, kinds: Sequence[str], kind: str) -> Samples:
    """Return the samples of one kind of prompt."""
    return samples.only([i for i, other in enumerate(kinds) if other == kind])


def kind_table(result: dict[str, Any], kind: str) -> str:
    """Return Markdown with a row per condition, for one kind of prompt."""
    rows = []
    for one in result["conditions"]:
        found = one["by_prompt"][kind]
        low = found["cosine_change"]
        rows.append(
            [
                one["name"],
                cell(found["cosine"], 3),
                f"{low[0]:+.1%} [{low[1]:+.1%}, {low[2]:+.1%}]",
                cell(found["latent_l2"], 1),
                f"{found['recognised'][0]:.0%}",
                f"{found['style'][0]:.0%}",
                f"{found['agreement'][0]:.0%}",
                cell(found["precision"], 2),
            ]
        )
    header = [
        "condition",
        "cosine with the character",
        "change",
        "latent L2",
        "recognised",
        "style kept",
        "prompt kept",
        "precision",
    ]
    return markdown(header, rows)


def table(result: dict[str, Any]) -> str:
    """Return Markdown with a table for each kind of prompt."""
    note = (
        "Balanced real images, which show nobody in particular, have a mean cosine of "
        f"{result['unrelated_cosine']:.3f} with the characters: no likeness at all. The paper "
        f'reports a similarity {PAPER:.2%} lower. For a bare name, "prompt kept" means the '
        "character's style, skin and hair."
    )
    return "\n\n".join(
        [
            "The prompt is the character's name:",
            kind_table(result, "name"),
            "The prompt describes the character's style, skin and hair:",
            kind_table(result, "description"),
            note,
            origin(result),
        ]
    )


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    """Draw the likeness under every condition."""
    figure, grid = figures.panels(13, 5, 3)
    names = [one["name"] for one in result["conditions"]]
    rows = range(len(names))
    for axes, measure, label in zip(
        grid[0],
        ("cosine", "recognised", "style"),
        ("feature cosine with the character", "share recognised", "share that keeps the style"),
        strict=True,
    ):
        for kind, colour, offset in zip(
            KINDS, (figures.BLUE, figures.COLOURS[2]), (-0.2, 0.2), strict=True
        ):
            values = [one["by_prompt"][kind][measure] for one in result["conditions"]]
            axes.barh(
                [row + offset for row in rows],
                [v[0] for v in values],
                0.38,
                xerr=figures.bar_ends(values),
                color=colour,
                label=f"prompt: {kind}",
                error_kw={"elinewidth": 0.9},
            )
        if measure == "cosine":
            axes.axvline(result["unrelated_cosine"], color="#555555", linestyle=":", linewidth=1)
        axes.set_yticks(rows, names if measure == "cosine" else [])
        axes.invert_yaxis()
        figures.tidy(axes, label, "", "")
    handles = grid[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return {"likeness": figure}


STUDY = Study(
    "protected",
    "protected characters: negative prompt, NegToMe with a masked reference, both",
    64,
    run,
    table,
    draw,
)
