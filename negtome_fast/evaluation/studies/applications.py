"""What a reference does: a style is excluded, blur is avoided, an image is approached or left.

The settings are those of `negtome-fast generate --preset`. References are images of the model
itself, from seeds of their own; the images of a condition do not see each other, so that each is an
independent sample. Every measure is compared with no guidance, on the same prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...config import NegToMeConfig
from ...generate import APPLICATIONS, Settings
from ...models.avatars import HAIR_COLORS, STYLES, prompt_for
from ..bootstrap import Mean, bootstrap, paired_bootstrap
from ..metrics import feature_cosine, prompt_hits
from ..sampling import Condition, Group, Samples, groups_of
from ..scores import triple
from . import figures
from .figures import BLUE, GREY
from .study import PROMPTS, SEED, Run, Study
from .tables import cell, markdown, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from ...pipelines import Reference

REFERENCE_SEED = 10_000
CANDIDATES = 8
"""Images of which the first that shows what its prompt names becomes the reference."""

ALPHAS = (-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9)
FEW_ALPHAS = (-0.6, 0.0, 0.6)

#: No style is named: the model chooses one. Of the reference, rare values of the open attributes.
STYLELESS = tuple(f"a person with {colour} hair" for colour in tuple(HAIR_COLORS)[:4])
SHOWN = {"skin": "bronze", "hair_color": "blue", "hair_shape": "bun"}

SHARPEN_SCALES = (1.0, 2.5)

Values = Callable[[Samples], Tensor]
"""A figure of each image, (N,)."""


def settings(preset: str, **overrides: Any) -> NegToMeConfig:
    """The embedded model's settings of an application of `negtome-fast generate`."""
    application = APPLICATIONS[preset]
    return NegToMeConfig(**{**application.guidance, **application.embedded, **overrides})


# Measures


def shares(head: str, value: str) -> Values:
    """1 where the reader sees this value."""
    return lambda samples: torch.tensor([r[head] == value for r in samples.readings]).double()


def likeness(attributes: Mapping[str, str]) -> Values:
    """Share of these attributes that the reader sees in an image."""

    def values(samples: Samples) -> Tensor:
        shown = [[r[n] == v for n, v in attributes.items()] for r in samples.readings]
        return torch.tensor(shown).double().mean(dim=1)

    return values


def contrast(images: np.ndarray) -> Tensor:
    """Mean absolute difference of neighbouring grey pixels of uint8 `(N, 3, H, W)`, in 256ths."""
    grey = torch.from_numpy(images).double().mean(dim=1)
    across, down = grey.diff(dim=2).abs().mean(dim=(1, 2)), grey.diff(dim=1).abs().mean(dim=(1, 2))
    return (across + down) / 2


def inside(run: Run) -> Values:
    """1 where an image lies in the manifold of balanced real images."""

    def values(samples: Samples) -> Tensor:
        return run.scores({"": samples})[""].inside.double()

    return values


def kept(samples: Samples) -> Tensor:
    """1 where an image shows all that its prompt names."""
    return prompt_hits(samples.readings, samples.prompts).double()


def compared(
    samples: Samples, base: Samples, measures: Mapping[str, Values]
) -> dict[str, dict[str, Any]]:
    """Each measure of a condition with its interval, and the change to `base`, paired by seed."""
    found: dict[str, dict[str, Any]] = {}
    for name, values in measures.items():
        own, other = values(samples), values(base)
        level = bootstrap(Mean(), own, strata=samples.prompts)
        change = paired_bootstrap(Mean(), own, other, strata=samples.prompts)
        found[name] = {"value": triple(level), "change": [*triple(change), change.verdict]}
    return found


# Drawing


def together(parts: Sequence[Samples]) -> Samples:
    """Samples of several conditions as one, every image a group of its own."""
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("images", "features", "indices", "seconds")
    }
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    return replace(
        parts[0],
        prompts=prompts,
        seeds=tuple(seed for part in parts for seed in part.seeds),
        groups=np.arange(len(prompts)),
        **joined,
    )


def picture(samples: Samples, item: int) -> Image:
    from PIL import Image

    return Image.fromarray(samples.images[item].transpose(1, 2, 0))


