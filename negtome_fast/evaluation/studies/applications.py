"""The other uses of a reference: excluding a style, sharpening, interpolation and extrapolation.

Each has its own measure. References are rendered avatars; a positive alpha goes away from them, a
negative one toward them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...config import NegToMeConfig
from ...generate import APPLICATIONS
from ...models.avatars import STYLES, Avatar, render
from .. import metrics
from ..bootstrap import Mean
from ..sampling import Condition, Samples
from ..scores import Scores, plan_of, record, triple
from . import figures
from .figures import BLUE, COLOURS, GREY
from .study import PROMPTS, SEED, Run, Study
from .tables import cell, markdown, origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = "voxel art"
STYLE_PROMPTS = ("a person with red hair", "a person with dark skin")
"""They name no style, so the model chooses one."""

TARGET = Avatar("pixel art", "dark", "blue", "long", "target")
ALPHAS = (-0.9, -0.5, 0.0, 0.5, 0.9)
GROUP = 4
BLUR = 2.0
"""Pixels, of 64."""


def settings(name: str, **overrides: Any) -> NegToMeConfig:
    """Those of `negtome-fast generate --preset NAME` on the embedded model."""
    application = APPLICATIONS[name]
    return NegToMeConfig(**{**application.guidance, **application.embedded, **overrides})


def reference(avatar: Avatar, blur: float = 0.0) -> Any:
    from PIL import Image, ImageFilter

    from ...pipelines import Reference

    picture = Image.fromarray(render(avatar))
    return Reference(picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture)


def style_avatar(style: str) -> Avatar:
    """Of a style, with attributes that are no style's majority."""
    return Avatar(style, "bronze", "red", "bun", "reference")


