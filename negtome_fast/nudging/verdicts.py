"""`Verdict`, the protocol `Filter`, and `judge`, which asks filters about images.

A filter gets images (B, 3, H, W) in [0, 1] and returns a score and the nearest reference of each.
`judge` asks the filters in their order and stops, image by image, at the first that triggers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """Result of one filter on one image.

    Attributes:
        filter: the filter's name.
        score: the image's score, in the filter's unit.
        threshold: the filter's threshold.
        triggered: True if the score lies on the wrong side of the threshold.
        nearest: name of the nearest reference, if the filter has references.
        index: row of that reference in the filter's bank; -1 without references.
    """

    filter: str
    score: float
    threshold: float
    triggered: bool
    nearest: str | None = None
    index: int = -1


class Filter(Protocol):
    """Interface that `judge` and `generate_with_nudging` need of a filter."""

    @property
    def name(self) -> str: ...

    def judge(self, images: Tensor) -> list[Verdict]:
        """Return a verdict for each of the images `(B, 3, H, W)` in [0, 1]."""
        ...


def judge(filters: Sequence[Filter], images: Tensor) -> list[tuple[Verdict, ...]]:
    """Ask every filter, in the order given, about every image.

    An image that has triggered a filter is not shown to the later ones: put cheap filters first.

    Args:
        filters: at least one.
        images: `(B, 3, H, W)` in [0, 1].

    Returns:
        The verdicts on each image; the last one has `triggered` if the image did not pass.
    """
    check_filters(filters)
    images = checked_images(images)
    verdicts: list[list[Verdict]] = [[] for _ in images]
    passing = list(range(len(images)))
    for one in filters:
        if not passing:
            break
        for place, verdict in zip(passing, one.judge(images[passing]), strict=True):
            verdicts[place].append(verdict)
        passing = [place for place in passing if not verdicts[place][-1].triggered]
    return [tuple(rows) for rows in verdicts]


def check_filters(filters: Sequence[Filter]) -> None:
    """Check that there are filters.

    Raises:
        ValueError: there are none.
        TypeError: one has no `judge`.
    """
    if not filters:
        raise ValueError("filters is empty, so nothing would ever be judged")
    for one in filters:
        if not callable(getattr(one, "judge", None)):
            raise TypeError(f"filters must have a method judge, {type(one).__name__} has none")


def checked_images(images: Tensor) -> Tensor:
    """Return the images `(B, 3, H, W)` in fp32.

    Raises:
        ValueError: another shape, or no tensor.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != 3:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be (B, 3, H, W) in [0, 1], got {shape}")
    if 0 in images.shape[2:]:
        raise ValueError(f"images must have pixels, got {tuple(images.shape)}")
    return images.float()
