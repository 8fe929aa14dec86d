"""Excluding a style by its picture, by its name as a negative prompt, or by both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ....models.avatars import STYLES, prompt_for
from ...conditions import Condition
from ...samples import Samples
from ...scores import Scores, record
from ..study import SEED, StudyRun
from .common import GROUP, UNGUIDED, Values, measured, picture, settings, shown, unguided

#: Prompts that name no style, chosen among sixteen so that the unguided model draws every style.
STYLELESS = (
    "a person with red hair",
    "a person with dark skin",
    "a person with fair skin",
    "a person with long blond hair and fair skin",
)
_SIMPLE_WAYS = ("NegToMe", "negative prompt")
"""The two ways that are compared with each other and shown on the sheet."""


def exclusions(style: str) -> dict[str, Condition]:
    """Return the ways to keep a style away: from its picture, from its name, from both."""
    from ....pipelines import Reference

    away = (Reference(picture(style)),)
    weak = settings("style", alpha=0.9, t_end=900)
    named = prompt_for(style)
    return {
        "NegToMe": Condition("preset", negtome=settings("style"), references=away),
        "NegToMe, authors' settings": Condition("weak", negtome=weak, references=away),
        "negative prompt": Condition("named", negative_prompt=named),
        "NegToMe and negative prompt": Condition(
            "both", negtome=settings("style"), references=away, negative_prompt=named
        ),
    }


def run_style(run: StudyRun) -> dict[str, Any]:
    """Exclude each style in turn from prompts that name none, and count the images that show it."""
    styles = run.sizes.chosen(tuple(STYLES), tuple(STYLES)[1:2])
    base = unguided(run, STYLELESS)
    drawn = _drawn(run, styles)
    scores = run.scores({UNGUIDED: base} | {"/".join(key): one for key, one in drawn.items()})
    ways = list(exclusions(styles[0]))

    def mean(of: Callable[[str], Scores]) -> Values:
        """Average over styles, image by image: the styles share their prompts and seeds."""
        found = [_values(of(excluded), excluded) for excluded in styles]
        return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}

    none = mean(lambda _: scores[UNGUIDED])
    means = {
        way: mean(lambda excluded, way=way: scores[f"{way}/{excluded}"])  # type: ignore[misc]
        for way in ways
    }
    negtome, negative = (means[way] for way in _SIMPLE_WAYS)
    less = measured(negtome, negative, base)
    _sheet(run, styles, base, drawn)
    return {
        "unguided": record(scores[UNGUIDED]),
        "styles": _rows(scores, styles, ways),
        "mean": [
            {"name": UNGUIDED, **measured(none, None, base)},
            *({"name": way, **measured(own, none, base)} for way, own in means.items()),
        ],
        "NegToMe less negative prompt": less["differences"],
    }


def _drawn(run: StudyRun, styles: Sequence[str]) -> dict[tuple[str, str], Samples]:
    """Draw every way to exclude every style, by (way, style)."""
    drawn: dict[tuple[str, str], Samples] = {}
    for excluded in styles:
        wanted = {
            way: replace(condition, name=f"{way}: {excluded}")
            for way, condition in exclusions(excluded).items()
        }
        found = run.samples(list(wanted.values()), STYLELESS, group=GROUP, seed=SEED)
        drawn |= {(way, excluded): found[condition.name] for way, condition in wanted.items()}
    return drawn


def _values(one: Scores, excluded: str) -> Values:
    return {
        "style shown": shown(one.samples, "style", [excluded] * len(one.samples)),
        "prompt kept": one.hits.double(),
        "precision": one.inside.double(),
    }


def _rows(
    scores: Mapping[str, Scores], styles: Sequence[str], ways: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a record per style and way, each compared with unguided images."""
    base, rows = scores[UNGUIDED], []
    for excluded in styles:
        before = _values(base, excluded)
        rows.append({"name": UNGUIDED, "style": excluded, **measured(before, None, base.samples)})
        for way in ways:
            one = scores[f"{way}/{excluded}"]
            own = measured(_values(one, excluded), before, base.samples)
            rows.append({**record(one, base), "name": way, "style": excluded, **own})
    return rows


def _sheet(
    run: StudyRun,
    styles: Sequence[str],
    base: Samples,
    drawn: Mapping[tuple[str, str], Samples],
) -> None:
    run.sheet(
        "style",
        "No style is named, and one is not wanted",
        {UNGUIDED: base}
        | {
            f"{way}, without {excluded}": drawn[way, excluded]
            for excluded in styles
            for way in _SIMPLE_WAYS
        },
    )