def contrast(images: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels of (N, 3, H, W), in 256ths of the full scale; (N,)."""
    grey = images.mean(dim=1).double() * 255
    steps = [grey.diff(dim=axis).abs().flatten(1).mean(1) for axis in (1, 2)]
    return (steps[0] + steps[1]) / 2


@dataclass(frozen=True)
class Figures:
    """What is measured of one condition of an application: a number a sample each."""

    values: dict[str, Tensor]

    def summary(self, scores: Scores) -> dict[str, list[float]]:
        plan = plan_of(scores.samples)
        return {
            name: triple(plan.interval(*plan.apply(Mean(), values, False)))
            for name, values in self.values.items()
        }


def run(run: Run) -> dict[str, Any]:
    return {
        "sizes": run.sizes.to_dict(group=min(GROUP, run.sizes.group)),
        "style": style(run),
        "sharpen": sharpen(run),
        "interpolate": interpolate(run),
    }


def _records(run: Run, found: dict[str, Samples], measured: Any) -> list[dict[str, Any]]:
    scores = run.scores(found)
    records = []
    for one in scores.values():
        figures_of = Figures({**measured(one), "precision": one.inside.double()})
        entry = record(one)
        entry["measured"] = figures_of.summary(one)
        records.append(entry)
    return records


def style(run: Run) -> list[dict[str, Any]]:
    """Away from the picture of a style that the prompt does not name: the share that shows it."""
    away = (reference(style_avatar(STYLE)),)
    weak = {"alpha": 0.9, "t_end": 900}
    conditions = [
        Condition("none"),
        Condition("authors' settings", negtome=settings("style", **weak), references=away),
        Condition("preset", negtome=settings("style"), references=away),
        Condition("negative prompt", negative_prompt=f"a {STYLE} person"),
    ]
    found = run.samples(
        run.sizes.chosen(conditions, conditions[::2]), STYLE_PROMPTS, group=GROUP, seed=SEED
    )
    run.sheet("style", f"Away from {STYLE}", found, each=8)

    def measured(one: Scores) -> dict[str, Tensor]:
        shown = [reading["style"] == STYLE for reading in one.samples.readings]
        return {
            "style shown": torch.tensor(shown).double(),
            "prompt kept": one.hits.double(),
        }

    return _records(run, found, measured)


def sharpen(run: Run) -> list[dict[str, Any]]:
    """Away from a blurred picture of the same style: contrast, and whether quality gains."""
    alphas = run.sizes.chosen((0.0, 0.3, 0.9), (0.0, 0.9))
    parts: dict[str, list[Samples]] = {f"alpha {alpha:g}": [] for alpha in alphas}
    images = run.sizes.images // len(PROMPTS)
    for prompt in PROMPTS:
        own = prompt.split(" ", 1)[1].removesuffix(" person")
        blurred = (reference(style_avatar(own), BLUR),)
        wanted = [
            Condition(
                f"alpha {alpha:g}", negtome=settings("sharpen", alpha=alpha), references=blurred
            )
            for alpha in alphas
        ]
        for name, samples in run.samples(
            wanted, (prompt,), images=images, group=GROUP, seed=SEED
        ).items():
            parts[name].append(samples)
    found = {name: Samples.joined(part, name) for name, part in parts.items()}
    run.sheet("sharpen", "Away from a blurred picture", found)
    return _records(run, found, lambda one: {"contrast": contrast(one.samples.pixels())})


def interpolate(run: Run) -> list[dict[str, Any]]:
    """Toward a picture and away from it: likeness, and whether the skin is still the usual one."""
    alphas = run.sizes.chosen(ALPHAS, ALPHAS[::2])
    picture = (reference(TARGET),)
    wanted = [
        Condition(
            f"alpha {alpha:g}", negtome=settings("interpolate", alpha=alpha), references=picture
        )
        for alpha in alphas
    ]
    images = max(run.sizes.images // 2, 2 * GROUP)
    found = run.samples(wanted, PROMPTS[:1], images=images, group=GROUP, seed=SEED)
    run.sheet("interpolate", "Toward a picture (negative alpha) and away from it", found, each=12)
    pixels = torch.tensor(render(TARGET)).permute(2, 0, 1)[None].float() / 255
    target, latent = run.lab.features(pixels)[0], run.lab.latents(pixels)[0]
    usual = STYLES[TARGET.style].majority["skin"]

    def measured(one: Scores) -> dict[str, Tensor]:
        return {
            "cosine": metrics.feature_cosine(one.features, target),
            "latent L2": metrics.latent_l2(run.lab.latents(one.samples.pixels()), latent),
            f"skin not {usual}": torch.tensor(
                [reading["skin"] != usual for reading in one.samples.readings]
            ).double(),
        }

    return _records(run, found, measured)


TITLES = {
    "style": f"Excluding {STYLE}, prompts without a style",
    "sharpen": f"A picture blurred by {BLUR:g} pixels as the reference",
    "interpolate": f"Toward (alpha < 0) or away from {TARGET.hair_color} hair, {TARGET.skin} skin",
}


def table(result: dict[str, Any]) -> str:
    parts = []
    for name, title in TITLES.items():
        records = result[name]
        columns = list(records[0]["measured"])
        rows = [
            [one["name"], *(cell(one["measured"][column], 3) for column in columns)]
            for one in records
        ]
        count = f"{title}; {records[0]['images']} images a condition:"
        parts.append(f"{count}\n\n{markdown(['condition', *columns], rows)}")
    return "\n\n".join([*parts, origin(result)])


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    figure, grid = figures.panels(13, 4.2, 3)
    style_axes, sharpen_axes, alpha_axes = grid[0]
    for axes, name, measure in (
        (style_axes, "style", "style shown"),
        (sharpen_axes, "sharpen", "contrast"),
    ):
        records = result[name]
        values = [one["measured"][measure] for one in records]
        axes.bar(
            range(len(records)),
            [v[0] for v in values],
            yerr=figures.bar_ends(values),
            color=[GREY, *[BLUE] * (len(records) - 1)],
            error_kw={"elinewidth": 0.9},
        )
        axes.set_xticks(range(len(records)), [one["name"].replace(" ", "\n") for one in records])
    figures.tidy(style_axes, f"Share drawn as {STYLE}", "", "")
    figures.tidy(sharpen_axes, "Contrast of neighbouring pixels, /256", "", "")
    records = result["interpolate"]
    at = [float(one["name"].split()[1]) for one in records]
    shown = [name for name in records[0]["measured"] if name != "latent L2"]
    for measure, colour in zip(shown, (BLUE, COLOURS[0], GREY), strict=True):
        values = [one["measured"][measure] for one in records]
        alpha_axes.plot(at, [v[0] for v in values], "o-", color=colour, label=measure)
        alpha_axes.fill_between(
            at, [v[1] for v in values], [v[2] for v in values], color=colour, alpha=0.15
        )
    figures.tidy(alpha_axes, "Toward and away from a picture", "alpha", "")
    alpha_axes.legend(frameon=False, fontsize=8)
    return {"measures": figure}


STUDY = Study(
    "applications",
    "style exclusion, a blurred reference, interpolation and extrapolation",
    32,
    run,
    table,
    draw,
)
