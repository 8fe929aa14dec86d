"""What `negtome-fast eval own` is asked for: a model, prompts, and the conditions of both.

Every option of the guidance that has several values multiplies the conditions; a negative prompt
doubles them. All of it is checked before a model is loaded.
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
from ...sampler import _SEEDS as SEEDS
from ...sampler import Group

NAME = "own"

#: Of `METRICS`, those that mean something for a few images and need no real ones beside them.
OFFERED = ("embedded", "dreamsim", "clip", "lpips")

UNGUIDED, NEGATIVE, GUIDED = "unguided", "negative prompt", "NegToMe"

#: Options that take several values, and the words for one of them in a condition's name.
SWEPT = {
    "alpha": "alpha {:.15g}",
    "threshold": "threshold {:.15g}",
    "t_end": "t >= {:.15g}",
    "steps_window": "steps {0[0]:.15g} to {0[1]:.15g}",
    "reference": "reference {}",
}


@dataclass(frozen=True)
class Condition:
    """How the images of a prompt are made; drawn at every guidance scale.

    Attributes:
        name: in tables; unique.
        guidance: fields of `NegToMeConfig` on top of the request's; None is without guidance.
        negative: whether the request's negative prompt is used.
    """

    name: str
    guidance: Mapping[str, Any] | None = None
    negative: bool = False

    @property
    def draft(self) -> str:
        """The name of the same condition without guidance."""
        return NEGATIVE if self.negative else UNGUIDED

    def settings(self, base: generation.Settings, scale: float | None) -> generation.Settings:
        """Those of the request for this condition at a guidance scale."""
        return replace(
            base,
            guidance_scale=scale,
            negative_prompt=base.negative_prompt if self.negative else None,
            guidance={**base.guidance, **(self.guidance or {})},
        )


@dataclass(frozen=True)
class Request:
    """What is drawn and measured.

    Attributes:
        settings: model, prompts, images of each, seed, references, and what the pipeline and the
            guidance take; `guidance_scale` is set for each of `scales`. With a negative prompt all
            is drawn without and with it. The preset "sharpen" pushes every image from its own
            blurred, unguided copy.
        group: images of a prompt that are guided together.
        scales: of classifier-free guidance; None is the pipeline's own.
        guidances: fields of `NegToMeConfig` on top of those of `settings`, by the condition's name.
        metrics: names in `OFFERED`.
        command: that was given, for the record.
    """

    settings: generation.Settings
    group: int = 4
    scales: tuple[float | None, ...] = (None,)
    guidances: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {GUIDED: {}})
    metrics: tuple[str, ...] = ("embedded",)
    command: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Refuses what cannot be right before anything is loaded."""
        images = self.settings.images
        unknown = [name for name in self.metrics if name not in OFFERED]
        if unknown:
            raise ValueError(
                f"--metric {unknown[0]}: there are {', '.join(OFFERED)}; fid and inception, which "
                "take thousands of images, are in negtome_fast.studies.external"
            )
        if self.group < 2:
            raise ValueError(f"--group must be 2 or more images, got {self.group}")
        if images < 1 or images % self.group:
            raise ValueError(f"-n {images} does not divide into groups of {self.group}: --group")
        if images > SEEDS:
            raise ValueError(f"-n must be {SEEDS} or fewer images of a prompt, got {images}")
        if images * len(self.settings.prompts) < 2 * self.group:
            raise ValueError("an interval needs two groups of images: more prompts, or a larger -n")
        if any(scale is not None and not math.isfinite(scale) for scale in self.scales):
            raise ValueError("--guidance-scale must be finite numbers")
        if len(set(self.scales)) < len(self.scales):
            raise ValueError("--guidance-scale has a value twice")
        self._check_purpose()
        for condition in self.conditions():
            condition.settings(self.settings, self.scales[0]).check()

    def _check_purpose(self) -> None:
        settings = self.settings
        sharpens = settings.preset == "sharpen"
        if sharpens and settings.references:
            raise ValueError("--sharpen and --avoid are two studies: ask for one of them")
        if sharpens and not 0 < settings.blur < math.inf:
            raise ValueError(f"--sharpen is the radius of a blur, above 0, got {settings.blur:g}")
        if (sharpens or settings.references) and any(
            "reference" in {**settings.guidance, **more} for more in self.guidances.values()
        ):
            raise ValueError(
                "--reference first or others is of the images of a group; with "
                f"{'--sharpen' if sharpens else '--avoid'} leave it out"
            )
        if settings.negative_prompt is not None and "negative_prompt" in settings.call:
            raise ValueError("--negative-prompt and --argument negative_prompt: give one of them")

    def conditions(self) -> list[Condition]:
        """Without guidance first; each with and without the negative prompt, if there is one."""
        found = [Condition(UNGUIDED)]
        found += [Condition(name, more) for name, more in self.guidances.items()]
        if self.settings.negative_prompt is None:
            return found
        names = [NEGATIVE, *(f"{one.name} + {NEGATIVE}" for one in found[1:])]
        with_it = [replace(a, name=b, negative=True) for a, b in zip(found, names, strict=True)]
        return [one for both in zip(found, with_it, strict=True) for one in both]

    def groups(self) -> list[Group]:
        """Every image has a seed of its own, so that prompts are independent samples.

        More images or prompts leave the groups of a smaller request as they are.
        """
        first = self.settings.seed
        return [
            Group(prompt, tuple(first + number * SEEDS + start + i for i in range(self.group)))
            for number, prompt in enumerate(self.settings.prompts)
            for start in range(0, self.settings.images, self.group)
        ]


def request(options: Mapping[str, Any]) -> Request:
    """Of the options of the command line that were given, by name.

    Those of `SWEPT` and `scales` are lists; `references` are of `generation.ReferenceFile`.
    """
    values = dict(options)
    if "model" not in values or "prompts" not in values:
        raise ValueError("eval own needs --model and --prompt: which model, and what it draws")
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
"""Of `NegToMeConfig`, where the option has another name."""


def _several(values: dict[str, Any]) -> dict[str, list[Any]]:
    """Options with more than one value; leaves the first of each in `values`."""
    several = {}
    for name in SWEPT:
        if name not in values:
            continue
        given = [tuple(one) if isinstance(one, list) else one for one in values[name]]
        if len(set(given)) < len(given):
            raise ValueError(f"--{name.replace('_', '-')} has a value twice")
        values[name] = given[0]
        if len(given) > 1:
            several[name] = given
    return several


def _command(options: Mapping[str, Any]) -> str:
    """The command line of these options."""
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
            # As JSON, so that text which looks like a number stays text.
            words += [w for key, v in value for w in ("--argument", f"{key}={json.dumps(v)}")]
        elif isinstance(value, (list, tuple)):
            words += [option, *map(str, value)]
        else:
            words += [option, str(value)]
    return shlex.join(words)
