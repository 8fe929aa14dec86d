"""`generate_with_nudging`: generate, judge, and generate flagged images again, steered away.

The first attempt is the plain pipeline. Only flagged images are generated again, from the same
noise: `nudge` moves the latents between steps, `negtome` guides the attention blocks away from the
undesired images, `both` does both; `reseed` only draws other noise, the baseline to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import NegToMeConfig
from .attempts import Attempt, NudgedImages, NudgingFailed
from .bank import ReferenceBank
from .batch import PipelineBatch
from .points import BankSearch, choose_points, searches_by_prompt
from .schedule import METHODS, Method, NudgeSchedule
from .steering import NUDGING, Steering, check_callback
from .verdicts import Filter, judge


def generate_with_nudging(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    filters: Sequence[Filter],
    undesired: ReferenceBank,
    desired: ReferenceBank | Mapping[str, ReferenceBank] | None = None,
    max_attempts: int = 4,
    method: Method = "nudge",
    on_failure: Literal["flag", "raise"] = "flag",
    schedule: NudgeSchedule | None = None,
    negtome: NegToMeConfig | None = None,
    num_images_per_prompt: int = 1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    first: Tensor | None = None,
    output_type: Literal["pil", "pt"] = "pil",
    **call: Any,
) -> NudgedImages:
    """Generate images that pass the filters, or are flagged, with an unmodified diffusers pipeline.

    ```python
    bank = ReferenceBank.build("protected/", encoder=default_encoder())
    result = generate_with_nudging(
        pipe, "a red captain", filters=[EncoderSimilarity(bank, 0.9)], undesired=bank
    )
    ```

    Args:
        pipe: a text-to-image pipeline whose call takes `callback_on_step_end`.
        prompt: one or several.
        filters: at least one, asked in this order; see `judge`.
        undesired: images to steer away from; the nearest to a flagged image in pixels are chosen.
        desired: images to steer toward, drawn from the nearest: one bank for all prompts, or one
            for each. They should show what the prompt asks for and pass the filters
            (`ReferenceBank.passing`), because the results resemble them.
        max_attempts: maximum number of attempts at an image, the plain one included; at least 1.
        method: method of the retries; `"reseed"` is the baseline that only changes the noise.
        on_failure: `"flag"` returns flagged images with `passed` False; `"raise"` raises
            `NudgingFailed`.
        schedule: None is `NudgeSchedule()`.
        negtome: settings of `"negtome"` and `"both"`; None is the preset of the model's family.
        num_images_per_prompt: as in the pipeline.
        generator: one for each image, so that one image can be generated again alone; None makes
            them. The pipeline uses them for the first attempt, and retries use copies.
        first: images that the plain pipeline has already drawn from these generators,
            `(B, 3, H, W)` in [0, 1]; they are judged in place of a first generation.
        output_type: `"pil"`, or `"pt"` for tensors (3, H, W) in [0, 1].
        call: further arguments of the pipeline's call; `negative_prompt` may be a list.

    Returns:
        `NudgedImages`. Images that pass at once are bit-identical to the pipeline's own.

    Raises:
        ValueError, TypeError: invalid arguments.
        NudgingFailed: see `on_failure`.
        Exception: whatever the pipeline raises; the pipeline is left as it was.
    """
    _check_choices(method, on_failure, output_type, max_attempts)
    if isinstance(filters, (str, bytes)) or not isinstance(filters, Sequence):
        raise TypeError(f"filters must be a sequence of filters, got {type(filters).__name__}")
    if not filters:
        raise ValueError("filters is empty, so nothing would ever be judged")
    if wrong := [one for one in filters if not hasattr(one, "judge")]:
        raise TypeError(f"filters must have a method judge, {type(wrong[0]).__name__} has none")
    if method in NUDGING:
        check_callback(pipe)
    batch = PipelineBatch(pipe, prompt, num_images_per_prompt, generator, call)
    retries = _Retries(
        batch,
        BankSearch(undesired),
        searches_by_prompt(desired, batch.prompts),
        NudgeSchedule() if schedule is None else schedule,
        method,
        negtome,
    )
    images = batch.generate(range(batch.count)) if first is None else _existing(first, batch.count)
    attempts: list[list[Attempt]] = [[Attempt(0, verdicts)] for verdicts in judge(filters, images)]
    for number in range(1, max_attempts):
        flagged = [item for item, rows in enumerate(attempts) if not rows[-1].passed]
        if not flagged:
            break
        images[flagged], steering = retries.generate(images, flagged, number)
        for place, verdicts in enumerate(judge(filters, images[flagged])):
            attempts[flagged[place]].append(steering.record(place, verdicts))
    result = NudgedImages(
        batch.as_pil(images) if output_type == "pil" else list(images),
        tuple(tuple(rows) for rows in attempts),
        {
            "method": method,
            "max_attempts": max_attempts,
            "schedule": asdict(retries.schedule),
            "filters": [one.name for one in filters],
            "prompts": batch.prompts,
        },
    )
    if on_failure == "raise" and not all(result.passed):
        raise NudgingFailed(result)
    return result


@dataclass(frozen=True)
class _Retries:
    """Retries of flagged images: which points steer them, and by which method.

    Attributes:
        batch: the pipeline's call.
        undesired: the bank to steer away from.
        desired: the bank to steer toward, for each prompt.
        schedule, method, negtome: as in `generate_with_nudging`.
    """

    batch: PipelineBatch
    undesired: BankSearch
    desired: Mapping[str, BankSearch | None]
    schedule: NudgeSchedule
    method: Method
    negtome: NegToMeConfig | None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, NudgeSchedule):
            found = type(self.schedule).__name__
            raise TypeError(f"schedule must be a NudgeSchedule, got {found}")
        if self.negtome is not None and not isinstance(self.negtome, NegToMeConfig):
            raise TypeError(f"negtome must be a NegToMeConfig, got {type(self.negtome).__name__}")

    def generate(
        self, images: Tensor, flagged: Sequence[int], attempt: int
    ) -> tuple[Tensor, Steering]:
        """Generate the flagged ones of `images` again: `(len(flagged), 3, H, W)`, and how."""
        points = None
        if self.method != "reseed":
            points = choose_points(
                images[flagged],
                [self.batch.seed_of(item) for item in flagged],
                self.undesired,
                [self.desired[self.batch.prompts[item]] for item in flagged],
                self.schedule,
                attempt,
            )
        height, width = images.shape[-2:]
        steering = Steering(
            self.batch.pipe,
            points,
            self.schedule,
            self.method,
            attempt,
            self.negtome,
            (height, width),
        )
        again = torch.empty_like(images[flagged])
        for places in steering.batches(len(flagged)):
            chosen = [flagged[place] for place in places]
            with steering.applied(places) as callback:
                again[places] = self.batch.generate(
                    chosen, callback, reseed=attempt if self.method == "reseed" else 0
                )
        return again, steering


def _check_choices(method: str, on_failure: str, output_type: str, max_attempts: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if on_failure not in ("flag", "raise"):
        raise ValueError(f'on_failure must be "flag" or "raise", got {on_failure!r}')
    if output_type not in ("pil", "pt"):
        raise ValueError(f'output_type must be "pil" or "pt", got {output_type!r}')
    if isinstance(max_attempts, bool) or not isinstance(max_attempts, int) or max_attempts < 1:
        raise ValueError(f"max_attempts must be a positive integer, got {max_attempts!r}")


def _existing(first: Tensor, count: int) -> Tensor:
    if not isinstance(first, Tensor):
        raise TypeError(f"first must be a tensor, got {type(first).__name__}")
    if first.dim() != 4 or first.shape[:2] != (count, 3) or not first.numel():
        raise ValueError(f"first must be ({count}, 3, H, W) in [0, 1], got {tuple(first.shape)}")
    return first.detach().float().cpu().clone()
