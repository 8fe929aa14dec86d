"""The other uses of a reference: excluding a style, sharpening, interpolation and extrapolation.

Settings are those of `negtome-fast generate --preset`. Every measure is compared with the unguided
image of the same prompt and seed. A positive alpha goes away from the reference, a negative one
toward it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...config import NegToMeConfig
from ...generation import APPLICATIONS, Settings, blurred
from ...models.avatars import OPEN_ATTRIBUTES, STYLES, Avatar, attributes_in, prompt_for, render
from .. import measures
from ..intervals import Interval, Mean
from ..sampler import Condition, Group, Samples, balanced_avatars
from ..scores import Scores, plan_of, record, triple
from . import figures
from .figures import BLUE, COLOURS, GREY
from .study import PROMPTS, SEED, Run, Study
from .tables import cell, markdown, origin, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

GROUP = 2
"""With a reference from outside no image sees another. Pairs, so that the bootstrap draws no image
alone, which has no pairwise cosine."""

UNGUIDED = "unguided"

#: They name no style. Chosen among sixteen for the styles that the unguided model draws of them.
STYLELESS = (
    "a person with red hair",
    "a person with dark skin",
    "a person with fair skin",
    "a person with long blond hair and fair skin",
)
SHARPEN_ALPHAS = (0.3, 0.9)
SHARPEN_SCALES = (2.5, 1.0)
"""At 1, without classifier-free guidance, images are worse, so there is more to gain."""

ALPHAS = (-0.9, -0.6, -0.3, 0.5, 0.9)
TAKEN = ("its skin", "its hair colour", "its hair shape")
"""Measures of the `OPEN_ATTRIBUTES` of the picture."""

BLUR = Settings.blur
"""Pixels, of 64."""

Values = dict[str, Tensor]
"""Measures of a condition: a number an image each, (N,)."""


def settings(name: str, **overrides: Any) -> NegToMeConfig:
    """Those of `negtome-fast generate --preset NAME` on the embedded model."""
    application = APPLICATIONS[name]
    return NegToMeConfig(**{**application.guidance, **application.embedded, **overrides})


@cache
def picture(style: str) -> np.ndarray:
    """Of a style, with attributes that no prompt names: uint8 (64, 64, 3)."""
    return render(_avatar(style))


def _avatar(style: str) -> Avatar:
    # No style's majority either.
    return Avatar(style, "bronze", "blue", "bun", "reference")


def _pixels(picture: np.ndarray) -> Tensor:
    """(1, 3, 64, 64) in [0, 1]."""
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 255


def _image(samples: Samples, item: int) -> Image:
    from PIL import Image

    return Image.fromarray(samples.images[item].transpose(1, 2, 0))


def blurred_copies(samples: Samples) -> Samples:
    """The same samples with their images blurred; nothing else is of the blurred ones."""
    images = [blurred(_image(samples, item), BLUR) for item in range(len(samples))]
    return replace(
        samples, images=np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
    )


def contrast(images: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels of (N, 3, H, W), in 256ths of the full scale; (N,)."""
    grey = images.mean(dim=1).double() * 255
    steps = [grey.diff(dim=axis).abs().flatten(1).mean(1) for axis in (1, 2)]
    return (steps[0] + steps[1]) / 2


def shown(samples: Samples, head: str, values: Sequence[str]) -> Tensor:
    """1 where the reader sees the image's value of `values`, one an image."""
    readings = zip(samples.readings, values, strict=True)
    return torch.tensor([reading[head] == value for reading, value in readings]).double()


