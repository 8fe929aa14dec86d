"""`WebSession`: a loaded model that draws the requests of the page, one at a time."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import generation
from ...config import NegToMeConfig

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...generation import Settings

MOST_IMAGES = 16
MOST_WORDS = 1000
"""Maximum number of characters in a prompt."""
MOST_STEPS, MOST_SCALE, MOST_SEED = 100, 20, 2**31

MODES = {
    "others": "all other images",
    "first": "the first image",
    "image": "a picture of yours",
}
"""Names of what the images are pushed away from, with their labels."""


@dataclass(frozen=True)
class DrawRequest:
    """A request of the page.

    Attributes:
        prompt: prompt of all images.
        count: number of images, 1 to `MOST_IMAGES`.
        seed: seed of the first image, 0 to `MOST_SEED`; the next ones count up.
        guidance_scale: scale of classifier-free guidance, up to `MOST_SCALE`; 0 keeps the model's
            default.
        steps: steps of the scheduler, up to `MOST_STEPS`; 0 keeps the model's default.
        mode: a name of `MODES`.
        picture: the reference, if the mode is "image".
        mask: white where the reference may be matched; None allows all of it.
        guidance: fields of `NegToMeConfig`.
    """

    prompt: str
    count: int = 4
    seed: int = 0
    guidance_scale: float = 0.0
    steps: int = 0
    mode: str = "others"
    picture: Image | None = None
    mask: Image | None = None
    guidance: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Check the values, in the words of the page.

        Raises:
            ValueError: a value is invalid; the message says what to do.
        """
        if not isinstance(self.prompt, str):
            raise ValueError("the prompt is empty: say what the images show")
        length = len(self.prompt)
        if length > MOST_WORDS:
            raise ValueError(f"the prompt has {length} characters; {MOST_WORDS} will do")
        _check_whole("the number of images", self.count, 1, MOST_IMAGES)
        _check_whole("the first seed", self.seed, 0, MOST_SEED)
        _check_whole("the number of steps", self.steps, 0, MOST_STEPS)
        _check_number("the scale of classifier-free guidance", self.guidance_scale, 0, MOST_SCALE)
        if self.mode not in tuple(MODES):
            raise ValueError(f"no mode {self.mode!r}; there are {', '.join(MODES)}")
        if self.mode == "image" and self.picture is None:
            raise ValueError("choose a reference image, or push away from the images of the batch")
        if self.mode != "image" and self.count < 2:
            raise ValueError(
                "a single image has no other to differ from: ask for 2 or more, or give a reference"
            )


def _check_number(name: str, value: Any, least: int, most: int) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most:  # not a number compares as false
        raise ValueError(f"{name} must be {least} to {most}, got {value}")


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    _check_number(name, value, least, most)
    if value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}")


@dataclass(frozen=True)
class DrawnImages:
    """Images without and with guidance from the same seeds, and what the guidance did.

    Attributes:
        plain, guided: the images, or the middle frames of videos.
        summary: `GuidanceSummary.to_dict()`.
        alpha: strength of the guidance; at 0 it only measured.
        warnings: warnings of the library, such as that nothing was pushed.
    """

    plain: list[Image]
    guided: list[Image]
    summary: dict[str, Any]
    alpha: float
    warnings: list[str]


class WebSession:
    """A loaded model that serves one request at a time, because two would share its hooks.

    Args:
        settings: the model and its device; each request sets the rest.
        pipe: use this pipeline instead of loading `settings.model`.

    Raises:
        ValueError, FileNotFoundError, ImportError: as in `generation.load_pipeline`; or the
            pipeline does not generate from text.
    """

    def __init__(self, settings: Settings | None = None, pipe: Any = None) -> None:
        self.settings = generation.Settings() if settings is None else settings
        self.pipe = generation.load_pipeline(self.settings) if pipe is None else pipe
        generation.call_arguments(self.pipe, self.settings)
        self._turn = threading.Lock()

    @property
    def embedded(self) -> bool:
        """True for the model of the package, whose words and settings are known."""
        return self.settings.model == generation.EMBEDDED

    def defaults(self, mode: str) -> NegToMeConfig:
        """Return the configuration that the page starts a mode with."""
        preset = "avoid" if mode == "image" else "diversity"
        return generation.configuration(self.pipe, replace(self.settings, preset=preset))

    def make(self, request: DrawRequest) -> DrawnImages:
        """Draw the images twice; the pipeline is afterwards as it was, also after an error.

        Raises:
            ValueError, TypeError: the request is invalid; the message is meant for the user.
        """
        request.check()
        with self._turn, tempfile.TemporaryDirectory(prefix="negtome-fast-") as folder:
            settings = self._settings(request, Path(folder))
            with warnings.catch_warnings():
                warnings.showwarning = lambda *_, **__: None  # the record has them for the page
                made = generation.generate(
                    settings, Path(folder) / "run", pipe=self.pipe, progress=False
                )
        record = made.record
        return DrawnImages(
            made.plain[0],
            made.guided[0],
            record["summaries"][0],
            record["config"]["alpha"],
            record["warnings"],
        )

    def _settings(self, request: DrawRequest, folder: Path) -> Settings:
        references: tuple[generation.ReferenceFile, ...] = ()
        guidance = dict(request.guidance or {})
        if request.mode == "image":
            assert request.picture is not None
            paths: list[str | None] = []
            for name, picture in (("reference", request.picture), ("mask", request.mask)):
                path = folder / f"{name}.png"
                if picture is not None:
                    picture.save(path)
                paths.append(None if picture is None else str(path))
            references = (generation.ReferenceFile(str(paths[0]), paths[1]),)
        else:
            guidance["reference"] = request.mode
        return replace(
            self.settings,
            prompts=(request.prompt,),
            images=int(request.count),
            seed=int(request.seed),
            guidance_scale=request.guidance_scale or None,
            steps=int(request.steps) or None,
            references=references,
            guidance=guidance,
            compare=True,
        )
