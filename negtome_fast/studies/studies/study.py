"""The frame of all studies: sizes, sampling with a progress bar, scores, and result files.

A study draws its conditions and writes `NAME.json` with the scores of every sample. Tables and
figures come from that file alone, so that a committed result can be shown again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import provenance
from ...files import check_writable
from ...models import STEPS
from ...models.avatars import STYLES, prompt_for
from ..conditions import GROUP, Condition, Group, groups_of
from ..sampler import Sampler
from ..samples import Samples
from ..scores import Real, Scores, scores_of
from ..store import save_png, save_text
from . import figures as plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

SCHEMA = 1
"""Version of the result files."""

PROMPTS = tuple(prompt_for(style) for style in STYLES)
"""Prompts that name a style and leave everything else open."""

TUNING_SEED = 1_000
"""First seed of the images on which settings are chosen."""

SEED = 0
"""First seed of the images from which results are reported."""


@dataclass(frozen=True)
class Sizes:
    """The size of a study.

    Attributes:
        images: number of images per condition, over all prompts.
        group: number of images of a prompt that are guided together.
        steps: number of scheduler steps.
        real: number of balanced real images that span the manifold of precision.
        decoded: number of them that are also passed through the model's VAE.
        quick: run a rehearsal: a few conditions, too few images for any conclusion.

    Raises:
        ValueError: no images, or more than real ones.
    """

    images: int
    group: int = GROUP
    steps: int = STEPS
    real: int = 4096
    decoded: int = 1024
    quick: bool = False

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"a condition needs at least 1 image, got {self.images}")
        if self.images > self.real:
            raise ValueError(
                f"{self.images} images of a condition are more than the {self.real} real ones that "
                "they are compared with"
            )

    @classmethod
    def rehearsal(cls) -> Sizes:
        """Return the sizes of a rehearsal."""
        return cls(images=16, group=2, steps=4, real=32, decoded=32, quick=True)

    def to_dict(self, **changes: int) -> dict[str, int]:
        """Return the sizes for the result file; `changes` replaces some of them."""
        values = {name: getattr(self, name) for name in ("images", "group", "steps", "real")}
        return {**values, "real_decoded": self.decoded, **changes}

    def chosen(self, whole: Sequence[Any], few: Sequence[Any]) -> Sequence[Any]:
        """Return the values of a sweep: `few` for a rehearsal, else `whole`."""
        return few if self.quick else whole


@dataclass
class StudyRun:
    """One run of a study.

    Attributes:
        sampler: pipeline, instruments and store.
        sizes: the size of the study.
        out: folder of the results.
        pictures: sheets of images, which are written with the figures.
        progress: show a progress bar.
    """

    sampler: Sampler
    sizes: Sizes
    out: Path
    pictures: dict[str, Image] = field(default_factory=dict)
    progress: bool = True

    def samples(
        self,
        conditions: Sequence[Condition],
        prompts: Sequence[str] = PROMPTS,
        *,
        images: int | None = None,
        group: int | None = None,
        seed: int = SEED,
    ) -> dict[str, Samples]:
        """Draw every condition on the same prompts and seeds; return the samples by name.

        Args:
            conditions: the conditions; names must be unique.
            prompts: the prompts.
            images: number of images per condition. Default: that of the study.
            group: largest group, for conditions in which images do not see each other.
            seed: first seed.

        Raises:
            ValueError: the images do not divide into two or more groups for every prompt.
        """
        sizes = self.sizes
        count = images or sizes.images
        size = min(group or sizes.group, sizes.group)
        step = len(prompts) * size
        if count % step or count < 2 * step:
            raise ValueError(
                f"the images of a condition must be a multiple of {step}, at least {2 * step}: two "
                f"or more groups of {size} for each of {len(prompts)} prompts, got {count}"
            )
        return self.drawn(
            conditions, groups_of(prompts, count // len(prompts), size=size, seed=seed)
        )

    def drawn(self, conditions: Sequence[Condition], groups: Sequence[Group]) -> dict[str, Samples]:
        """Draw every condition on these groups; return the samples by name.

        Raises:
            ValueError: two conditions of one name.
        """
        from tqdm import tqdm

        names = [condition.name for condition in conditions]
        if len(set(names)) < len(names):
            raise ValueError(f"conditions need different names, got {', '.join(names)}")
        total = len(conditions) * sum(len(group.seeds) for group in groups)
        found = {}
        with tqdm(total=total, unit="image", disable=not self.progress) as bar:
            for condition in conditions:
                bar.set_description(condition.name)
                wanted = replace(condition, steps=self.sizes.steps)
                found[condition.name] = self.sampler.sample(wanted, groups, tick=bar.update)
        return found

    def scores(self, samples: Mapping[str, Samples]) -> dict[str, Scores]:
        """Return the scores of every condition beside balanced real images."""
        sizes, sampler = self.sizes, self.sampler
        real = Real(
            sampler.real_features(sizes.real), sampler.real_features(sizes.decoded, decoded=True)
        )
        return scores_of(samples, real, sampler.features.logits)

    def sheet(self, name: str, title: str, rows: Mapping[str, Samples], *, each: int = 4) -> None:
        """Add a sheet with a row per condition: the first `each` images of every prompt."""
        from PIL import Image

        from ...generation.contact_sheet import Row, sheet

        shown = []
        for heading, samples in rows.items():
            kept: dict[str, list[Image.Image]] = {}
            for prompt, pixels in zip(samples.prompts, samples.images, strict=True):
                images = kept.setdefault(prompt, [])
                if len(images) < each:
                    images.append(Image.fromarray(pixels.transpose(1, 2, 0)))
            images = [image for part in kept.values() for image in part]
            shown.append(Row(heading, images, accent="NegToMe" in heading))
        footer = "; ".join(dict.fromkeys(next(iter(rows.values())).prompts))
        self.pictures[name] = sheet(title, shown, footer, tile=64)


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: name on the command line and of the files.
        purpose: one line for users.
        images: default number of images per condition.
        run: draws and measures; returns the study's own entries of the result file.
        table: function from a result to Markdown.
        figures: function from a result to figures, by the suffix of their file names.
    """

    name: str
    purpose: str
    images: int
    run: Callable[[StudyRun], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    figures: Callable[[dict[str, Any]], dict[str, Figure]]


def perform(study: Study, run: StudyRun) -> dict[str, Any]:
    """Run a study, write its files, and return the result.

    Raises:
        ValueError: the sizes do not fit the study.
        OSError: the folder of the results or the store cannot be written to.
        ImportError: a package is missing; names the extra to install.
    """
    # What would fail at the end is tried first.
    plots.panels(1, 1)
    check_writable("out", run.out)
    if run.sampler.store is not None:
        check_writable("store", run.sampler.store)
    began = time.perf_counter()
    # Files are written at the end only; an interrupted run resumes from the images in the store.
    body = study.run(run)
    sizes = run.sizes
    result = {
        "schema": SCHEMA,
        "study": study.name,
        "command": f"negtome-fast eval {study.name}"
        + (" --quick" if sizes.quick else f" --samples {sizes.images}"),
        "sizes": sizes.to_dict(),
        "seconds_of_this_run": round(time.perf_counter() - began),
        **provenance.describe(),
        **body,
    }
    save(run.out / f"{study.name}.json", result)
    write(study, result, run.out)
    for name, picture in run.pictures.items():
        save_png(run.out / f"{study.name}-{name}.png", picture, optimize=True)
    return result


def write(study: Study, result: dict[str, Any], out: Path) -> list[Path]:
    """Write the table and the figures of a result; return the figures' files."""
    out.mkdir(parents=True, exist_ok=True)
    save_text(out / f"{study.name}.md", study.table(result) + "\n")
    paths = []
    for name, figure in study.figures(result).items():
        paths.append(out / f"{study.name}-{name}.png")
        save_png(paths[-1], figure)
    return paths


def save(path: Path, result: dict[str, Any]) -> None:
    """Write the file atomically; lists of a condition's samples stay on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_text(path, _json(result) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Return the result of a study.

    Raises:
        ValueError: the file is not the result of a study.
        OSError: the file cannot be read.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or not {"study", "schema"} <= result.keys():
        raise ValueError(f"{path} is not the result of a study")
    return result


def _json(value: Any, depth: int = 0) -> str:
    """Return indented JSON with lists of plain values on one line, since a result has many."""
    inner, outer = " " * (depth + 1), " " * depth
    if isinstance(value, dict) and value:
        rows = [f"{inner}{json.dumps(k)}: {_json(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{outer}}}"
    if isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        rows = [f"{inner}{_json(v, depth + 1)}" for v in value]
        return "[\n" + ",\n".join(rows) + f"\n{outer}]"
    return json.dumps(value)