class Drawing:
    """Samples of a run in its number of steps, image by image independent, with one bar."""

    def __init__(self, run: Run, total: int) -> None:
        from tqdm import tqdm

        self.run = run
        self.bar = tqdm(total=total, unit="image", disable=not run.progress)

    def __call__(self, condition: Condition, groups: Sequence[Group]) -> Samples:
        wanted = replace(condition, steps=self.run.sizes.steps)
        return together([self.run.lab.sample(wanted, groups, tick=self.bar.update)])

    def reference(self, prompt: str) -> tuple[Reference, Tensor]:
        """An image that shows what `prompt` names, for the guidance, and its features (1280,).

        Raises:
            RuntimeError: the model drew none.
        """
        from ...pipelines import Reference

        seeds = tuple(range(REFERENCE_SEED, REFERENCE_SEED + CANDIDATES))
        drawn = self(Condition("reference"), [Group(prompt, seeds)])
        hits = prompt_hits(drawn.readings, prompt).tolist()
        if not any(hits) and not self.run.sizes.quick:
            raise RuntimeError(f"none of {CANDIDATES} images shows {prompt!r}; choose another")
        item = hits.index(True) if any(hits) else 0
        return Reference(picture(drawn, item)), torch.from_numpy(drawn.features[item])


def style(run: Run, drawing: Drawing) -> dict[str, Any]:
    """Each style in turn is excluded from prompts that name none."""
    sizes = run.sizes
    prompts = sizes.chosen(STYLELESS, STYLELESS[:2])
    groups = groups_of(prompts, sizes.images // len(prompts), size=sizes.group, seed=SEED)
    base = drawing(Condition("unguided"), groups)
    rows, guided = [], {}
    for name in sizes.chosen(tuple(STYLES), tuple(STYLES)[:1]):
        reference, _ = drawing.reference(prompt_for(name))
        condition = Condition(f"without {name}", negtome=settings("style"), references=(reference,))
        guided[name] = drawing(condition, groups)
        measures = {
            "excluded": shares("style", name),
            "kept": kept,
            "precision": inside(run),
        }
        found = compared(guided[name], base, measures)
        before = triple(bootstrap(Mean(), shares("style", name)(base), strata=base.prompts))
        rows.append({"style": name, "before": before, **found})
    run.sheet(
        "style",
        "No style is named; NegToMe goes away from an image of one",
        {"unguided": base, **{f"NegToMe, without {n}": one for n, one in guided.items()}},
        each=3,
    )
    # Over all images and styles: an image has one style, so unguided has 1 / styles on average.
    own = torch.stack([shares("style", n)(one) for n, one in guided.items()]).mean(0)
    other = torch.stack([shares("style", n)(base) for n in guided]).mean(0)
    overall = paired_bootstrap(Mean(), own, other, strata=base.prompts)
    return {
        "images": len(base),
        "settings": settings("style").to_dict(),
        "styles": rows,
        "mean": {
            "before": round(float(other.mean()), 4),
            "value": triple(bootstrap(Mean(), own, strata=base.prompts)),
            "change": [*triple(overall), overall.verdict],
        },
    }


def sharpen(run: Run, drawing: Drawing) -> dict[str, Any]:
    """Every image once more, away from a blurred copy of itself."""
    from ...generate import _blurred
    from ...pipelines import Reference

    sizes, radius = run.sizes, Settings().blur
    prompts = sizes.chosen(PROMPTS, PROMPTS[:2])
    groups = groups_of(prompts, sizes.images // len(prompts), size=sizes.group, seed=SEED)
    measures = {
        "sharpness": lambda samples: contrast(samples.images),
        "precision": inside(run),
        "kept": kept,
    }
    rows = []
    for scale in sizes.chosen(SHARPEN_SCALES, SHARPEN_SCALES[-1:]):
        drafts = drawing(Condition(f"draft {scale:g}", guidance_scale=scale), groups)
        blurred = [_blurred(picture(drafts, item), radius) for item in range(len(drafts))]
        pixels = np.stack([np.asarray(one).transpose(2, 0, 1) for one in blurred])
        guided = together(
            [
                drawing(
                    Condition(
                        f"sharpened {scale:g}",
                        guidance_scale=scale,
                        negtome=settings("sharpen"),
                        references=(Reference(image),),
                    ),
                    [Group(prompt, (seed,))],
                )
                for image, prompt, seed in zip(blurred, drafts.prompts, drafts.seeds, strict=True)
            ]
        )
        level = {
            name: triple(bootstrap(Mean(), values(drafts), strata=drafts.prompts))
            for name, values in measures.items()
        }
        rows.append(
            {
                "scale": scale,
                "blurred_sharpness": round(float(contrast(pixels).mean()), 4),
                "before": level,
                "after": compared(guided, drafts, measures),
            }
        )
        run.sheet(
            f"sharpen-{scale:g}",
            f"Guidance scale {scale:g}: drafts, and away from their blurred copies",
            {"drafts": drafts, "NegToMe": guided},
        )
    return {"images": len(drafts), "settings": settings("sharpen").to_dict(), "scales": rows}


def interpolate(run: Run, drawing: Drawing) -> dict[str, Any]:
    """Alpha from pulling (negative) to pushing, with a reference of the prompt's own style."""
    sizes = run.sizes
    names = sizes.chosen(tuple(STYLES), tuple(STYLES)[:1])
    references = {name: drawing.reference(prompt_for(name, **SHOWN)) for name in names}
    drawn = {}
    for alpha in sizes.chosen(ALPHAS, FEW_ALPHAS):
        parts = []
        for number, name in enumerate(names):
            reference, _ = references[name]
            each = sizes.images // len(names)
            groups = groups_of(
                [prompt_for(name)], each, size=sizes.group, seed=SEED + number * each
            )
            condition = Condition(
                f"alpha {alpha:g}",
                negtome=settings("interpolate", alpha=alpha),
                references=(reference,),
            )
            parts.append(drawing(condition, groups))
        drawn[alpha] = together(parts)
    targets = {prompt_for(name): features for name, (_, features) in references.items()}

    def cosine(samples: Samples) -> Tensor:
        rows = zip(torch.from_numpy(samples.features), samples.prompts, strict=True)
        return torch.cat([feature_cosine(row[None], targets[prompt]) for row, prompt in rows])

    measures = {
        "cosine": cosine,
        "shown": likeness(SHOWN),
        "precision": inside(run),
        "kept": kept,
    }
    rows = [
        {"alpha": alpha, **compared(samples, drawn[0.0], measures)}
        for alpha, samples in drawn.items()
    ]
    run.sheet(
        "interpolate",
        f"Toward (negative alpha) or away from {', '.join(SHOWN.values())}",
        {f"alpha {alpha:+g}" if alpha else "unguided": one for alpha, one in drawn.items()},
        each=2,
    )
    return {
        "images": len(drawn[0.0]),
        "settings": settings("interpolate").to_dict(),
        "shown": SHOWN,
        "alphas": rows,
    }


def run(run: Run) -> dict[str, Any]:
    images = run.sizes.images
    styles, alphas, scales = (
        len(run.sizes.chosen(whole, few))
        for whole, few in (
            (tuple(STYLES), tuple(STYLES)[:1]),
            (ALPHAS, FEW_ALPHAS),
            (SHARPEN_SCALES, SHARPEN_SCALES[-1:]),
        )
    )
    total = images * (1 + styles + 2 * scales + alphas) + 2 * styles * CANDIDATES
    drawing = Drawing(run, total)
    with drawing.bar:
        return {
            "style": style(run, drawing),
            "sharpen": sharpen(run, drawing),
            "interpolate": interpolate(run, drawing),
        }


# Tables and figures


def _change(measure: dict[str, Any], digits: int = 2) -> str:
    *values, verdict = measure["change"]
    return f"{signed(values, digits)}, {verdict}"


def style_table(result: dict[str, Any]) -> str:
    rows = [
        [
            row["style"],
            f"{row['before'][0]:.0%}",
            cell(row["excluded"]["value"]),
            _change(row["excluded"]),
            _change(row["kept"]),
            _change(row["precision"]),
        ]
        for row in result["styles"]
    ]
    mean = result["mean"]
    rows.append(["mean", f"{mean['before']:.0%}", cell(mean["value"]), _change(mean), "", ""])
    header = [
        "excluded style",
        "its share unguided",
        "guided",
        "change",
        "change of prompt kept",
        "change of precision",
    ]
    return markdown(header, rows)


def sharpen_table(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['scale']:g}",
            f"{row['blurred_sharpness']:.2f}",
            f"{row['before']['sharpness'][0]:.2f}",
            cell(row["after"]["sharpness"]["value"]),
            _change(row["after"]["sharpness"]),
            _change(row["after"]["precision"]),
            _change(row["after"]["kept"]),
        ]
        for row in result["scales"]
    ]
    header = [
        "guidance scale",
        "contrast of the blurred copies",
        "of the drafts",
        "guided",
        "change",
        "change of precision",
        "change of prompt kept",
    ]
    return markdown(header, rows)


