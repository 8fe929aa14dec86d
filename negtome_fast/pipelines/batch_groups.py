"""Division of a batch: guidance parts, and in each part the groups of images of one prompt.

Concatenated guidance repeats the latents, once for each part, while different images have different
noise. The pipeline's call tells how many images there are, and which of them have the same prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .running_call import ModelCall

Arrangement = Literal["contiguous", "interleaved"]
"""`"contiguous"`: [u1, u2, c1, c2]; `"interleaved"`: [u1, c1, u2, c2]."""


@dataclass(frozen=True)
class BatchGroups:
    """Groups of a batch that never see each other.

    Attributes:
        parts: number of guidance parts.
        groups: number of groups in each part.
        order: int64 (B,), the items of the batch, group by group and part by part; None if they
            lie so already.
    """

    parts: int = 1
    groups: int = 1
    order: Tensor | None = None

    def first_items(self, batch: int) -> list[int]:
        """Returns the first item of each group in a batch of this many items."""
        order = list(range(batch)) if self.order is None else self.order.tolist()
        return order[:: batch // (self.parts * self.groups)]


def divide_batch(
    latents: Sequence[Tensor],
    call: ModelCall,
    groups: int | None,
    sequential: bool,
    references: bool,
) -> BatchGroups:
    """Finds the groups of a forward's batch.

    Args:
        latents: the latents (B, ...), and then parts of them that hold only what is generated;
            conditions may differ between the guidance parts.
        call: the call that runs the model.
        groups: the configuration's number of groups in each part; None finds it.
        sequential: pipelines of this model call it once for each guidance part, as far as known.
        references: items are guided by references from outside of the batch.

    Raises:
        ValueError: the batch and the call disagree, or the groups do not divide the batch.
    """
    batch, images = len(latents[0]), _images(call, len(latents[0]))
    if images is not None:
        parts, arrangement = _parts_of_call(latents, images, groups)
    elif sequential or call.guides_classifier_free() is False:
        parts, arrangement = 1, "contiguous"
    else:
        parts, arrangement = _parts_of_latents(latents, groups, 1 if references else 2)
    each = batch // parts
    if groups is not None:
        if each % groups:
            raise ValueError(
                f"the batch of {batch} items in {parts} guidance part(s) does not divide into "
                f"{groups} equal groups in each part; change groups={groups}"
            )
        classes = [item * groups // each for item in range(each)]
    else:
        classes = _by_prompt(call, each, parts) if images == each else [0] * each
    within = sorted(range(each), key=lambda item: classes[item])
    step, stride = (1, each) if arrangement == "contiguous" else (parts, 1)
    order = [part * stride + item * step for part in range(parts) for item in within]
    moved = order != list(range(batch))
    return BatchGroups(
        parts,
        max(classes) + 1,
        torch.tensor(order, device=latents[0].device) if moved else None,
    )


def _images(call: ModelCall, batch: int) -> int | None:
    """Returns the number of images that the call makes at a time; None if not known."""
    latents, prompts, each = call.latents(), call.prompts(), call.images_per_prompt()
    known = None if latents is None else len(latents)
    if known is None and prompts is not None and each is not None:
        known = len(prompts) * each
    # A pipeline may run its images one after the other.
    return known if known and batch % known == 0 else None


def _parts_of_call(
    latents: Sequence[Tensor], images: int, groups: int | None
) -> tuple[int, Arrangement]:
    """Returns the number of guidance parts for a number of images, and how they lie."""
    batch = len(latents[0])
    expected = batch // images
    for parts in _divisors(expected):
        arrangement = _arrangement(latents, parts)
        if arrangement is None:
            continue
        if parts < expected and groups is None:
            break
        return parts, arrangement
    raise ValueError(
        f"the call makes {images} image(s), so the batch of {batch} items should hold {expected} "
        f"guidance parts, but its latents repeat {parts} time(s); set groups, the number of groups "
        "in each repeated part, or remove the guidance for this call"
    )


def _parts_of_latents(
    latents: Sequence[Tensor], groups: int | None, least: int
) -> tuple[int, Arrangement]:
    """Returns the largest number of equal parts, and how they lie.

    Args:
        latents: as `divide_batch`.
        groups: number of groups in each part, if it was given.
        least: smallest number of items in a group, where their number was given.
    """
    batch = len(latents[0])
    found = {n: lie for n in _divisors(batch) if (lie := _arrangement(latents, n)) is not None}
    if groups is not None:
        whole = (n for n in found if (batch // n) % groups == 0 and batch // n // groups >= least)
        parts = next(whole, 1)
        return parts, found[parts]
    parts = next(iter(found))
    if len(found) > 2:
        warnings.warn(
            f"the latents of this batch of {batch} repeat {' or '.join(map(str, found))} time(s), "
            f"so it is not clear which are guidance parts and which are images of equal seeds; "
            f"{parts} parts were taken, which never see each other; give each image a seed of its "
            "own, or apply NegToMe to the pipeline instead of its model",
            UserWarning,
            stacklevel=2,
        )
    return parts, found[parts]


def _divisors(number: int) -> list[int]:
    """Returns all divisors, the largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def _arrangement(latents: Sequence[Tensor], parts: int) -> Arrangement | None:
    """Returns how equal parts lie in the batch; None if the latents are not the same in each."""
    if parts == 1:
        return "contiguous"
    for compared in latents:
        each = len(compared) // parts
        contiguous = compared.chunk(parts)
        if all(torch.equal(contiguous[0], part) for part in contiguous[1:]):
            return "contiguous"
        if each > 1 and all(
            torch.equal(compared[::parts], compared[part::parts]) for part in range(1, parts)
        ):
            return "interleaved"
    return None


