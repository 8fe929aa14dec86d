"""Views of the file of results: a table for every measure, a figure, and a sheet of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from ....generation import reference_rows
from ...conditions import SEEDS_PER_PROMPT, Group
from .. import figures as plots
from ..figures import BLUE, COLOURS, GREY, MARKERS
from ..tables import cell, markdown, signed
from .drawing import DrawPlan
from .request import UNGUIDED, Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

PURPOSE = "a model and prompts of one's own, without and with guidance"

SCHEMA = 2
"""Version of the file of results; version 1 had one guided condition."""

_ROWS = 36
"""Maximum number of rows of the sheet; more would be too many to look at."""


def table(result: Mapping[str, Any]) -> str:
    """Return Markdown with a table per measure: a row per condition, its difference to unguided.

    Raises:
        ValueError: the result is of another version.
    """
    _check(result)
    parts = [_measure_table(result, name) for name in result["better"]]
    return "\n\n".join([*parts, _cost_table(result), _note(result)])


def _measure_table(result: Mapping[str, Any], measure: str) -> str:
    rows = []
    for part in result["scales"]:
        for name, one in part["conditions"].items():
            change = one.get("compared", {}).get(measure)
            seen = ["", ""] if change is None else [signed(change["difference"], 3)]
            seen += [] if change is None else [change["verdict"]]
            found = cell(one["measures"][measure], 3)
            rows.append([name, _scale(part["guidance_scale"]), found, *seen])
    header = ["condition", "guidance scale", _titled(result, measure)]
    return markdown([*header, "difference to unguided", "seen"], rows)


def _cost_table(result: Mapping[str, Any]) -> str:
    rows = []
    for part in result["scales"]:
        base = part["conditions"][UNGUIDED]["seconds_an_image"]
        for name, one in part["conditions"].items():
            seconds = one["seconds_an_image"]
            pushed = "" if one["config"] is None else f"{one['pushed']:.1%}"
            added = "" if name == UNGUIDED else f"{seconds / base - 1:+.1%}"
            row = [name, _scale(part["guidance_scale"]), pushed, f"{seconds:.3f}", added]
            rows.append(row)
    header = ["condition", "guidance scale", "image tokens pushed", "seconds an image", "added"]
    return markdown(header, rows)


def _note(result: Mapping[str, Any]) -> str:
    sizes, settings = result["sizes"], result["settings"]
    count, prompts = sizes["images"] // sizes["group"], len(settings["prompts"])
    images = " and ".join(Path(one["image"]).name for one in settings["references"])
    words = [
        f"{settings['model']}: {prompts} prompt{'s' * (prompts > 1)}, {sizes['images']} images a "
        f"condition in {count} groups of {sizes['group']}."
    ]
    if images:
        masked = any(one["mask"] for one in settings["references"])
        whole = ", whole, though only what the mask shows is matched" if masked else ""
        words.append(f"The target is {images}{whole}.")
    if settings["preset"] == "sharpen":
        words.append(
            "NegToMe: every image away from its own unguided copy, blurred by a radius of "
            f"{settings['blur']:g}/64 of its longer side, whose time is counted. Contrast: mean "
            "difference of neighbouring pixels, in 256ths."
        )
    if settings["negative_prompt"] is not None:
        words.append(f'Negative prompt: "{settings["negative_prompt"]}".')
    words.append(
        "Each measure is taken on the images of a group and averaged over the groups. The 95% "
        "intervals in brackets draw whole groups, each for one value alone: about one in twenty "
        "misses the truth, and with fewer than 8 groups per prompt they are too narrow. Seconds "
        "are medians over groups, without an interval; they need several groups and a machine "
        "that runs nothing else. "
        f"torch {result['versions']['torch']}, {result['date'][:10]}. "
        f"Made by `{result['command']}`."
    )
    return " ".join(words)


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Draw a panel per measure: conditions with error bars, over the guidance scales if several.

    Raises:
        ValueError: the result is of another version.
        ImportError: matplotlib is missing; names the extra to install.
    """
    _check(result)
    measures, scales = list(result["better"]), result["scales"]
    conditions = list(scales[0]["conditions"])
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    several = len(scales) > 1
    width = 1.5 + 3.8 * columns
    height = 3.6 if several else 1.2 + 0.34 * len(conditions)
    # The legend below has as many columns as fit: a letter takes 0.075 inches, a mark 0.6.
    beside = max(1, int(width / (0.075 * max(map(len, conditions)) + 0.6)))
    below = 0.3 * -(-len(conditions) // beside) if several else 0.0
    figure, grid = plots.panels(width, rows * height + 0.3 + below, columns, rows)
    for number, axes in enumerate(grid.flat):
        if number >= len(measures):
            axes.set_visible(False)
            continue
        if several:
            _lines(axes, scales, measures[number])
        else:
            _points(axes, scales[0]["conditions"], measures[number], named=number % columns == 0)
        x = "guidance scale" if several else ""
        plots.tidy(axes, _titled(result, measures[number], "\n"), x, "")
    if several:
        handles = grid[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=beside, frameon=False)
    return {"measures": figure}


def _styles(conditions: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a style per condition: a colour per setting, empty marks for a negative prompt."""
    palette, marks = (GREY, BLUE, *COLOURS), ("o", *MARKERS)
    number = -1
    for one in conditions.values():
        negative = one["negative_prompt"]
        number += not negative
        yield {
            "color": palette[number % len(palette)],
            "marker": marks[number % len(marks)],
            "fillstyle": "none" if negative else "full",
        }


def _lines(axes: Axes, scales: Sequence[Mapping[str, Any]], measure: str) -> None:
    at = [part["guidance_scale"] for part in scales]
    names = list(scales[0]["conditions"])
    gap = min(abs(a - b) for a in at for b in at if a != b)
    order = sorted(range(len(at)), key=at.__getitem__)
    for number, style in enumerate(_styles(scales[0]["conditions"])):
        name = names[number]
        found = [scales[i]["conditions"][name] for i in order]
        values = [one["measures"][measure] for one in found]
        # Points are shifted sideways, so that every error bar can be read.
        aside = gap * 0.12 * (number - (len(names) - 1) / 2) / len(names)
        places = [at[i] + aside for i in order]
        axes.errorbar(
            places, [v[0] for v in values], yerr=plots.bar_ends(values), label=name,
            linestyle="-" if style["fillstyle"] == "full" else "--",
            linewidth=1.4, elinewidth=0.9, capsize=2.5, markersize=5, **style,
        )  # fmt: skip
    # The ticks stay at the scales themselves.
    axes.set_xticks(at, [f"{scale:g}" for scale in at])


def _points(
    axes: Axes, conditions: Mapping[str, Mapping[str, Any]], measure: str, named: bool
) -> None:
    styles = _styles(conditions)
    for number, (one, style) in enumerate(zip(conditions.values(), styles, strict=True)):
        value = one["measures"][measure]
        axes.errorbar(
            [value[0]], [number], xerr=plots.bar_ends([value]), linestyle="none",
            elinewidth=1.2, capsize=2.5, markersize=6, **{**style, "marker": "o"},
        )  # fmt: skip
    unguided = conditions[UNGUIDED]["measures"][measure][0]
    axes.axvline(unguided, color=GREY, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(conditions)), list(conditions) if named else [])
    axes.set_ylim(len(conditions) - 0.5, -0.5)


def shown(wanted: Request) -> set[int]:
    """Return the first seeds of the groups on the sheet: one group for each of the first prompts.

    There are as many as fit.
    """
    first, count = wanted.settings.seed, len(wanted.settings.prompts)
    prompts = max(1, _ROWS // (len(wanted.scales) * len(wanted.conditions())))
    return {first + number * SEEDS_PER_PROMPT for number in range(min(prompts, count, 6))}


def sheet(wanted: Request, rows: Sequence[tuple[DrawPlan, Group, np.ndarray]]) -> Image:
    """Draw the references, then a row for each group of images uint8 (N, H, W, 3).

    The prompt stands above the unguided row.
    """
    from PIL import Image

    from ....generation.contact_sheet import Row
    from ....generation.contact_sheet import sheet as labelled

    settings = wanted.settings
    drawn = []
    for plan, group, images in rows:
        name = plan.condition.name
        heading = f"{name}, guidance scale {_scale(plan.scale)}"
        if name == UNGUIDED:
            heading += f': "{shorten(group.prompt, 60, placeholder="...")}"'
        pictures = [Image.fromarray(image) for image in images]
        drawn.append(Row(heading, pictures, accent=plan.config is not None))
    footer = "the same seeds in all rows of a prompt"
    return labelled(settings.model, [*reference_rows(settings.references), *drawn], footer)


def _check(result: Mapping[str, Any]) -> None:
    if result["schema"] != SCHEMA:
        raise ValueError(
            "own.json is of another version of negtome-fast; its command writes it again, "
            "without drawing images that the store has"
        )


def _titled(result: Mapping[str, Any], measure: str, between: str = " ") -> str:
    better = result["better"][measure]
    return measure + (f"{between}({better} is better)" if better else "")


def _scale(scale: float | None) -> str:
    return "the model's" if scale is None else f"{scale:g}"
