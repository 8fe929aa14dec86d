"""Results of `generate_with_nudging`: every attempt at every image, and what the filters said."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import remove_abandoned, write_atomically
from .verdicts import Verdict


@dataclass(frozen=True)
class Attempt:
    """One generation of one image.

    Attributes:
        number: 0 for the plain pipeline.
        verdicts: of the filters that saw the image, in order.
        undesired, desired: names of the images that steered it; empty if none did.
        beta: weight of the undesired points; None if latents were not nudged.
        distance: sum of the L2 lengths of all moves of the latents.
    """

    number: int
    verdicts: tuple[Verdict, ...]
    undesired: tuple[str, ...] = ()
    desired: tuple[str, ...] = ()
    beta: float | None = None
    distance: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.verdicts[-1].triggered


@dataclass(frozen=True)
class NudgedImages:
    """Images of `generate_with_nudging` and their attempts.

    Attributes:
        images: the last attempt at each requested image.
        attempts: the attempts at each image, from the plain one on.
        settings: method, schedule and filters, as plain values.
    """

    images: list[Any]
    attempts: tuple[tuple[Attempt, ...], ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> tuple[bool, ...]:
        """True for each image on which no filter triggered."""
        return tuple(rows[-1].passed for rows in self.attempts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, without the images."""
        return {
            "settings": self.settings,
            "passed": list(self.passed),
            "attempts": [[asdict(attempt) for attempt in rows] for rows in self.attempts],
        }

    def save(self, folder: str | Path, prefix: str = "image") -> list[Path]:
        """Write the images as PNG, flagged ones as `.flagged.png`, and `PREFIX.json` beside.

        Each file appears whole or not at all. Images of an earlier save with this prefix are
        removed, so that a flagged image never lies beside a passed one of the same number.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        paths = []
        for number, (image, passed) in enumerate(zip(self.images, self.passed, strict=True)):
            path = folder / f"{prefix}-{number}{'' if passed else '.flagged'}.png"
            content = io.BytesIO()
            image.save(content, "PNG")
            write_atomically(path, content.getvalue())
            paths.append(path)
        record = {**self.to_dict(), "files": [path.name for path in paths]}
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(folder / f"{prefix}.json", text.encode())
        own = re.compile(re.escape(prefix) + r"-\d+(\.flagged)?\.png")
        for path in set(folder.iterdir()) - set(paths):
            if own.fullmatch(path.name):
                path.unlink()
        return paths


class NudgingFailed(RuntimeError):
    """Raised with `on_failure="raise"`; `result` holds all images, flagged ones included."""

    def __init__(self, result: NudgedImages) -> None:
        flagged = [number for number, passed in enumerate(result.passed) if not passed]
        attempts = max(len(rows) for rows in result.attempts)
        super().__init__(f"after {attempts} attempts the filters still flag the images {flagged}")
        self.result = result
