"""The run of a request: draws, measures, and writes the files of the result."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .... import generation, provenance
from ....files import check_writable
from ...conditions import Group
from ...store import STORE, save_png, save_text
from .. import figures as plots
from ..study import save
from . import results
from .drawing import Drawing, DrawPlan, check_differ, plans
from .measuring import Meter, compared
from .request import NAME, NEGATIVE, UNGUIDED, Request

_MANY = 200
"""From this many images on, their number is announced before drawing."""


def perform(
    wanted: Request, out: Path, store: Path = STORE, *, progress: bool = True
) -> dict[str, Any]:
    """Draw, measure, and write `own.json` with its table, figure and sheet; return the result.

    Args:
        wanted: the request.
        out: folder of the results.
        store: folder of the drawn images; images that it has are not drawn again.
        progress: show a progress bar and announce a large number of images.

    Raises:
        ValueError, FileNotFoundError: the model or a setting does not fit.
        OSError: a folder cannot be written to; raised before the model is loaded.
        ImportError: a package is missing; names the extra to install.
    """
    # What would fail after an hour of drawing is tried first: matplotlib, and the folders.
    plots.panels(1, 1)
    check_writable("out", out)
    check_writable("store", store)
    meter = Meter(wanted)
    pipe = generation.load_pipeline(wanted.settings)
    # All plans are made before anything is drawn, so that a mistake shows at once.
    by_scale = plans(wanted, pipe)
    drawing = Drawing(wanted, pipe, store)
    if progress:
        _announce(wanted, by_scale, drawing)
    scales, rows = _scales(wanted, by_scale, drawing, meter, progress)
    configs = [plan.config for of_scale in by_scale for plan in of_scale if plan.config is not None]
    result = {
        "schema": results.SCHEMA,
        "study": NAME,
        "command": wanted.command,
        "settings": wanted.settings.to_dict(),
        "sizes": {"images": len(wanted.groups()) * wanted.group, "group": wanted.group},
        "better": meter.better([config.alpha for config in configs]),
        "pipeline": type(pipe).__name__,
        "device": str(getattr(pipe, "_execution_device", "unknown")),
        **provenance.describe(),
        "versions": generation.versions(),
        "scales": scales,
    }
    save(out / f"{NAME}.json", result)
    save_text(out / f"{NAME}.md", results.table(result) + "\n")
    for name, figure in results.figures(result).items():
        save_png(out / f"{NAME}-{name}.png", figure)
    save_png(out / f"{NAME}-sheet.png", results.sheet(wanted, rows))
    return result


def _scales(
    wanted: Request,
    by_scale: Sequence[Sequence[DrawPlan]],
    drawing: Drawing,
    meter: Meter,
    progress: bool,
) -> tuple[list[dict[str, Any]], list[tuple[DrawPlan, Group, np.ndarray]]]:
    """Draw and measure every scale; return their entries in the result, and the sheet's rows."""
    from tqdm import tqdm

    groups, shown = wanted.groups(), results.shown(wanted)
    scales, rows = [], []
    total = sum(map(len, by_scale)) * len(groups) * wanted.group
    with tqdm(total=total, unit="image", disable=not progress) as bar:
        for of_scale in by_scale:
            drawn: dict[str, list[dict[str, Any]]] = {p.condition.name: [] for p in of_scale}
            # Conditions take turns, so that a slow minute of the machine strikes them all.
            for group in groups:
                parts: dict[str, Any] = {}
                for plan in of_scale:
                    name = plan.condition.name
                    bar.set_description(name)
                    parts[name] = drawing.group(plan, group, parts.get(plan.condition.draft))
                    if name == NEGATIVE:
                        check_differ(parts[UNGUIDED], parts[name])
                    drawn[name].append(meter.record(group, parts[name]))
                    if group.seeds[0] in shown:
                        rows.append((plan, group, parts[name]["images"]))
                    bar.update(wanted.group)
            scales.append(compared(of_scale, drawn))
    return scales, rows


def _announce(wanted: Request, by_scale: list[list[DrawPlan]], drawing: Drawing) -> None:
    """Print how many images are about to be drawn, if they are many: conditions multiply."""
    groups = wanted.groups()
    missing = sum(drawing.missing(plan, groups) for of_scale in by_scale for plan in of_scale)
    if missing < _MANY:
        return
    each, scales = len(groups) * wanted.group, len(by_scale)
    every = f"{len(by_scale[0])} conditions, {each} images each"
    at = f" at each of {scales} guidance scales" if scales > 1 else ""
    kept = len(by_scale[0]) * scales * each - missing
    print(
        f"{missing} images to draw: {every}{at}; {kept} more are in the store, from which an "
        "interrupted run resumes",
        file=sys.stderr,
    )