def interpolate_table(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['alpha']:+g}" if row["alpha"] else "0, unguided",
            *(cell(row[n]["value"]) for n in ("cosine", "shown", "precision")),
            f"{row['kept']['value'][0]:.1%}",
            _change(row["cosine"], 3) if row["alpha"] else "",
        ]
        for row in result["alphas"]
    ]
    header = [
        "alpha",
        "feature cosine to the reference",
        "its attributes shown",
        "precision",
        "prompt kept",
        "change of cosine",
    ]
    return markdown(header, rows)


def table(result: dict[str, Any]) -> str:
    shown = ", ".join(result["interpolate"]["shown"].values())
    return "\n\n".join(
        [
            "## Style exclusion",
            f"{result['style']['images']} images of prompts that name hair but no style, which the "
            "model was not trained on; the reference is one image of the excluded style.",
            style_table(result["style"]),
            "## Away from a blurred copy",
            f"{result['sharpen']['images']} images, each drawn again away from its own blurred "
            "copy. Contrast: mean difference of neighbouring grey pixels, in 256ths.",
            sharpen_table(result["sharpen"]),
            "## Interpolation and extrapolation",
            f"{result['interpolate']['images']} images of prompts that name the style alone; the "
            f"reference is an image of the same style with {shown}.",
            interpolate_table(result["interpolate"]),
            f"{result['sizes']['steps']} steps; 95% intervals in brackets, changes paired by seed. "
            f"Precision is against {result['sizes']['real']} balanced real images. torch "
            f"{result['versions']['torch']}, {result['date'][:10]}. Made by "
            f"`{result['command']}`.",
        ]
    )


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    excluded, grid = figures.panels(7.5, 3.8)
    rows = result["style"]["styles"]
    figures.bars(
        grid[0][0],
        [row["style"] for row in rows],
        {
            "unguided": [row["before"] for row in rows],
            "away from an image of the style": [row["excluded"]["value"] for row in rows],
        },
    )
    figures.tidy(grid[0][0], "Style exclusion", "excluded style", "share of images")
    grid[0][0].legend(frameon=False, fontsize=9)

    sharper, grid = figures.panels(7.5, 3.8, 2)
    scales = result["sharpen"]["scales"]
    for axes, name, label in zip(
        grid[0], ("sharpness", "precision"), ("contrast, 256ths", "precision"), strict=True
    ):
        figures.bars(
            axes,
            [f"scale {row['scale']:g}" for row in scales],
            {
                "drafts": [row["before"][name] for row in scales],
                "away from their blurred copies": [row["after"][name]["value"] for row in scales],
            },
        )
        figures.tidy(axes, label, "", "")
    grid[0][1].legend(frameon=False, fontsize=8)

    moved, grid = figures.panels(10, 3.8, 2)
    rows = result["interpolate"]["alphas"]
    for axes, name, label in zip(
        grid[0],
        ("cosine", "shown"),
        ("feature cosine to the reference", "share of the reference's attributes"),
        strict=True,
    ):
        places = [row["alpha"] for row in rows]
        for measure, colour, legend in ((name, BLUE, label), ("precision", GREY, "precision")):
            values = [row[measure]["value"] for row in rows]
            axes.plot(places, [v[0] for v in values], "o-", color=colour, label=legend)
            low, high = ([v[i] for v in values] for i in (1, 2))
            axes.fill_between(places, low, high, color=colour, alpha=0.15)
        figures.tidy(axes, label, "alpha: negative pulls toward the reference", "")
        axes.legend(frameon=False, fontsize=8)
    return {"style": excluded, "sharpen": sharper, "interpolate": moved}


STUDY = Study(
    "applications",
    "style exclusion, blurred references, interpolation and extrapolation",
    32,
    run,
    table,
    draw,
)
