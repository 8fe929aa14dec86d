"""`generate`: guided images or videos of a diffusers model, and a record of the run.

`Settings` says what is made. `generate` writes the images, a labelled sheet and `run.json`, from
which `Settings.from_record` repeats the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import NegToMeConfig
from ..pipelines import negtome_guidance
from ..pipelines.references import Reference
from .contact_sheet import Row, reference_rows, sheet
from .drawing import call_arguments, check_call_before_loading, configuration, draw
from .loading import check_machine, load_pipeline
from .media import blurred, encode_video, frames, is_image, png, still
from .outcome import GUIDED, caveat, label
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
    `plain-P-I.png`, copies of the references, `sheet.png`, and `run.json`, which is written first,
    after each batch, and last. If the run is interrupted or fails, finished images are kept and the
    record says so; a failed run without finished images leaves nothing.

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
        check_machine(settings)
        check_call_before_loading(settings)
        pipe = load_pipeline(settings)
    call = call_arguments(pipe, settings)
    config = configuration(pipe, settings)
    run = GenerationRun(settings, output, pipe, call, config, progress)
    with run.recording():
        for number, prompt in enumerate(settings.prompts):
            run.one_prompt(number, prompt)
        run.finish()
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
        self._references = settings.references
        self._verdicts: list[list[str]] = []
        """Verdicts on the batches of each prompt."""

    @property
    def record(self) -> dict[str, Any]:
        """The contents of `run.json`."""
        return self.output.record

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write the record before the run and after it, and copy the references beside it.

        The copies are what the run uses, since the folder may be that of the run which it replaces.
        """
        copied: list[ReferenceFile] = []
        files: dict[str, bytes] = {}
        for number, entry in enumerate(self.settings.references):
            copied.append(_take_files(number, entry, files))
        with self.output.recording(self._describe(copied)):
            for name, content in files.items():
                self.output.write(name, content)
            self._references = tuple(_found_in(self.output.path, entry, files) for entry in copied)
            self.output.save_record()
            yield

    def _describe(self, references: Sequence[ReferenceFile]) -> dict[str, Any]:
        return {
            "settings": {
                **self.settings.to_dict(),
                "references": [asdict(entry) for entry in references],
            },
            "config": self.config.to_dict(),
            "call": {name: plain_value(value) for name, value in self.call.items()},
            "seeds": [self.settings.seed + i for i in range(self.settings.images)],
            "pipeline": type(self.pipe).__name__,
            "device": str(getattr(self.pipe, "_execution_device", "unknown")),
            "versions": versions(),
            "summaries": [],
        }

    def one_prompt(self, number: int, prompt: str) -> None:
        """Draw the images of a prompt, and save each batch as soon as it is drawn."""
        drafts = self.settings.preset == "sharpen"
        seeds = [self.settings.seed + i for i in range(self.settings.images)]
        if self.settings.compare or drafts:
            made = self._draw(prompt, seeds, "without guidance")
            self._save("plain", number, 0, made)
            self.plain.append([still(item) for item in made])
        self.guided.append([])
        self._verdicts.append([])
        if not drafts:
            references = [entry.load() for entry in self._references] or None
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
            summary = handle.summary().to_dict()
        self._verdicts[-1].append(summary["verdict"])
        self.record["summaries"].append(summary)
        self._save("guided", number, place, made)
        self.guided[-1] += [still(item) for item in made]

    def finish(self) -> None:
        """Write the sheet."""
        picture = sheet(
            " | ".join(f'"{prompt}"' for prompt in self.settings.prompts),
            self._rows(),
            self.caption(),
        )
        self.output.write("sheet.png", png(picture))

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
        caution = caveat([one for verdicts in self._verdicts for one in verdicts])
        return ", ".join([*words, caution] if caution else words)

    def _rows(self) -> list[Row]:
        rows = reference_rows(self._references)
        for number, guided in enumerate(self.guided):
            if self.plain:
                rows.append(Row("without guidance", self.plain[number]))
            verdicts = self._verdicts[number]
            rows.append(Row(label(verdicts), guided, accent=GUIDED in verdicts))
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
        self.output.save_record()


def _take_files(number: int, entry: ReferenceFile, files: dict[str, bytes]) -> ReferenceFile:
    """Read the files of a reference into `files`; returns the reference by its files' new names.

    A folder of frames is not read, and keeps its path.
    """

    def taken(path: str | None, kind: str) -> str | None:
        if path is None or not Path(path).is_file():
            return path if path is None else str(Path(path).resolve())
        source = Path(path)
        name = f"{kind}-{number}{source.suffix.lower()}"
        files[name] = source.read_bytes()
        return name

    image = taken(entry.image, "reference")
    return replace(entry, image=str(image), mask=taken(entry.mask, "mask"))


def _found_in(folder: Path, entry: ReferenceFile, files: Mapping[str, bytes]) -> ReferenceFile:
    """Return the reference with the paths of its copies in `folder`."""

    def found(name: str) -> str:
        return str(folder / name) if name in files else name

    mask = None if entry.mask is None else found(entry.mask)
    return replace(entry, image=found(entry.image), mask=mask)
