"""`python docs/make_variants.py`: other forms of the push than the paper's, and what they bring.

The forms are prototypes in plain torch, put in the operator's place while the embedded model draws
a condition; they are no part of the package. Writes docs/variants.json and the tables of
docs/beyond.md. Half an hour on one free core; goes on where it was interrupted. With
--check nothing is drawn: exits with 1 where the page's tables are not those of the file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
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

DOCS = Path(__file__).resolve().parent
PAGE, FILE = DOCS / "beyond.md", DOCS / "variants.json"

IMAGES = 256
SCALE = 1.5
WINDOW = 750.0
THRESHOLD = 0.65


@dataclass(frozen=True)
class Variant:
    """A form of the push, for groups of a batch in mode "others", as a baseline of the studies.

        y = x + alpha w (x - r)   where cos(x, r) > threshold;   r the match, w = 1

    Attributes:
        distance: the match is the nearest token, not that of the highest cosine.
        centred: cosines are between tokens less the mean token of their group.
        best: r is the mean of so many best matches.
        temperature: r is the mean of the `best`, weighted by softmax(cosine / temperature).
        excess: w = (cos - threshold) / (1 - threshold), so that nothing jumps at the threshold.
        decay: w falls linearly over the window, to 0 at its end.
        preserve: y is brought to the length of x.
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
        """Puts `push` in the operator's place."""
        from negtome_fast import guidance

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
        """Tokens (B, N, D) pushed, and similarity and match (B, 1, N), -1 where nothing moved."""
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
    """A row of the table: a prototype at the strength that brings about the push of alpha 0.9."""

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
"""Guidance scale and alpha of the operator, whose frontier the forms are compared with."""

COLUMNS = {
    "entropy": "attribute entropy, nats",
    "cosine": "pairwise cosine",
    "precision": "precision",
    "precision_decoded": "precision, real after the VAE",
    "frechet": "Frechet distance",
    "agreement": "prompt kept",
}

NAMED_SEED = 4242
"""Of the people whose attributes are all named in the prompt."""


