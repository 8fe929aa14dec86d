"""The request of `negtome-fast eval own`: a model, prompts, and the conditions to draw.

Every setting of the guidance with several values multiplies the conditions; a negative prompt
doubles them. Everything is checked before a model is loaded.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from .... import generation
from ...conditions import SEEDS_PER_PROMPT, Group

NAME = "own"

#: Names in `METRICS` that mean something for a few images and need no real images.
OFFERED = ("embedded", "dreamsim", "clip", "lpips")

MOST_SCALE = 1_000_000
"""Largest guidance scale."""
MOST_STEPS = 10_000
"""Largest number of steps; a scheduler has 1,000 to choose from."""
MOST_BLUR = 1000
"""Largest radius of a blur, in 64ths of the longer side, which leaves one colour."""

UNGUIDED, NEGATIVE, GUIDED = "unguided", "negative prompt", "NegToMe"

#: Options that take several values, and how a condition's name shows one of them.
SWEPT = {
    "alpha": "alpha {:.15g}",
    "threshold": "threshold {:.15g}",
    "t_end": "t >= {:.15g}",
    "steps_window": "steps {0[0]:.15g} to {0[1]:.15g}",
    "reference": "reference {}",
}


@dataclass(frozen=True)
class OwnCondition:
    """A way to make images of a prompt; it is drawn at every guidance scale.

    Attributes:
        name: label in tables, unique in a request.
        guidance: fields of `NegToMeConfig` that override the request's; None: no guidance.
        negative: use the request's negative prompt.
    """

    name: str
    guidance: Mapping[str, Any] | None = None
    negative: bool = False

    @property
    def draft(self) -> str:
        """The name of the same condition without guidance."""
        return NEGATIVE if self.negative else UNGUIDED

    def settings(self, base: generation.Settings, scale: float | None) -> generation.Settings:
        """Return the request's settings `base` for this condition at a guidance scale."""
        return replace(
            base,
            guidance_scale=scale,
            negative_prompt=base.negative_prompt if self.negative else None,
            guidance={**base.guidance, **(self.guidance or {})},
        )


@dataclass(frozen=True)
class Request:
    """The images to draw and the measures to take.

    Attributes:
        settings: model, prompts, images per prompt, seed, references, and the arguments of
            pipeline and guidance; `guidance_scale` is replaced by each of `scales`. With a negative
            prompt, everything is drawn without and with it. The preset "sharpen" pushes every
            image away from its own blurred, unguided copy.
        group: number of images of a prompt that are guided together.
        scales: classifier-free guidance scales; None: the pipeline's default.
        guidances: fields of `NegToMeConfig` that override those of `settings`, by condition name.
        metrics: names in `OFFERED`.
        command: the command line, for the record.

    Raises:
        ValueError: a field is invalid; nothing is loaded for the check.
    """

    settings: generation.Settings
    group: int = 4
    scales: tuple[float | None, ...] = (None,)
    guidances: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {GUIDED: {}})
    metrics: tuple[str, ...] = ("embedded",)
    command: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        images = self.settings.images
        unknown = [name for name in self.metrics if name not in OFFERED]
        if unknown:
            raise ValueError(
                f"`metrics`: {unknown[0]!r} is unknown, choose from {', '.join(OFFERED)}; fid and "
                "inception, which take thousands of images, are in negtome_fast.studies.external"
            )
        if self.group < 2:
            raise ValueError(f"`group` must be 2 or more images, got {self.group}")
        if images < 1 or images % self.group:
            raise ValueError(
                f"`images` must divide into groups of {self.group}, got {images}: change one of "
                "`images` and `group`"
            )
        if images > SEEDS_PER_PROMPT:
            raise ValueError(
                f"`images` must be {SEEDS_PER_PROMPT} or fewer for each prompt, got {images}"
            )
        if images * len(self.settings.prompts) < 2 * self.group:
            raise ValueError(
                "an interval needs two groups of images: give more `prompts` or more `images`"
            )
        if any(scale is not None and not math.isfinite(scale) for scale in self.scales):
            raise ValueError("`guidance_scale` must be finite numbers")
        if any(scale is not None and not 0 <= scale <= MOST_SCALE for scale in self.scales):
            raise ValueError(
                f"`guidance_scale` must be between 0 and {MOST_SCALE:,}, got {self.scales}"
            )
        if len(set(self.scales)) < len(self.scales):
            raise ValueError("`guidance_scale` has a value twice")
        if self.settings.steps is not None and self.settings.steps > MOST_STEPS:
            raise ValueError(f"`steps` must be 1 to {MOST_STEPS:,}, got {self.settings.steps}")
        self._check_purpose()
        for condition in self.conditions():
            condition.settings(self.settings, self.scales[0]).check()

    def _check_purpose(self) -> None:
        settings = self.settings
        sharpens = settings.preset == "sharpen"
        if sharpens and settings.references:
            raise ValueError("`sharpen` and `references` are two studies: ask for one of them")
        if sharpens and not 0 < settings.blur <= MOST_BLUR:
            raise ValueError(
                f"`sharpen` is the radius of a blur, above 0 and up to {MOST_BLUR}, "
                f"got {settings.blur:g}"
            )
        if (sharpens or settings.references) and any(
            "reference" in {**settings.guidance, **more} for more in self.guidances.values()
        ):
            raise ValueError(
                "`reference` chooses among the images of a group; leave it out with "
                f"`{'sharpen' if sharpens else 'references'}`"
            )
        if settings.negative_prompt is not None and "negative_prompt" in settings.call:
            raise ValueError("`negative_prompt` is also an argument in `call`: give one of them")

    def conditions(self) -> list[OwnCondition]:
        """Return all conditions, unguided first; each without and with a negative prompt."""
        found = [OwnCondition(UNGUIDED)]
        found += [OwnCondition(name, more) for name, more in self.guidances.items()]
        if self.settings.negative_prompt is None:
            return found
        names = [NEGATIVE, *(f"{one.name} + {NEGATIVE}" for one in found[1:])]
        with_it = [replace(a, name=b, negative=True) for a, b in zip(found, names, strict=True)]
        return [one for both in zip(found, with_it, strict=True) for one in both]

    def groups(self) -> list[Group]:
        """Return the groups of all prompts.

        No two images share a seed, so that prompts are independent samples. A request for more
        images or prompts has all groups of a smaller one.
        """
        first = self.settings.seed
        return [
            Group(prompt, tuple(range(start, start + self.group)))
            for number, prompt in enumerate(self.settings.prompts)
            for start in range(
                first + number * SEEDS_PER_PROMPT,
                first + number * SEEDS_PER_PROMPT + self.settings.images,
                self.group,
            )
        ]


