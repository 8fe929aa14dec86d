"""The other uses of a reference: excluding a style, sharpening, interpolation and extrapolation.

The settings are those of `negtome-fast generate --preset`. Every image is compared with the
unguided one of the same prompt and seed. A positive alpha goes away from the reference, a negative
one toward it.
"""

from __future__ import annotations

from typing import Any

from ..study import Study, StudyRun
from .common import GROUP
from .interpolate import run_interpolate
from .results import figures, table
from .sharpen import SCALES, real_contrast, run_sharpen
from .style import run_style


def run(run: StudyRun) -> dict[str, Any]:
    """Draw and measure all applications."""
    return {
        "sizes": run.sizes.to_dict(group=GROUP),
        "style": run_style(run),
        "sharpen": [run_sharpen(run, scale) for scale in run.sizes.chosen(SCALES, SCALES[:1])],
        "real_contrast": round(real_contrast(min(256, run.sizes.real)), 4),
        "interpolate": run_interpolate(run),
    }


STUDY = Study(
    "applications",
    "style exclusion, blurred references, interpolation and extrapolation",
    64,
    run,
    table,
    figures,
)
