"""`nudge_images`: images that pass filters, before and after nudging, and a record of the run.

`NudgeRun` says what is made. Without banks or prompts the run is a demonstration on the embedded
model: its protected characters by name, judged, and generated again away from themselves and
toward ordinary images of the same description.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import check_prompt
from ..models.avatars import CHARACTERS
from ..nudging.attempts import NudgedImages
from ..nudging.bank import ReferenceBank
from ..nudging.loop import generate_with_nudging
from ..nudging.schedule import METHODS, Method
from . import nudge_filters
from .call_checks import shown
from .contact_sheet import Row, sheet
from .drawing import call_arguments, check_call_before_loading
from .loading import check_machine, load_pipeline
from .media import png
from .run_folder import RunFolder, versions
from .settings import EMBEDDED, Settings
from .settings_checks import check_count, check_fields

MOST_ATTEMPTS = 1_000
"""Largest number of attempts at an image."""


@dataclass(frozen=True)
class NudgeRun:
    """Everything that decides the images of `nudge_images`.

    Attributes:
        settings: model, prompts, images, seed and the pipeline's arguments.
        undesired, desired: folders of images, or saved banks; may be None for the embedded model.
        filters: `NAME:THRESHOLD`, in order; empty for the defaults.
        method: one of `METHODS`.
        max_attempts: maximum number of generations of an image.
        parsed: names and thresholds of the filters.

    Raises:
        ValueError: a value is invalid; names the field to change.
    """

    settings: Settings
    undesired: Path | None = None
    desired: Path | None = None
    filters: tuple[str, ...] = ()
    method: Method = "nudge"
    max_attempts: int = 4
    parsed: tuple[tuple[str, float], ...] = field(init=False)

    def __post_init__(self) -> None:
        embedded = self.settings.model == EMBEDDED
        if self.undesired is None and not embedded:
            raise ValueError("needs `undesired`: images that must not come out, or a bank")
        if not self.settings.prompts and not embedded:
            raise ValueError("needs `prompts`: what is to be made?")
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}")
        self._check_numbers()
        default = nudge_filters.EMBEDDED_FILTERS if embedded else nudge_filters.DEFAULT_FILTERS
        parsed = tuple(nudge_filters.parse_filter(text) for text in self.filters or default)
        if not embedded and "reader" in dict(parsed):
            raise ValueError("`filters` reader is for the embedded model only")
        object.__setattr__(self, "parsed", parsed)
        if embedded:
            for prompt in (*self.settings.prompts, self.settings.negative_prompt or ""):
                check_prompt(prompt)

    def _check_numbers(self) -> None:
        check_fields(self.settings)
        check_count("max_attempts", self.max_attempts, MOST_ATTEMPTS)
        if not 0 <= self.settings.seed < 2**62:
            raise ValueError(f"`seed` must be between 0 and 2**62, got {shown(self.settings.seed)}")

    def caption(self) -> str:
        """Settings of the run, for the foot of the sheet."""
        s = self.settings
        filters = ", ".join(f"{name} {value:g}" for name, value in self.parsed)
        return (
            f"{s.model}, method {self.method}, at most {self.max_attempts} attempts, "
            f"filters {filters}, seeds {s.seed} to {s.seed + s.images - 1}"
        )


def nudge_images(
    run: NudgeRun,
    folder: Path,
    *,
    overwrite: bool = False,
    pipe: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Generate the images of `run` and write them to `folder`; returns the record.

    Files: `before-P-I.png` (prompt P, image I) as the plain pipeline draws it, `after-P-I.png`, or
    `after-P-I.flagged.png` if a filter still triggers, `sheet.png`, and `run.json`, which is
    written first, after each image, and last. If the run is interrupted or fails, finished images
    are kept and the record says so; a failed run without finished images leaves nothing.

    Args:
        run: the run.
        folder: made if it does not exist.
        overwrite: replace another run there.
        pipe: use this pipeline instead of loading the model.
        progress: show a progress bar.

    Raises:
        FileExistsError: the folder holds another run.
        ValueError, TypeError, FileNotFoundError: invalid settings.
        ImportError: a package is missing; names the extra to install.
    """
    output = RunFolder(folder, overwrite=overwrite)
    if pipe is None:
        check_machine(run.settings)
        check_call_before_loading(run.settings)
    undesired, desired = (
        None if path is None else nudge_filters.load_bank(path)
        for path in (run.undesired, run.desired)
    )
    pipe = load_pipeline(run.settings) if pipe is None else pipe
    session = NudgeSession(run, pipe, undesired, desired)
    rows: list[Row] = []
    with output.recording({**session.to_dict(), "prompts": []}):
        for number, made in enumerate(session.draw(progress)):
            output.record["prompts"].append(made.to_dict())
            rows += _write_prompt(output, number, made)
        shown = _pictures(session.undesired.images[:8].float() / 255)
        rows.insert(0, Row("undesired", shown))
        picture = sheet("Before and after nudging", rows, run.caption(), tile=112)
        output.write("sheet.png", png(picture))
    return output.record