def _by_prompt(call: ModelCall, images: int, parts: int) -> list[int]:
    """Returns the number of each image's group, from 0, by its prompt; groups are equally large.

    Raises:
        ValueError: it is not known which images have which prompt.
    """
    prompts, each = call.prompts() or [], call.images_per_prompt()
    if len(set(prompts)) == 1:
        return [0] * images
    entries = len(prompts)
    found: list[int] | None
    if entries and images == entries * (each or images // entries):
        found = _numbered([prompts[image * entries // images] for image in range(images)])
    else:
        found = _by_embeddings(call, images, parts)
        if found is None and entries and images > 1:
            raise ValueError(
                f"the call has {entries} prompts with {each or 'an unknown number of'} image(s) "
                f"each, but the batch holds {images} images, so it is not known which belong "
                "together; set groups, the number of groups of images, or 1 for all together"
            )
    if found is not None and _equally_large(found):
        return found
    # Prompts that occur differently often, or are not known: each entry is a group.
    if found is None and (each is None or each == 1):
        return [0] * images
    size = each if each and images % each == 0 else 1
    return [image // size for image in range(images)]


def _by_embeddings(call: ModelCall, images: int, parts: int) -> list[int] | None:
    """Returns the number of each image's prompt by its embeddings; None if there are none."""
    latents = call.latents()
    frames = latents.shape[2] if latents is not None and latents.ndim == 5 else 1
    found: list[int] | None = None
    for items in call.embeddings():
        if len(items) == parts * images * frames:  # AnimateDiff has them once for each frame
            rows = items[::frames]
        elif len(items) % images == 0:
            rows = items
        elif images % len(items) == 0:
            rows = [items[image * len(items) // images] for image in range(images)]
        else:
            continue
        numbers = [
            _same_rows(rows[start : start + images]) for start in range(0, len(rows), images)
        ]
        found = _numbered(list(zip(*([found] if found else []), *numbers, strict=True)))
    return found


def _same_rows(rows: Sequence[Tensor]) -> list[int]:
    """Returns for each row the index of the first row that is equal."""
    firsts: list[int] = []
    for row in rows:
        equal = (i for i in firsts if rows[i].shape == row.shape and torch.equal(rows[i], row))
        firsts.append(next(equal, len(firsts)))
    return firsts


def _numbered(keys: Sequence[object]) -> list[int]:
    """Returns the number of each key, from 0 in the order in which they occur."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _equally_large(numbers: Sequence[int]) -> bool:
    return len({numbers.count(number) for number in numbers}) == 1
