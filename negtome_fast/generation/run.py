"""`generate`: guided images or videos of a diffusers model, and a record of the run.

`Settings` says what is made. `generate` writes the images, a labelled sheet and `run.json`, from
which `Settings.from_record` repeats the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import NegToMeConfig
from ..pipelines import negtome_guidance
from ..pipelines.references import Reference
from .contact_sheet import Row, reference_rows, sheet
from .drawing import call_arguments, configuration, draw
from .loading import load_pipeline
from .media import blurred, encode_video, frames, is_image, png, still
from .run_folder import RunFolder, plain_value, versions
from .settings import ReferenceFile, Settings

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class GenerationResult:
    """Images of a run of `generate`, its files and its record.

    Attributes:
        folder: the folder of the files.
        guided, plain: images by prompt, or the middle frames of videos; `plain` has those without
            guidance.
        record: the contents of `run.json`.
    """

    folder: Path
    guided: list[list[Image]]
    plain: list[list[Image]]
    record: dict[str, Any]


def generate(
    settings: Settings,
    folder: Path,
    *,
    overwrite: bool = False,
    pipe: Any = None,
    progress: bool = True,
) -> GenerationResult:
    """Generate the images of `settings` and write them to `folder`.

    Files: `guided-P-I.png` (prompt P, image I; `.mp4` or `.gif` for videos), with `compare` also
    `plain-P-I.png`, copies of the references, `sheet.png`, and `run.json`, which is written first
    and last. If the run is interrupted or fails, finished images are kept and the record says so.

    Args:
        settings: the run.
        folder: made if it does not exist.
        overwrite: replace another run there.
        pipe: use this pipeline instead of loading `settings.model`.
        progress: show a progress bar.

    Raises:
        FileExistsError: the folder holds another run.
        ValueError, TypeError, FileNotFoundError: settings that are invalid for this pipeline, or
            for any; raised before anything is written.
        ImportError: a package is missing; names the extra to install.
    """
    settings.check()
    output = RunFolder(folder, overwrite=overwrite)
    if pipe is None:
        pipe = load_pipeline(settings)
    call = call_arguments(pipe, settings)
    config = configuration(pipe, settings)
    run = GenerationRun(settings, output, pipe, call, config, progress)
    with run.recording():
        for number, prompt in enumerate(settings.prompts):
            run.one_prompt(number, prompt)
        run.finish()
    output.remove_earlier()
    return GenerationResult(folder, run.guided, run.plain, run.record)


class GenerationRun:
    """A run in progress, and its finished images.

    Args:
        settings: the run.
        output: its folder.
        pipe, call, config: pipeline, its other arguments, and the whole configuration.
        progress: show a progress bar.
    """

    def __init__(
        self,
        settings: Settings,
        output: RunFolder,
        pipe: Any,
        call: dict[str, Any],
        config: NegToMeConfig,
        progress: bool,
    ) -> None:
        self.settings, self.output, self.pipe, self.call = settings, output, pipe, call
        self.config, self.progress = config, progress
        self.guided: list[list[Image]] = []
        self.plain: list[list[Image]] = []
        self.record: dict[str, Any] = {}
        self._summaries: list[dict[str, Any]] = []
        self._warnings: list[str] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write the record before the run, and after an error or an interrupt."""
        self.output.create()
        copied = [self._copy(i, entry) for i, entry in enumerate(self.settings.references)]
        self.record = {
            "format": 1,
            "status": "running",
            "settings": {
                **self.settings.to_dict(),
                "references": [asdict(entry) for entry in copied],
            },
            "config": self.config.to_dict(),
            "call": {name: plain_value(value) for name, value in self.call.items()},
            "seeds": [self.settings.seed + i for i in range(self.settings.images)],
            "pipeline": type(self.pipe).__name__,
            "device": str(getattr(self.pipe, "_execution_device", "unknown")),
            "versions": versions(),
        }
        self._write_record()
        try:
            with warnings.catch_warnings():
                self._record_warnings()
                yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            self.record["status"] = "interrupted" if stopped else "failed"
            self._write_record()
            raise

    def _record_warnings(self) -> None:
        """Keep the text of every `UserWarning` for the record, and show it as before."""
        real, seen = warnings.showwarning, self._warnings

        def show(message: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(message, UserWarning) and str(message) not in seen:
                seen.append(str(message))
            real(message, *args, **kwargs)

        warnings.showwarning = show

    def one_prompt(self, number: int, prompt: str) -> None:
        """Draw the images of a prompt, and save each batch as soon as it is drawn."""
        drafts = self.settings.preset == "sharpen"
        seeds = [self.settings.seed + i for i in range(self.settings.images)]
        if self.settings.compare or drafts:
            made = self._draw(prompt, seeds, "without guidance")
            self._save("plain", number, 0, made)
            self.plain.append([still(item) for item in made])
        self.guided.append([])
        if not drafts:
            references = [entry.load() for entry in self.settings.references] or None
            self._guided_batch(number, prompt, seeds, 0, references)
            return
        for place, seed in enumerate(seeds):
            draft = [blurred(frame, self.settings.blur) for frame in frames(made[place])]
            reference = [Reference(draft if len(draft) > 1 else draft[0])]
            self._guided_batch(number, prompt, [seed], place, reference)

    def _guided_batch(
        self,
        number: int,
        prompt: str,
        seeds: Sequence[int],
        place: int,
        references: Sequence[Reference] | None,
    ) -> None:
        with negtome_guidance(self.pipe, self.config, reference=references) as handle:
            made = self._draw(prompt, seeds, "guided")
            self._summaries.append(handle.summary().to_dict())
        self._save("guided", number, place, made)
        self.guided[-1] += [still(item) for item in made]

    def finish(self) -> None:
        """Write the sheet, and the record of a complete run."""
        picture = sheet(
            " | ".join(f'"{prompt}"' for prompt in self.settings.prompts),
            self._rows(),
            self.caption(),
        )
        self.output.write("sheet.png", png(picture))
        self.record["status"] = "complete"
        self._write_record()

    def caption(self) -> str:
        """Model, guidance and seeds, for the foot of the sheet."""
        c, s = self.config, self.settings
        window = f"t in [{c.t_end:g}, {c.t_start:g}]"
        if c.steps is not None:
            window = f"steps {c.steps[0]:g} to {c.steps[1]:g}"
        elif c.first_steps is not None:
            window = f"first {c.first_steps} steps"
        words = [s.model, f"preset {s.preset}" if s.preset else "no preset"]
        alphas = {r.alpha for r in s.references if r.alpha is not None}
        words += [f"alpha {', '.join(f'{a:g}' for a in alphas) or f'{c.alpha:g}'}"]
        words += [f"threshold {c.threshold:g}", window, f'matching "{c.matching}"']
        if not s.references and s.preset != "sharpen":
            words.append(f'reference "{c.reference}"')
        words.append(f"seeds {s.seed} to {s.seed + s.images - 1}")
        return ", ".join(words)

    def _rows(self) -> list[Row]:
        rows = reference_rows(self.settings.references)
        for number, guided in enumerate(self.guided):
            if self.plain:
                rows.append(Row("without guidance", self.plain[number]))
            rows.append(Row("with NegToMe, same seeds", guided, accent=True))
        return rows

    def _draw(self, prompt: str, seeds: Sequence[int], label: str) -> list[Any]:
        return draw(self.pipe, self.call, prompt, seeds, label if self.progress else None)

    def _save(self, kind: str, number: int, place: int, made: Sequence[Any]) -> None:
        for index, item in enumerate(made, place):
            name = f"{kind}-{number}-{index:03}"
            if is_image(item):
                self.output.write(f"{name}.png", png(item))
            else:
                suffix, content = encode_video(frames(item), self.settings.fps)
                self.output.write(name + suffix, content)

    def _copy(self, number: int, entry: ReferenceFile) -> ReferenceFile:
        """Copy the reference's files beside the record, so that the folder is complete."""

        def copied(path: str | None, kind: str) -> str | None:
            if path is None or not Path(path).is_file():
                return path if path is None else str(Path(path).resolve())
            source = Path(path)
            name = f"{kind}-{number}{source.suffix.lower()}"
            self.output.write(name, source.read_bytes())
            return name

        image = copied(entry.image, "reference")
        return replace(entry, image=str(image), mask=copied(entry.mask, "mask"))

    def _write_record(self) -> None:
        self.record["summaries"] = self._summaries
        self.record["warnings"] = self._warnings
        self.record["files"] = self.output.files
        self.output.write_record(self.record)