def request(options: Mapping[str, Any]) -> Request:
    """Return the request for the given options of the command line, by name.

    Args:
        options: those of `SWEPT` and `scales` are lists; `references` are `ReferenceFile` objects.

    Raises:
        ValueError: an option is missing or invalid.
    """
    values = dict(options)
    if "model" not in values or "prompts" not in values:
        raise ValueError("eval own needs a `model` and `prompts`")
    several = _several(values)
    guidance = generation.take_guidance(values)
    fields = [_FIELDS.get(name, name) for name in several]
    guidance = {name: value for name, value in guidance.items() if name not in fields}
    guidances = {}
    for each in product(*several.values()):
        words = [SWEPT[name].format(value) for name, value in zip(several, each, strict=True)]
        guidances[", ".join([GUIDED, *words])] = dict(zip(fields, each, strict=True))
    of_request = {name: values.pop(name) for name in ("group",) if name in values}
    for name in ("scales", "metrics"):
        if name in values:
            of_request[name] = tuple(values.pop(name))
    if "sharpen" in values:
        values |= {"preset": "sharpen", "blur": values.pop("sharpen")}
    elif "references" in values:
        alphas = several.get("alpha", [guidance.get("alpha", 0)])
        values["preset"] = "interpolate" if all(alpha < 0 for alpha in alphas) else "avoid"
    settings = generation.Settings(
        **{
            "images": 8,
            **values,
            "prompts": tuple(values["prompts"]),
            "call": dict(values.get("call", {})),
            "guidance": guidance,
        }
    )
    return Request(settings, guidances=guidances, command=_command(options), **of_request)


_FIELDS = {"steps_window": "steps"}
"""Fields of `NegToMeConfig` whose option has another name."""


def _several(values: dict[str, Any]) -> dict[str, list[Any]]:
    """Return options with more than one value; leaves the first of each in `values`."""
    several = {}
    for name in SWEPT:
        if name not in values:
            continue
        given = [tuple(one) if isinstance(one, list) else one for one in values[name]]
        if len(set(given)) < len(given):
            raise ValueError(f"`{name}` has a value twice")
        values[name] = given[0]
        if len(given) > 1:
            several[name] = given
    return several


def _command(options: Mapping[str, Any]) -> str:
    """Return the command line of these options."""
    renamed = {"prompts": "prompt", "metrics": "metric", "scales": "guidance-scale"}
    words = ["negtome-fast", "eval", NAME]
    for name, value in options.items():
        option = f"--{renamed.get(name, name).replace('_', '-')}"
        if name == "prompts":
            words += [word for prompt in value for word in (option, prompt)]
        elif name == "steps_window":
            words += [word for window in value for word in (option, *map(str, window))]
        elif name == "references":
            for reference in value:
                words += ["--avoid", reference.image]
                words += ["--mask", reference.mask] if reference.mask else []
                words += [] if reference.noise else ["--clean-reference"]
        elif name == "call":
            # Values are JSON, so that text which looks like a number stays text.
            words += [w for key, v in value for w in ("--argument", f"{key}={json.dumps(v)}")]
        elif isinstance(value, (list, tuple)):
            words += [option, *map(str, value)]
        else:
            words += [option, str(value)]
    return shlex.join(words)