def own_references(
    run: Run, base: Samples, name: str, condition: Callable[[int], Condition], size: int = 1
) -> Samples:
    """The prompts and seeds of `base` once more, image i and its neighbours under `condition(i)`.

    Args:
        size: neighbours in `base`, of one prompt, that share a condition.
    """
    from tqdm import tqdm

    parts = []
    with tqdm(total=len(base), unit="image", desc=name, disable=not run.progress) as bar:
        for item in range(0, len(base), size):
            wanted = replace(condition(item), steps=run.sizes.steps)
            group = Group(base.prompts[item], base.seeds[item : item + size])
            parts.append(run.lab.sample(wanted, [group], tick=bar.update))
    return replace(Samples.joined(parts, name), groups=base.groups)


# Each value of a condition and what it is less the unguided one


def interval(values: Tensor, samples: Samples, no_change: float | None = None) -> Interval:
    """Of the mean."""
    plan = plan_of(samples)
    return plan.interval(*plan.apply(Mean(), values, False), no_change, recentre=False)


def difference(values: Tensor, other: Tensor, samples: Samples) -> list[Any]:
    """`[estimate, low, high, verdict]` of values less those of the same prompts and seeds."""
    found = interval(values - other, samples, no_change=0.0)
    return [*triple(found), found.verdict]


def measured(values: Values, other: Values | None, samples: Samples) -> dict[str, Any]:
    """For the file of results: every measure, and its difference to `other`."""
    found: dict[str, Any] = {
        "measured": {name: triple(interval(own, samples)) for name, own in values.items()}
    }
    if other is not None:
        found["differences"] = {
            name: difference(own, other[name], samples) for name, own in values.items()
        }
    return found


def compared(
    scores: Mapping[str, Scores], values: Callable[[Scores], Values]
) -> list[dict[str, Any]]:
    """A record a condition; the first is what the others are compared with."""
    base, *_ = scores.values()
    unguided = values(base)
    return [
        {
            **record(one, base),
            **measured(values(one), None if one is base else unguided, one.samples),
        }
        for one in scores.values()
    ]


def run(run: Run) -> dict[str, Any]:
    return {
        "sizes": run.sizes.to_dict(group=GROUP),
        "style": style(run),
        "sharpen": [
            sharpen(run, scale) for scale in run.sizes.chosen(SHARPEN_SCALES, SHARPEN_SCALES[:1])
        ],
        "real_contrast": round(_real_contrast(min(256, run.sizes.real)), 4),
        "interpolate": interpolate(run),
    }


def _unguided(run: Run, prompts: Sequence[str], scale: float = Condition.guidance_scale) -> Samples:
    condition = Condition(UNGUIDED, guidance_scale=scale)
    return run.samples([condition], prompts, group=GROUP, seed=SEED)[UNGUIDED]


# Excluding a style


def _exclusions(style: str) -> dict[str, Condition]:
    """What may keep a style away: from its picture, from its name, from both."""
    from ...pipelines import Reference

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


def style(run: Run) -> dict[str, Any]:
    """Each style in turn, from prompts that name none: the share of images that shows it."""
    styles = run.sizes.chosen(tuple(STYLES), tuple(STYLES)[1:2])
    base = _unguided(run, STYLELESS)
    drawn: dict[tuple[str, str], Samples] = {}
    for excluded in styles:
        named = {
            f"{way}: {excluded}": replace(condition, name=f"{way}: {excluded}")
            for way, condition in _exclusions(excluded).items()
        }
        found = run.samples(list(named.values()), STYLELESS, group=GROUP, seed=SEED)
        drawn |= {(way, excluded): found[f"{way}: {excluded}"] for way in _exclusions(excluded)}
    scores = run.scores({UNGUIDED: base} | {"/".join(key): one for key, one in drawn.items()})
    unguided = scores.pop(UNGUIDED)

    def values(one: Scores, excluded: str) -> Values:
        return {
            "style shown": shown(one.samples, "style", [excluded] * len(one.samples)),
            "prompt kept": one.hits.double(),
            "precision": one.inside.double(),
        }

    rows = []
    for excluded in styles:
        before = values(unguided, excluded)
        rows.append({"name": UNGUIDED, "style": excluded, **measured(before, None, base)})
        for way in _exclusions(excluded):
            one = scores[f"{way}/{excluded}"]
            own = measured(values(one, excluded), before, base)
            rows.append({**record(one, unguided), "name": way, "style": excluded, **own})

    def mean(of: Callable[[str], Scores]) -> Values:
        """Over styles, image by image: the styles share their prompts and seeds."""
        found = [values(of(excluded), excluded) for excluded in styles]
        return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}

    none = mean(lambda _: unguided)
    ways = {
        way: mean(lambda excluded, way=way: scores[f"{way}/{excluded}"])  # type: ignore[misc]
        for way in _exclusions(styles[0])
    }
    run.sheet(
        "style",
        "No style is named, and one is not wanted",
        {UNGUIDED: base}
        | {
            f"{way}, without {excluded}": drawn[way, excluded]
            for excluded in styles
            for way in ("NegToMe", "negative prompt")
        },
    )
    return {
        "unguided": record(unguided),
        "styles": rows,
        "mean": [
            {"name": UNGUIDED, **measured(none, None, base)},
            *({"name": way, **measured(own, none, base)} for way, own in ways.items()),
        ],
        "NegToMe less negative prompt": measured(ways["NegToMe"], ways["negative prompt"], base)[
            "differences"
        ],
    }


