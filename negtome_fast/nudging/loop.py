"""`generate_with_nudging`: generate, judge, and generate again what a filter flagged, steered away.

The first attempt is the plain pipeline. Only flagged images are generated again, from the same
noise: `nudge` moves the latents between steps, `negtome` guides the attention blocks away from the
undesired images, `both` does both; `reseed` only draws other noise, the baseline to compare with.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..config import NegToMeConfig
from .bank import ReferenceBank, resized
from .filters import Filter, Verdict, judge
from .objective import nudge
from .selection import select_nearest

if TYPE_CHECKING:
    from ..pipelines.layouts import Layout

Method = Literal["nudge", "negtome", "both", "reseed"]
METHODS = ("nudge", "negtome", "both", "reseed")
THUMBNAIL = 64
"""Pixels a side at which the points nearest to an image are chosen."""
_TEXTS = ("negative_prompt", "prompt_2", "prompt_3")
"""Beginnings of the names of arguments that hold one text for each prompt, or one for all."""


@dataclass(frozen=True)
class NudgeSchedule:
    """How hard, where and when latents are moved; every failed attempt escalates.

    The paper (arXiv 2408.15450) publishes no values; these are this project's, found on the
    embedded model with desired points (docs/nudging.md).

    Attributes:
        objective: of `nudge`.
        alpha, beta: weights of the desired and the undesired points in the first retry.
        escalation: factor of `alpha`, `beta`, `max_distance` and NegToMe's alpha in every further
            one, at least 1.
        max_distance: trust radius of a step, as a share of the norm of the latents.
        steps, step_size: of the descent within one step of the scheduler.
        window: (start, end), the fraction of the scheduler's steps after which latents are moved.
        extend: how much later the window ends in every further retry, at most at 1: the later, the
            less a model can restore what it has memorised, and the less it can clean up.
        nearest: how many undesired and how many desired points an image is steered by.
        pool: the desired ones are drawn from so many that are nearest, in each attempt anew and by
            the image's own seed, so that images of one prompt do not all become the same other one.
    """

    objective: Literal["paper", "squared", "cosine"] = "cosine"
    alpha: float = 4.0
    beta: float = 2.0
    escalation: float = 1.5
    max_distance: float = 0.2
    steps: int = 5
    step_size: float = 0.05
    window: tuple[float, float] = (0.3, 0.7)
    extend: float = 0.125
    nearest: int = 1
    pool: int = 8

    def __post_init__(self) -> None:
        start, end = self.window
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"window=(start, end) are fractions, 0 <= start < end <= 1, not {self.window}"
            )
        if not 0 <= self.extend <= 1:
            raise ValueError(f"extend is a fraction of the steps, 0 to 1, got {self.extend}")
        if not self.escalation >= 1:
            raise ValueError(f"escalation must be at least 1, got {self.escalation}")
        if not self.max_distance > 0:
            raise ValueError(f"max_distance must be positive, got {self.max_distance}")
        if self.nearest < 1:
            raise ValueError(f"nearest must be at least 1, got {self.nearest}")
        if self.pool < self.nearest:
            raise ValueError(
                f"pool must be at least nearest, {self.nearest}, to draw from, got {self.pool}"
            )


@dataclass(frozen=True)
class Attempt:
    """One generation of one image.

    Attributes:
        number: 0 for the plain pipeline.
        verdicts: of the filters that saw the image, in order.
        undesired, desired: names of the images it was steered by; empty where it was not.
        beta: weight of the undesired points, where latents were nudged.
        distance: L2 length of all moves of the latents together.
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
    """What `generate_with_nudging` made.

    Attributes:
        images: one for each asked for, of the last attempt at it.
        attempts: for each image its attempts, from the plain one on.
        settings: method, schedule and filters, as plain values.
    """

    images: list[Any]
    attempts: tuple[tuple[Attempt, ...], ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> tuple[bool, ...]:
        """For each image, whether no filter triggered on it."""
        return tuple(rows[-1].passed for rows in self.attempts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; images are not among them."""
        return {
            "settings": self.settings,
            "passed": list(self.passed),
            "attempts": [[asdict(attempt) for attempt in rows] for rows in self.attempts],
        }

    def save(self, folder: str | Path, prefix: str = "image") -> list[Path]:
        """Writes the images as PNG, flagged ones with `.flagged.png`, and `PREFIX.json` beside."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, (image, passed) in enumerate(zip(self.images, self.passed, strict=True)):
            path = folder / f"{prefix}-{number}{'' if passed else '.flagged'}.png"
            image.save(path)
            paths.append(path)
        record = {**self.to_dict(), "files": [path.name for path in paths]}
        (folder / f"{prefix}.json").write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )
        return paths


class NudgingFailed(RuntimeError):
    """Raised with `on_failure="raise"`; `result` holds what was made, flagged images included."""

    def __init__(self, result: NudgedImages) -> None:
        flagged = [number for number, passed in enumerate(result.passed) if not passed]
        attempts = max(len(rows) for rows in result.attempts)
        super().__init__(f"after {attempts} attempts the filters still flag the images {flagged}")
        self.result = result


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
    """Images that pass the filters, or are flagged, of an unmodified diffusers pipeline.

    ```python
    bank = ReferenceBank.build("protected/", encoder=default_encoder())
    result = generate_with_nudging(
        pipe, "a red captain", filters=[EncoderSimilarity(bank, 0.9)], undesired=bank
    )
    ```

    Args:
        pipe: a text-to-image pipeline whose call takes `callback_on_step_end`.
        prompt: one or several.
        filters: asked in their order; see `judge`.
        undesired: images to steer away from; those nearest to a flagged image in pixels are chosen.
        desired: images to steer toward, drawn from those nearest: one bank for all, or one for each
            prompt. They should show what the prompt asks for and pass the filters
            (`ReferenceBank.passing`): what comes out resembles them.
        max_attempts: generations of an image at most, the plain one included; at least 1.
        method: what a retry does; `"reseed"` is the baseline that only changes the noise.
        on_failure: `"flag"`: the images come back with `passed` False; `"raise"`: `NudgingFailed`.
        schedule: None is `NudgeSchedule()`.
        negtome: settings of `"negtome"` and `"both"`; None is the preset of the model's family.
        num_images_per_prompt: as the pipeline's.
        generator: one for each image, so that one image can be generated again alone; None makes
            them. They are used as the pipeline would, and retries use copies.
        first: what the plain pipeline made of these generators, `(B, 3, H, W)` in [0, 1], where it
            exists already: it is judged in place of a first generation.
        output_type: `"pil"`, or `"pt"` for tensors (3, H, W) in [0, 1].
        call: further arguments of the pipeline's call; `negative_prompt` may be a list.

    Returns:
        `NudgedImages`. Images that pass at once are bit-identical to the pipeline's own.

    Raises:
        ValueError, TypeError: arguments that cannot be right.
        NudgingFailed: see `on_failure`.
        Exception: whatever the pipeline raises; it is left as it was.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if on_failure not in ("flag", "raise"):
        raise ValueError(f'on_failure must be "flag" or "raise", got {on_failure!r}')
    if output_type not in ("pil", "pt"):
        raise ValueError(f'output_type must be "pil" or "pt", got {output_type!r}')
    if isinstance(max_attempts, bool) or not isinstance(max_attempts, int) or max_attempts < 1:
        raise ValueError(f"max_attempts must be a positive integer, got {max_attempts!r}")
    if not filters:
        raise ValueError("filters is empty, so nothing would ever be judged")
    schedule = schedule or NudgeSchedule()
    if method in ("nudge", "both"):
        _check_callback(pipe)
    run = _Run(pipe, prompt, num_images_per_prompt, generator, call)
    away, toward = _Candidates(undesired), _by_prompt(desired, run.prompts)
    images = run.generate(range(run.count)) if first is None else _existing(first, run.count)
    height, width = images.shape[-2:]
    attempts: list[list[Attempt]] = [[Attempt(0, verdicts)] for verdicts in judge(filters, images)]
    for number in range(1, max_attempts):
        flagged = [i for i, rows in enumerate(attempts) if not rows[-1].passed]
        if not flagged:
            break
        points = None
        if method != "reseed":
            points = _choose(
                images[flagged],
                [run.seed_of(item) for item in flagged],
                away,
                [toward[run.prompts[item]] for item in flagged],
                schedule,
                number,
            )
        steer = _Steering(pipe, points, schedule, method, number, negtome, (height, width))
        again = torch.empty_like(images[flagged])
        for places in steer.batches(len(flagged)):
            chosen = [flagged[place] for place in places]
            with steer.applied(places) as callback:
                again[places] = run.generate(
                    chosen, callback, reseed=number if method == "reseed" else 0
                )
        images[flagged] = again
        for place, verdicts in enumerate(judge(filters, again)):
            attempts[flagged[place]].append(steer.attempt(place, verdicts))
    result = NudgedImages(
        run.as_pil(images) if output_type == "pil" else list(images),
        tuple(tuple(rows) for rows in attempts),
        {
            "method": method,
            "max_attempts": max_attempts,
            "schedule": asdict(schedule),
            "filters": [one.name for one in filters],
            "prompts": run.prompts,
        },
    )
    if on_failure == "raise" and not all(result.passed):
        raise NudgingFailed(result)
    return result


def _existing(first: Tensor, count: int) -> Tensor:
    if first.dim() != 4 or first.shape[:2] != (count, 3):
        raise ValueError(f"first must be ({count}, 3, H, W) in [0, 1], got {tuple(first.shape)}")
    return first.detach().float().cpu().clone()


class _Run:
    """The pipeline's call, for all images or for some of them again."""

    def __init__(
        self,
        pipe: Any,
        prompt: str | Sequence[str],
        images_per_prompt: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        call: dict[str, Any],
    ) -> None:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompt must be a string or several, got {prompt!r}")
        if "callback_on_step_end" in call and not callable(call["callback_on_step_end"]):
            raise TypeError("callback_on_step_end must be callable")
        if "latents" in call:
            raise ValueError(
                "latents cannot be given: hand over generators, from which every "
                "attempt draws the same noise"
            )
        self._pipe, self._prompt, self._call = pipe, prompt, call
        self._per_prompt = images_per_prompt
        self.prompts = [p for p in prompts for _ in range(images_per_prompt)]
        self.count = len(self.prompts)
        self._generators = self._one_each(generator)
        self._states = [g.get_state() for g in self._generators]

    def _one_each(
        self, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> list[torch.Generator]:
        if generator is None:
            return [
                torch.Generator().manual_seed(int(torch.randint(2**62, ())))
                for _ in range(self.count)
            ]
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != self.count:
            raise ValueError(
                f"{self.count} images need a generator each, so that one can be made again alone; "
                f"got {len(generators)}"
            )
        return generators

    def generate(
        self,
        items: Sequence[int],
        callback: Callable[..., dict[str, Any]] | None = None,
        reseed: int = 0,
    ) -> Tensor:
        """These images, `(len(items), 3, H, W)` in [0, 1] fp32 on the CPU."""
        call = dict(self._call)
        if len(items) == self.count and callback is None and not reseed:
            prompt, generators = self._prompt, self._generators
            call["num_images_per_prompt"] = self._per_prompt
        else:
            prompt = [self.prompts[i] for i in items]
            generators = [self._copy(i, reseed) for i in items]
            for name, value in call.items():
                if name.startswith(_TEXTS) and isinstance(value, (str, list)):
                    call[name] = [self._text_of(name, value, i) for i in items]
        if callback is not None:
            call["callback_on_step_end"] = _both(call.get("callback_on_step_end"), callback)
            inputs = call.get("callback_on_step_end_tensor_inputs", ["latents"])
            call["callback_on_step_end_tensor_inputs"] = [*{*inputs, "latents"}]
        images = self._pipe(prompt, generator=generators, output_type="pt", **call).images
        return images.float().cpu()

    def _text_of(self, name: str, value: str | list[str], item: int) -> str:
        if isinstance(value, str):
            return value
        prompts = self.count // self._per_prompt
        if len(value) != prompts:
            raise ValueError(f"{name} must have {prompts} entries, got {len(value)}")
        return value[item // self._per_prompt]

    def _copy(self, item: int, reseed: int) -> torch.Generator:
        copied = torch.Generator(self._generators[item].device)
        copied.set_state(self._states[item])
        if reseed:
            copied.manual_seed(_other_seed(self.seed_of(item), reseed))
        return copied

    def seed_of(self, item: int) -> int:
        return self._generators[item].initial_seed()

    def as_pil(self, images: Tensor) -> list[Any]:
        """As the pipeline's own post-processing does."""
        processor = self._pipe.image_processor
        return list(processor.numpy_to_pil(processor.pt_to_numpy(images)))


def _both(first: Callable[..., Any] | None, second: Callable[..., Any]) -> Callable[..., Any]:
    """The caller's callback, then ours on what it left."""
    if first is None:
        return second

    def call(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        changed = first(pipe, step, timestep, tensors) or {}
        return {**changed, **second(pipe, step, timestep, {**tensors, **changed})}

    return call


@dataclass(frozen=True)
class _Points:
    """What one image is steered away from and toward, `(k, 3, S, S)` uint8, with their names."""

    undesired: Tensor
    undesired_names: tuple[str, ...]
    desired: Tensor | None
    desired_names: tuple[str, ...]


class _Steering:
    """What one attempt does to the images that are generated again; `points` None is nothing."""

    def __init__(
        self,
        pipe: Any,
        points: Sequence[_Points] | None,
        schedule: NudgeSchedule,
        method: Method,
        number: int,
        negtome: NegToMeConfig | None,
        size: tuple[int, int],
    ) -> None:
        self._pipe, self._points, self._schedule = pipe, points, schedule
        self._method, self._number, self._negtome, self._size = method, number, negtome, size
        self._factor = schedule.escalation ** (number - 1)
        # Read when the attempt is over, so that no step waits for the device.
        self._moves: list[tuple[list[int], Tensor]] = []

    def batches(self, images: int) -> Iterator[list[int]]:
        """Places of images that can be generated together."""
        if self._points is None or self._method == "nudge":
            yield list(range(images))
            return
        # NegToMe has the same references for a whole batch.
        alike: dict[tuple[str, ...], list[int]] = {}
        for place, points in enumerate(self._points):
            alike.setdefault(points.undesired_names, []).append(place)
        yield from alike.values()

    @contextmanager
    def applied(self, places: list[int]) -> Iterator[Callable[..., dict[str, Any]] | None]:
        """The pipeline steered for these images; as it was afterwards."""
        if self._points is None:
            yield None
            return
        points = [self._points[place] for place in places]
        callback = None
        if self._method in ("nudge", "both"):
            callback = self._callback(places, points)
        if self._method == "nudge":
            yield callback
            return
        from ..pipelines import negtome_guidance
        from ..pipelines.references import Reference

        config = self._negtome or _preset(_layout(self._pipe))
        references = [
            Reference(image.permute(1, 2, 0).numpy(), alpha=config.alpha * self._factor)
            for image in points[0].undesired
        ]
        with negtome_guidance(self._pipe, config, reference=references):
            yield callback

    def attempt(self, place: int, verdicts: tuple[Verdict, ...]) -> Attempt:
        """The record of the image at this place."""
        if self._points is None:
            return Attempt(self._number, verdicts)
        points, nudged = self._points[place], self._method in ("nudge", "both")
        return Attempt(
            self._number,
            verdicts,
            points.undesired_names,
            points.desired_names if nudged else (),
            self._schedule.beta * self._factor if nudged else None,
            sum(float(d[places.index(place)]) for places, d in self._moves if place in places),
        )

    def _callback(
        self, places: list[int], points: Sequence[_Points]
    ) -> Callable[..., dict[str, Any]]:
        from .latents import LatentPoints

        schedule, layout = self._schedule, _layout(self._pipe)

        def latents_of(pictures: Sequence[Tensor]) -> LatentPoints:
            pixels = [own.float() / 255 for own in pictures]
            return LatentPoints(self._pipe, layout, pixels, self._size)

        away = latents_of([one.undesired for one in points])
        wanted = [one.desired for one in points if one.desired is not None]
        toward = latents_of(wanted) if wanted else None
        start, end = schedule.window
        end = min(1.0, end + schedule.extend * (self._number - 1))

        def move(pipe: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
            total = len(pipe.scheduler.timesteps)
            # Sums of fractions are rounded: the last step of the window is part of it.
            if not start - 1e-9 <= (step + 1) / total <= end + 1e-9:
                return {}
            latents = tensors["latents"]
            result = nudge(
                latents,
                None if toward is None else toward.at_step(pipe.scheduler, latents, step + 1),
                away.at_step(pipe.scheduler, latents, step + 1),
                alpha=schedule.alpha * self._factor,
                beta=schedule.beta * self._factor,
                objective=schedule.objective,
                steps=schedule.steps,
                step_size=schedule.step_size,
                max_distance=schedule.max_distance
                * self._factor
                * latents.flatten(1).float().norm(dim=1).clamp_min(1e-6),
            )
            self._moves.append((places, result.distance))
            return {"latents": result.latents}

        return move


def _preset(layout: Layout) -> NegToMeConfig:
    return NegToMeConfig.preset(layout.preset) if layout.preset else NegToMeConfig()


def _other_seed(seed: int, attempt: int) -> int:
    """A seed for a retry, far from those of other images."""
    return (seed + 0x9E3779B97F4A7C15 * attempt) % 2**63


def _layout(pipe: Any) -> Layout:
    from ..pipelines.api import _denoisers
    from ..pipelines.layouts import layout_of

    return layout_of(next(iter(_denoisers(pipe)[0])))


def _check_callback(pipe: Any) -> None:
    """Raises `ValueError` where latents cannot be reached between the steps."""
    arguments = inspect.signature(type(pipe).__call__).parameters
    called = "callback_on_step_end" in arguments or any(
        argument.kind is argument.VAR_KEYWORD for argument in arguments.values()
    )
    if not called or "latents" not in getattr(pipe, "_callback_tensor_inputs", ("latents",)):
        raise ValueError(
            f"{type(pipe).__name__} hands no latents to callback_on_step_end, so they cannot be "
            "nudged; use method='negtome' or 'reseed'"
        )


class _Candidates:
    """A bank whose images points are chosen from, by their pixels."""

    def __init__(self, bank: ReferenceBank) -> None:
        self.bank = bank

    @cached_property
    def _thumbnails(self) -> Tensor:
        # Made when the first image is flagged: what passes at once pays nothing for it.
        return self.bank.thumbnails(THUMBNAIL)

    def nearest(self, image: Tensor, count: int) -> Tensor:
        """Rows `(count,)` of the bank that are nearest to `(3, H, W)`, or all it has."""
        count = min(count, len(self.bank))
        return select_nearest(resized(image[None], THUMBNAIL), self._thumbnails, count)[1][0]

    def names(self, rows: Tensor) -> tuple[str, ...]:
        return tuple(self.bank.names[row] for row in rows.tolist())


def _by_prompt(
    desired: ReferenceBank | Mapping[str, ReferenceBank] | None, prompts: Sequence[str]
) -> dict[str, _Candidates | None]:
    """The desired images of each prompt."""
    if not isinstance(desired, Mapping):
        one = None if desired is None else _Candidates(desired)
        return dict.fromkeys(prompts, one)
    missing = [prompt for prompt in prompts if prompt not in desired]
    if missing:
        raise ValueError(f"desired has no bank for the prompt {missing[0]!r}")
    return {prompt: _Candidates(desired[prompt]) for prompt in prompts}


def _choose(
    images: Tensor,
    seeds: Sequence[int],
    undesired: _Candidates,
    desired: Sequence[_Candidates | None],
    schedule: NudgeSchedule,
    attempt: int,
) -> list[_Points]:
    """Of each image the nearest undesired points, and some desired ones near it, by its seed."""
    # As many for each image, so that one launch can nudge them all.
    count = min([schedule.nearest, *(len(one.bank) for one in desired if one is not None)])
    chosen = []
    for image, seed, toward in zip(images, seeds, desired, strict=True):
        away = undesired.nearest(image, schedule.nearest)
        pictures: Tensor | None = None
        names: tuple[str, ...] = ()
        if toward is not None:
            near = toward.nearest(image, schedule.pool)
            random = torch.Generator().manual_seed(_other_seed(seed, attempt))
            near = near[torch.randperm(len(near), generator=random)[:count]]
            pictures, names = toward.bank.images[near], toward.names(near)
        away_names = undesired.names(away)
        chosen.append(_Points(undesired.bank.images[away], away_names, pictures, names))
    return chosen