@dataclass(frozen=True)
class NudgedPrompt:
    """Images of one prompt before and after nudging.

    Attributes:
        prompt: the prompt.
        first: images of the plain pipeline, `(B, 3, H, W)` in [0, 1].
        result: images of the last attempts.
        plain_seconds, seconds: time of the plain generation and of all attempts.
    """

    prompt: str
    first: Tensor
    result: NudgedImages
    plain_seconds: float
    seconds: float

    @property
    def flagged_before(self) -> int:
        return sum(not rows[0].passed for rows in self.result.attempts)

    @property
    def flagged_after(self) -> int:
        return len(self.result.passed) - sum(self.result.passed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "flagged_before": self.flagged_before,
            "flagged_after": self.flagged_after,
            "seconds_per_image": {
                "plain": round(self.plain_seconds / len(self.first), 4),
                "all_attempts": round(self.seconds / len(self.first), 4),
            },
            **self.result.to_dict(),
        }


class NudgeSession:
    """A pipeline, its filters and its banks, ready to draw the prompts of a run.

    Args:
        run: the run.
        pipe: the pipeline.
        undesired, desired: banks of the caller; None uses those of the embedded model.
    """

    def __init__(
        self,
        run: NudgeRun,
        pipe: Any,
        undesired: ReferenceBank | None,
        desired: ReferenceBank | None,
    ) -> None:
        self._run, self._pipe, self._desired = run, pipe, desired
        self._call = {**call_arguments(pipe, run.settings), "output_type": "pt"}
        self._bar(disable=True)
        self._demonstrates = undesired is None and desired is None
        self.undesired = undesired or nudge_filters.own_characters(pipe)
        self._filters = [
            nudge_filters.build_filter(name, threshold, self.undesired, pipe)
            for name, threshold in run.parsed
        ]

    def draw(self, progress: bool) -> Iterator[NudgedPrompt]:
        """Draw the images of one prompt after the other, with a progress bar or without."""
        for prompt in self._run.settings.prompts or tuple(CHARACTERS):
            self._bar(disable=not progress, desc=prompt, leave=False)
            yield self._draw_prompt(prompt)
        self._bar(disable=not progress)

    def _draw_prompt(self, prompt: str) -> NudgedPrompt:
        run, settings = self._run, self._run.settings
        desired = self._desired
        if self._demonstrates and prompt in CHARACTERS:
            desired = nudge_filters.own_descriptions(self._pipe, prompt, self._filters)
        began = time.perf_counter()
        first = self._pipe(
            prompt,
            generator=_generators(settings),
            num_images_per_prompt=settings.images,
            **self._call,
        ).images.float()
        plain_seconds = time.perf_counter() - began
        result = generate_with_nudging(
            self._pipe,
            prompt,
            filters=self._filters,
            undesired=self.undesired,
            desired=desired if run.method in ("nudge", "both") else None,
            max_attempts=run.max_attempts,
            method=run.method,
            num_images_per_prompt=settings.images,
            generator=_generators(settings),
            first=first,
            **self._call,
        )
        seconds = time.perf_counter() - began
        return NudgedPrompt(prompt, first.cpu(), result, plain_seconds, seconds)

    def to_dict(self) -> dict[str, Any]:
        """Record of everything but the images."""
        run = self._run
        return {
            "kind": "nudge",
            "settings": run.settings.to_dict(),
            "undesired": str(run.undesired) if run.undesired else "the model's own characters",
            "desired": str(run.desired) if run.desired else None,
            "filters": [list(pair) for pair in run.parsed],
            "call": {name: str(value) for name, value in self._call.items()},
            "pipeline": type(self._pipe).__name__,
            "versions": versions(),
        }

    def _bar(self, **options: Any) -> None:
        if hasattr(self._pipe, "set_progress_bar_config"):
            self._pipe.set_progress_bar_config(**options)


def _generators(settings: Settings) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(settings.seed + i) for i in range(settings.images)]


def _write_prompt(output: RunFolder, number: int, made: NudgedPrompt) -> list[Row]:
    """Write the images of a prompt; returns their rows of the sheet."""
    result = made.result
    before, after = _pictures(made.first), _pictures(torch.stack(result.images))
    for index, passed in enumerate(result.passed):
        output.write(f"before-{number}-{index:03}.png", png(before[index]))
        flag = "" if passed else ".flagged"
        output.write(f"after-{number}-{index:03}{flag}.png", png(after[index]))
        output.save_record()
    attempts = max(len(rows) for rows in result.attempts)
    return [
        Row(f'"{made.prompt}": {made.flagged_before} of {len(before)} flagged', before),
        Row(f"after {attempts} attempts: {made.flagged_after} flagged", after, accent=True),
    ]


def _pictures(images: Tensor) -> list[Any]:
    from PIL import Image

    arrays = (images.permute(0, 2, 3, 1).clamp(0, 1) * 255).round().byte().cpu().numpy()
    return [Image.fromarray(array) for array in arrays]