# Away from what is blurred


def sharpen(run: Run, scale: float) -> dict[str, Any]:
    """Away from each image's own blurred copy, or from a blurred picture of its style."""
    from ...pipelines import Reference

    alphas = run.sizes.chosen(SHARPEN_ALPHAS, SHARPEN_ALPHAS[:1])
    base = _unguided(run, PROMPTS, scale)
    copies = blurred_copies(base)

    def own(item: int) -> Image:
        return _image(copies, item)

    def of_style(item: int) -> Image:
        from PIL import Image

        style = attributes_in(base.prompts[item])["style"]
        return blurred(Image.fromarray(picture(style)), BLUR)

    drawn = {UNGUIDED: base}
    kinds = {"own blurred copy": own}
    if scale == SHARPEN_SCALES[0]:
        kinds["blurred picture of the style"] = of_style
    for kind, source in kinds.items():
        size = 1 if source is own else GROUP
        for alpha in alphas:
            name = f"{kind}, alpha {alpha:g}"
            drawn[name] = own_references(
                run,
                base,
                name,
                lambda item, source=source, alpha=alpha: Condition(  # type: ignore[misc]
                    "sharpened",
                    guidance_scale=scale,
                    negtome=settings("sharpen", alpha=alpha),
                    references=(Reference(source(item)),),
                ),
                size,
            )
    scores = run.scores(drawn)
    real = torch.nn.functional.normalize(scores[UNGUIDED].real.features, dim=-1)

    def values(one: Scores) -> Values:
        unit = torch.nn.functional.normalize(one.features, dim=-1)
        return {
            "contrast": contrast(one.samples.pixels()),
            "cosine with the nearest real image": (unit @ real.T).amax(1).double(),
            "precision": one.inside.double(),
            "prompt kept": one.hits.double(),
        }

    run.sheet(
        f"sharpen-{scale:g}",
        f"Away from what is blurred, guidance scale {scale:g}",
        {UNGUIDED: base, "their blurred copies": copies}
        | {f"NegToMe, {name}": one for name, one in drawn.items() if one is not base},
    )
    return {
        "scale": scale,
        "blurred_contrast": round(float(contrast(copies.pixels()).mean()), 4),
        "conditions": compared(scores, values),
    }


def _real_contrast(count: int) -> float:
    """Mean of so many balanced real images."""
    images = np.stack([render(avatar) for avatar in balanced_avatars(count)])
    return float(contrast(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).mean())


# Toward a picture and away from it


