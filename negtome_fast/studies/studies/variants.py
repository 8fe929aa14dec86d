"""`python -m negtome_fast.studies.studies.variants`: other forms of the push than the paper's.

The forms are prototypes in plain torch, which take the operator's place while the embedded model
draws a condition. The result is docs/beyond.md. It takes half an hour on one free core. Images are
kept, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ... import guidance, provenance
from ...config import NegToMeConfig
from ...models.avatars import OPEN_ATTRIBUTES, STYLES, prompt_for, sample_avatars
from ..conditions import Condition, Group
from ..frontier import at
from ..measures import prompt_hits
from ..sampler import Sampler
from ..samples import Samples
from ..scores import drawn, plan_of, record, triple
from ..store import STORE
from .study import SCHEMA, Sizes, StudyRun, save

IMAGES = 256
SCALE = 1.5
WINDOW = 750.0
THRESHOLD = 0.65


@dataclass(frozen=True)
class Variant:
    """A form of the push in mode "others", as a baseline of the studies.

        y = x + alpha w (x - r)   where cos(x, r) > threshold;   r the match, w = 1

    Attributes:
        distance: the match is the nearest token, not the one with the highest cosine.
        centred: cosines are between tokens less the mean token of their group.
        best: number of matches whose mean is r.
        temperature: r is the mean of the `best`, weighted by softmax(cosine / temperature).
        excess: w = (cos - threshold) / (1 - threshold), so that nothing jumps at the threshold.
        decay: w falls linearly over the window, to 0 at its end.
        preserve: y is scaled to the length of x.
    """

    name: ClassVar[str] = "variant of the push"
    distance: bool = False
    centred: bool = False
    best: int = 1
    temperature: float = 0.0
    excess: bool = False
    decay: bool = False
    preserve: bool = False

    @contextmanager
    def applied(self, pipe: Any, *, prompts: int, images_per_prompt: int) -> Iterator[dict]:
        """Put `push` in the operator's place."""
        timestep = 1000.0

        def before(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal timestep
            timestep = 1000 * float(kwargs["timestep"].flatten()[0])

        def guide_tokens(x: Tensor, reference: Any, **settings: Any) -> tuple[Tensor, ...]:
            alpha = float(settings["alpha"])
            if self.decay:
                alpha *= (timestep - WINDOW) / (1000 - WINDOW)
            return self.push(x, alpha, float(settings["threshold"]), settings["groups"])

        hook = pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with patch.object(guidance, "guide_tokens", guide_tokens):
                yield {}
        finally:
            hook.remove()

    def push(
        self, x: Tensor, alpha: float, threshold: float, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Push tokens (B, N, D); return them, and similarity and match (B, 1, N), -1 if unmoved."""
        items, count, channels = x.shape
        size = items // groups
        tokens = x.float().reshape(groups, size * count, channels)
        compared = tokens - tokens.mean(1, keepdim=True) if self.centred else tokens
        unit = F.normalize(compared, dim=-1)
        item = torch.arange(size * count) // count
        own = item[:, None] == item[None]
        cosine = (unit @ unit.mT).masked_fill(own, -math.inf)
        score = cosine
        if self.distance:
            squares = compared.square().sum(-1)
            score = (2 * compared @ compared.mT - squares[:, None]).masked_fill(own, -math.inf)

        index = score.topk(self.best, dim=-1).indices
        found = cosine.gather(-1, index)
        weight = torch.full_like(found, 1 / self.best)
        if self.temperature:
            weight = (found / self.temperature).softmax(-1)
        similarity = found[..., 0]
        chosen = tokens.gather(1, index.reshape(groups, -1, 1).expand(-1, -1, channels))
        matched = (weight[..., None] * chosen.view(*index.shape, channels)).sum(-2)

        strength = torch.full_like(similarity, alpha)
        if self.excess:
            strength = strength * (similarity - threshold) / (1 - threshold)
        away = tokens - matched
        length = tokens.norm(dim=-1, keepdim=True)
        pushed = tokens + strength[..., None] * away
        if self.preserve:
            pushed = pushed * length / pushed.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        moved = similarity > threshold
        y = torch.where(moved[..., None], pushed, tokens)
        shape = (items, 1, count)
        at = torch.where(moved, index[..., 0], -1)
        return y.view_as(x).to(x.dtype), similarity.view(shape), at.view(shape)


@dataclass(frozen=True)
class Form:
    """A row of the table: a prototype at a strength like that of the operator at alpha 0.9."""

    label: str
    variant: Variant
    alpha: float = 0.9
    threshold: float = THRESHOLD


FORMS = (
    Form("length of the token preserved", Variant(preserve=True)),
    Form("strength by the excess over the threshold", Variant(excess=True), alpha=1.8),
    Form("nearest by distance", Variant(distance=True)),
    Form("excess, nearest by distance", Variant(excess=True, distance=True), alpha=1.8),
    Form("alpha falls to 0 over the window", Variant(decay=True)),
    Form("centred cosine", Variant(centred=True), threshold=0.5),
    Form("mean of the 16 best", Variant(best=16)),
    Form("softmax over the 64 best", Variant(best=64, temperature=0.05)),
)
OPERATOR = ((SCALE, 0.3), (SCALE, 0.5), (SCALE, 0.9), (SCALE, 2.0), (2.5, 0.5), (2.5, 0.9))
"""Guidance scale and alpha of the operator on the frontier that forms are compared with."""

NAMED_SEED = 4242
"""Seed of the people whose attributes are all named in the prompt."""


def conditions() -> dict[str, Any]:
    """Images without guidance, the operator, and the forms, by name."""

    def guided(name: str, scale: float, alpha: float, **more: Any) -> Any:
        threshold = more.pop("threshold", THRESHOLD)
        config = NegToMeConfig(alpha=alpha, threshold=threshold, t_end=WINDOW, reference="others")
        return Condition(name, guidance_scale=scale, negtome=config, **more)

    found = [Condition(f"unguided, scale {s:g}", guidance_scale=s) for s in (2.5, SCALE)]
    found += [guided(f"operator, scale {s:g}, alpha {a:g}", s, a) for s, a in OPERATOR]
    found += [
        guided(form.label, SCALE, form.alpha, threshold=form.threshold, baseline=form.variant)
        for form in FORMS
    ]
    return {condition.name: condition for condition in found}


def named_groups(images: int) -> list[Any]:
    """A group for each image: balanced people with all attributes in the prompt."""
    people = [a for a in sample_avatars(8 * images, NAMED_SEED, "balanced") if not a.character]
    each = {
        style: [a for a in people if a.style == style][: images // len(STYLES)] for style in STYLES
    }
    return [
        Group(prompt_for(a.style, a.skin, a.hair_color, a.hair_shape), (number,))
        for number, a in enumerate(a for row in zip(*each.values(), strict=True) for a in row)
    ]


def by_rarity(scores: Any) -> list[list[int]]:
    """[images, images inside the real manifold] by the number of uncommon values of three.

    A value is common if 80% of the style's training images have it.
    """
    counts = [[0, 0] for _ in range(len(OPEN_ATTRIBUTES) + 1)]
    for reading, inside in zip(scores.samples.readings, scores.inside.tolist(), strict=True):
        common = STYLES[reading["style"]].majority
        row = counts[sum(reading[name] != common[name] for name in OPEN_ATTRIBUTES)]
        row[0] += 1
        row[1] += bool(inside)
    return counts


def compared(scores: Any, operator: Sequence[Any]) -> list[float]:
    """Entropy less that of the operator's frontier at the same precision, with its interval."""
    plan = plan_of(scores.samples)
    (level, levels), (own, own_drawn) = (drawn(scores, m, plan) for m in ("precision", "entropy"))
    points = [[drawn(one, m, plan) for m in ("precision", "entropy")] for one in operator]
    (quality, found), (qualities, founds) = (
        [np.stack([np.asarray(point[m][part]) for point in points]) for m in (0, 1)]
        for part in (0, 1)
    )
    value = float(at(quality[:, None], found[:, None], np.array([level]))[0])
    values = at(qualities, founds, levels)
    # If no point of the operator reaches the precision, its best one stands in.
    values = np.where(np.isfinite(values), values, founds[qualities.argmax(0), range(len(levels))])
    return triple(plan.interval(own - value, own_drawn - values, no_change=0.0))


def with_named_attributes(run: StudyRun) -> tuple[Samples, float]:
    """People whose prompt names all attributes, and the share of images that show them all."""
    images = run.sizes.images
    condition = Condition("all attributes named, scale 2.5")
    one = run.drawn([condition], named_groups(images))[condition.name]
    shown = float(prompt_hits(one.readings, one.prompts).double().mean())
    # Each has a prompt of its own; averages are over styles, as for the other conditions.
    order = sorted(range(images), key=lambda i: i % len(STYLES))
    styles = tuple(prompt_for(list(STYLES)[i % len(STYLES)]) for i in order)
    fields = ("images", "features", "indices", "seconds")
    reordered = {name: getattr(one, name)[order] for name in fields}
    seeds = tuple(one.seeds[i] for i in order)
    return (
        replace(one, **reordered, seeds=seeds, prompts=styles, groups=np.arange(images)),
        shown,
    )


def measure(images: int, store: Path) -> dict[str, Any]:
    """Draw what `store` does not have yet, and measure all conditions."""
    run = StudyRun(Sampler(store), Sizes(images), store)
    samples = run.samples(list(conditions().values()))
    named, shown = with_named_attributes(run)
    scores = run.scores({**samples, named.condition.name: named})
    operator = [one for name, one in scores.items() if name.startswith(("unguided", "operator"))]
    return {
        "schema": SCHEMA,
        "command": f"python -m negtome_fast.studies.studies.variants --samples {images}",
        "sizes": {"images": images, "group": run.sizes.group, "steps": run.sizes.steps}
        | {"real": run.sizes.real},
        **provenance.describe(),
        "conditions": [record(one) for one in scores.values()],
        "at_matched_precision": {
            form.label: compared(scores[form.label], operator) for form in FORMS
        },
        "named_attributes_shown": round(shown, 4),
        "by_rarity": {name: by_rarity(one) for name, one in scores.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the file, and return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m negtome_fast.studies.studies.variants", description=__doc__
    )
    parser.add_argument("--samples", type=int, default=IMAGES, help="images of a condition")
    parser.add_argument("--store", type=Path, default=STORE, help="folder of drawn images")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("output/evaluation/variants.json"),
        help="JSON file to write; default: %(default)s",
    )
    options = parser.parse_args(argv)
    save(options.out, measure(options.samples, options.store))
    return 0


if __name__ == "__main__":
    sys.exit(main())