def conditions() -> dict[str, Any]:
    """The operator without and with guidance, and the forms, by name."""
    from negtome_fast import NegToMeConfig
    from negtome_fast.studies.conditions import Condition

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
    """Every image a person of its own, balanced, with all attributes in the prompt."""
    from negtome_fast.models.avatars import STYLES, prompt_for, sample_avatars
    from negtome_fast.studies.conditions import Group

    people = [a for a in sample_avatars(8 * images, NAMED_SEED, "balanced") if not a.character]
    each = {
        style: [a for a in people if a.style == style][: images // len(STYLES)] for style in STYLES
    }
    return [
        Group(prompt_for(a.style, a.skin, a.hair_color, a.hair_shape), (number,))
        for number, a in enumerate(a for row in zip(*each.values(), strict=True) for a in row)
    ]


def by_rarity(scores: Any) -> list[list[int]]:
    """[images, of them inside the real manifold] by how many of the three values are uncommon.

    Uncommon: not the value that 80% of the style's training images have.
    """
    from negtome_fast.models.avatars import OPEN_ATTRIBUTES, STYLES

    counts = [[0, 0] for _ in range(len(OPEN_ATTRIBUTES) + 1)]
    for reading, inside in zip(scores.samples.readings, scores.inside.tolist(), strict=True):
        common = STYLES[reading["style"]].majority
        row = counts[sum(reading[name] != common[name] for name in OPEN_ATTRIBUTES)]
        row[0] += 1
        row[1] += bool(inside)
    return counts


def compared(scores: Any, operator: Sequence[Any]) -> list[float]:
    """Entropy less that of the operator's frontier at the same precision: [estimate, interval]."""
    from negtome_fast.studies.frontier import at
    from negtome_fast.studies.scores import drawn, plan_of, triple

    plan = plan_of(scores.samples)
    (level, levels), (own, own_drawn) = (drawn(scores, m, plan) for m in ("precision", "entropy"))
    points = [[drawn(one, m, plan) for m in ("precision", "entropy")] for one in operator]
    (quality, found), (qualities, founds) = (
        [np.stack([np.asarray(point[m][part]) for point in points]) for m in (0, 1)]
        for part in (0, 1)
    )
    value = float(at(quality[:, None], found[:, None], np.array([level]))[0])
    values = at(qualities, founds, levels)
    # Where no point of the operator reaches the precision, its best one stands in.
    values = np.where(np.isfinite(values), values, founds[qualities.argmax(0), range(len(levels))])
    return triple(plan.interval(own - value, own_drawn - values, no_change=0.0))


def measure(images: int, store: Path) -> dict[str, Any]:
    """Draws everything that the store does not have."""
    from negtome_fast import provenance
    from negtome_fast.models.avatars import STYLES, prompt_for
    from negtome_fast.studies.conditions import Condition
    from negtome_fast.studies.measures import prompt_hits
    from negtome_fast.studies.sampler import Sampler
    from negtome_fast.studies.scores import record
    from negtome_fast.studies.studies.study import SCHEMA, Sizes, StudyRun

    run = StudyRun(Sampler(store), Sizes(images), DOCS)
    samples = run.samples(list(conditions().values()))
    named = run.drawn([Condition("all attributes named, scale 2.5")], named_groups(images))
    kept = 0.0
    for name, one in named.items():
        kept = float(prompt_hits(one.readings, one.prompts).double().mean())
        # Their prompts are many; what is averaged over is the style, as elsewhere.
        order = sorted(range(images), key=lambda i: i % len(STYLES))
        styles = tuple(prompt_for(list(STYLES)[i % len(STYLES)]) for i in order)
        fields = ("images", "features", "indices", "seconds")
        samples[name] = replace(
            one,
            **{field: getattr(one, field)[order] for field in fields},
            seeds=tuple(one.seeds[i] for i in order),
            prompts=styles,
            groups=np.arange(images),
        )
    scores = run.scores(samples)
    operator = [one for name, one in scores.items() if name.startswith(("unguided", "operator"))]
    return {
        "schema": SCHEMA,
        "command": f"python docs/make_variants.py --samples {images}",
        "sizes": {"images": images, "group": run.sizes.group, "steps": run.sizes.steps}
        | {"real": run.sizes.real},
        **provenance.describe(),
        "conditions": [record(one) for one in scores.values()],
        "at_matched_precision": {
            form.label: compared(scores[form.label], operator) for form in FORMS
        },
        "named_attributes_shown": round(kept, 4),
        "by_rarity": {name: by_rarity(one) for name, one in scores.items()},
    }


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(one: dict[str, Any], measure: str) -> str:
    from negtome_fast.studies.studies.tables import measure_cell

    return measure_cell(one, measure)


def signed(found: Sequence[float]) -> str:
    return f"{found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]"


def tables(result: dict[str, Any]) -> dict[str, str]:
    """The tables of the page by their name."""
    by_name = {one["name"]: one for one in result["conditions"]}
    gained, sizes = result["at_matched_precision"], result["sizes"]
    forms = [
        [label, *(cell(by_name[label], m) for m in ("entropy", "precision")), signed(found)]
        for label, found in gained.items()
    ]
    operator = [
        [name, *(cell(one, measure) for measure in COLUMNS)]
        for name, one in by_name.items()
        if name not in gained
    ]
    origin = (
        f"{sizes['images']} images a condition, groups of {sizes['group']}, {sizes['steps']} "
        f"steps, {sizes['real']} real images; 95% intervals in brackets. "
        f"{result['date'][:10]}, torch {result['versions']['torch']}. "
        f"Made by `{result['command']}`."
    )
    note = (
        f"Where all attributes are named, {result['named_attributes_shown']:.0%} of the images "
        "show them all; the last column asks for the style only."
    )
    shares = [
        [name, *(f"{inside} of {count}" if count else "-" for count, inside in counts)]
        for name, counts in result["by_rarity"].items()
        if name not in gained
    ]
    compared_by = ["attribute entropy, nats", "precision", "entropy less the operator's"]
    return {
        "forms": markdown(["form", *compared_by], forms) + "\n\n" + origin,
        "operator": markdown(["condition", *COLUMNS.values()], operator) + "\n\n" + note,
        "rarity": markdown(["inside the real manifold", "common", "1", "2", "3 uncommon"], shares),
    }


def page(text: str, result: dict[str, Any]) -> str:
    """The page with the tables of `result` between its marks."""
    for name, table in tables(result).items():
        mark = rf"(?<=<!-- begin: {name} -->\n).*?(?=\n<!-- end: {name} -->)"
        text, found = re.subn(mark, lambda _, t=table: t, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{PAGE.name} has no place for the table {name!r}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=IMAGES, help="images of a condition")
    parser.add_argument("--store", type=Path, help="folder of drawn images, as of the studies")
    parser.add_argument("--check", action="store_true", help="compare the page with the file only")
    options = parser.parse_args(argv)
    if not options.check:
        from negtome_fast.studies.store import STORE
        from negtome_fast.studies.studies.study import save

        save(FILE, measure(options.samples, options.store or STORE))
    result = json.loads(FILE.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    wanted = page(text, result)
    if options.check:
        return int(text != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