def interpolate(run: Run) -> list[dict[str, Any]]:
    """The picture is of the prompt's style: likeness, and which of its attributes are taken."""
    from ...pipelines import Reference

    base = _unguided(run, PROMPTS)
    styles = [attributes_in(prompt)["style"] for prompt in base.prompts]
    drawn = {UNGUIDED: base}
    for alpha in run.sizes.chosen(ALPHAS, ALPHAS[1:2]):
        name = f"alpha {alpha:g}"
        drawn[name] = own_references(
            run,
            base,
            name,
            lambda item, alpha=alpha: Condition(  # type: ignore[misc]
                "moved",
                negtome=settings("interpolate", alpha=alpha),
                references=(Reference(picture(styles[item])),),
            ),
            GROUP,
        )
    targets = {
        style: (run.lab.features(pixels)[0], run.lab.latents(pixels)[0])
        for style, pixels in ((style, _pixels(picture(style))) for style in STYLES)
    }

    def values(one: Scores) -> Values:
        latents = run.lab.latents(one.samples.pixels())
        cosine, distance = [], []
        for item, style in enumerate(styles):
            features, latent = targets[style]
            cosine.append(measures.feature_cosine(one.features[item : item + 1], features))
            distance.append(measures.latent_l2(latents[item : item + 1], latent))
        taken = {
            name: shown(one.samples, head, [getattr(_avatar(style), head) for style in styles])
            for name, head in zip(TAKEN, OPEN_ATTRIBUTES, strict=True)
        }
        return {
            "cosine": torch.cat(cosine).double(),
            "latent L2": torch.cat(distance).double(),
            **taken,
            "precision": one.inside.double(),
            "prompt kept": one.hits.double(),
        }

    pictures = [base.prompts.index(prompt) for prompt in PROMPTS]
    shown_pictures = replace(
        base.only(pictures),
        images=np.stack([picture(styles[item]).transpose(2, 0, 1) for item in pictures]),
    )
    run.sheet(
        "interpolate",
        "Toward a picture (negative alpha) and away from it",
        {"the pictures": shown_pictures}
        | {
            name if one is base else f"NegToMe, {name}": one
            for name, one in sorted(drawn.items(), key=lambda entry: _alpha(entry[0]))
        },
    )
    return compared(run.scores(drawn), values)


def _alpha(name: str) -> float:
    return 0.0 if name == UNGUIDED else float(name.split()[-1])


# Tables and figures


def _table(records: Sequence[dict[str, Any]], names: Sequence[str] = ()) -> str:
    """A condition a row, a measure a column: its value, and the paired difference to unguided."""
    names = names or list(records[0]["measured"])
    excluded = "style" in records[0]
    rows = []
    for one in records:
        row = [one["style"], one["name"]] if excluded else [one["name"]]
        for name in names:
            digits = 1 if name in ("contrast", "latent L2") else 2
            digits = 3 if "cosine" in name else digits
            own = one["measured"][name]
            if "differences" not in one:
                row.append(cell(own, digits))
                continue
            *change, verdict = one["differences"][name]
            row.append(f"{own[0]:.{digits}f}; {signed(change, digits)} {verdict}")
        rows.append(row)
    return markdown([*(["excluded"] if excluded else []), "condition", *names], rows)


def _by_alpha(result: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(result["interpolate"], key=lambda one: _alpha(one["name"]))


def table(result: dict[str, Any]) -> str:
    parts = [
        "In every cell but those of unguided images: the value; its paired difference to unguided "
        "with its interval, and what is seen in it.",
        "**Excluding a style** from prompts that name none, mean over the styles, each excluded in "
        "turn:",
        _table(result["style"]["mean"]),
    ]
    less = "; ".join(
        f"{name} {signed(change)}, {verdict}"
        for name, (*change, verdict) in result["style"]["NegToMe less negative prompt"].items()
    )
    parts += [f"NegToMe less negative prompt: {less}.", "Style by style:"]
    parts.append(_table(result["style"]["styles"], ("style shown", "prompt kept")))
    for part in result["sharpen"]:
        parts += [
            f"**Away from what is blurred** by {BLUR:g} pixels, guidance scale "
            f"{part['scale']:g}; the blurred copies have a contrast of "
            f"{part['blurred_contrast']:.1f}, balanced real images {result['real_contrast']:.1f}:",
            _table(part["conditions"]),
        ]
    avatar = _avatar(next(iter(STYLES)))
    parts += [
        f"**Toward (alpha below 0) or away from** a picture of the prompt's style with "
        f"{avatar.skin} skin and {avatar.hair_color} hair in a {avatar.hair_shape}:",
        _table(_by_alpha(result)),
        origin(result),
    ]
    return "\n\n".join(parts)


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    excluded, grid = figures.panels(12, 4.2, 2)
    rows = result["style"]["styles"]
    styles = list(dict.fromkeys(row["style"] for row in rows))
    ways = list(dict.fromkeys(row["name"] for row in rows))
    for axes, measure, title in zip(
        grid[0],
        ("style shown", "prompt kept"),
        ("Share of images in the excluded style", "Share that keeps the prompt"),
        strict=True,
    ):
        found = {
            way: [row["measured"][measure] for row in rows if row["name"] == way] for way in ways
        }
        figures.bars(axes, styles, found)
        figures.tidy(axes, title, "excluded style", "")
        axes.set_ylim(0, 1.05)
    handles = grid[0][0].get_legend_handles_labels()
    excluded.legend(*handles, loc="outside lower center", ncols=len(ways), frameon=False)

    sharper, grid = figures.panels(12, 3.6, 3)
    for axes, measure, title in zip(
        grid[0],
        ("contrast", "cosine with the nearest real image", "precision"),
        ("Contrast, 256ths", "Cosine, nearest real image", "Precision"),
        strict=True,
    ):
        _differences(axes, result["sharpen"], measure)
        figures.tidy(axes, title, "difference to unguided", "")
    for axes in grid[0][1:]:
        axes.set_yticklabels([])

    moved, grid = figures.panels(13, 3.8, 3)
    records = _by_alpha(result)
    at = [_alpha(one["name"]) for one in records]
    for axes, names, title in zip(
        grid[0],
        (("latent L2",), ("cosine", "precision", "prompt kept"), TAKEN),
        ("Distance from the picture, latent L2", "Likeness and quality", "Attributes taken"),
        strict=True,
    ):
        for name, colour in zip(names, (BLUE, GREY, *COLOURS), strict=False):
            values = [one["measured"][name] for one in records]
            axes.plot(at, [v[0] for v in values], "o-", color=colour, label=name)
            axes.fill_between(
                at, [v[1] for v in values], [v[2] for v in values], color=colour, alpha=0.15
            )
        figures.tidy(axes, title, "alpha: below 0 toward, above 0 away", "")
        axes.set_xticks(at)
        if len(names) > 1:
            axes.set_ylim(-0.03, 1.05)
            axes.legend(frameon=False, fontsize=8)
    return {"exclusion": excluded, "sharpening": sharper, "likeness": moved}


def _differences(axes: Axes, parts: Sequence[dict[str, Any]], measure: str) -> None:
    """A row a condition: its paired difference with the interval, and a line at no change."""
    labels: list[str] = []
    for part, colour in zip(parts, (BLUE, COLOURS[0]), strict=False):
        for one in part["conditions"]:
            if "differences" not in one:
                continue
            values = one["differences"][measure]
            axes.errorbar(
                [values[0]], [len(labels)], xerr=figures.bar_ends([values]), fmt="o", color=colour
            )
            labels.append(f"{one['name']}, scale {part['scale']:g}".replace(", alpha", ",\nalpha"))
    axes.axvline(0, color="#555555", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)


STUDY = Study(
    "applications",
    "style exclusion, blurred references, interpolation and extrapolation",
    64,
    run,
    table,
    draw,
)
