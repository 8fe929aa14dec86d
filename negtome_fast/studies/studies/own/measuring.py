"""The chosen measures of groups of images, and their differences to unguided ones, with intervals.

Each group has one value of a measure. The bootstrap draws whole groups, the same in all conditions.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .... import generation
from ...conditions import Group
from ...external import METRICS, Batch, Metric
from ...intervals import Mean, bootstrap, paired_bootstrap
from ...measures import contrast
from ...scores import triple
from .drawing import DrawPlan
from .request import UNGUIDED, Request

_NEEDS_MANY = {"inception-style score"}
"""Metrics of `embedded` that mean nothing for a few images."""

_CONTRAST = Metric("contrast", "higher", lambda batch: float(contrast(batch.images).mean()))


class Meter:
    """The measures that a request asks for and has the inputs for.

    Attributes:
        metrics: the measures.

    Raises:
        ValueError: the weights of a metric cannot be loaded.
        ImportError: a package is missing; names the extra to install.
    """

    def __init__(self, wanted: Request) -> None:
        settings = wanted.settings
        self._references = [entry.load().load() for entry in settings.references]
        given = {"prompts", *(["target"] if self._references else [])}
        self.metrics = [
            metric
            for name in dict.fromkeys(wanted.metrics)
            for metric in _metrics(name, settings.device or generation.default_device())
            if set(metric.needs) <= given and metric.name not in _NEEDS_MANY
        ]
        if settings.preset == "sharpen":
            self.metrics.append(_CONTRAST)

    def record(self, group: Group, part: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return a group's entry in the file of results; `part` comes from `Drawing.group`."""
        images = torch.from_numpy(part["images"]).permute(0, 3, 1, 2).float() / 255
        target = self._target(images) if self._references else None
        batch = Batch(images, [group.prompt] * len(images), target=target)
        return {
            "prompt": group.prompt,
            "seeds": list(group.seeds),
            "seconds_an_image": round(float(part["seconds"]), 4),
            "pushed": round(float(part["pushed"]), 6),
            "measures": {metric.name: round(metric(batch), 6) for metric in self.metrics},
        }

    def _target(self, images: Tensor) -> Tensor:
        """Return the references as the guidance sees them, (M, 3, H, W) in [0, 1].

        They have the size of `images`.
        """
        height, width = images.shape[-2:]
        pictures = torch.cat([one.pixels((1, height, width)) for one in self._references])
        return (pictures / 2 + 0.5).clamp(0, 1)

    def better(self, alphas: Sequence[float]) -> dict[str, str]:
        """Return which direction of each measure is an improvement, "" if it depends on alpha.

        Args:
            alphas: alpha of every condition; a negative one pulls toward the references.
        """
        toward = {alpha < 0 for alpha in alphas}
        found: dict[str, str] = {}
        for metric in self.metrics:
            better: str = metric.better
            if "target" in metric.needs and True in toward:
                other = {"lower": "higher", "higher": "lower"}[better]
                better = other if toward == {True} else ""
            found[metric.name] = better
        return found


def _metrics(name: str, device: str) -> list[Metric]:
    try:
        made = METRICS[name]() if name == "embedded" else METRICS[name](device)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"`metrics`: the weights of {name} cannot be loaded: {reason}") from error
    return [made] if isinstance(made, Metric) else made


def compared(
    plans: Sequence[DrawPlan], drawn: Mapping[str, Sequence[dict[str, Any]]]
) -> dict[str, Any]:
    """Return all conditions of a scale for the file of results, with differences to unguided.

    Args:
        plans: the plans of the scale, unguided first.
        drawn: the records of each condition's groups, by name, all in the same order.
    """
    prompts = [part["prompt"] for part in drawn[UNGUIDED]]
    # With one group per prompt, nothing can be drawn within a prompt: prompts are drawn instead.
    strata = prompts if min(map(prompts.count, prompts)) > 1 else None
    names = list(drawn[UNGUIDED][0]["measures"])

    def values(parts: Sequence[dict[str, Any]], name: str) -> list[float]:
        return [part["measures"][name] for part in parts]

    conditions = {}
    for plan in plans:
        parts = drawn[plan.condition.name]
        entry: dict[str, Any] = {
            "config": None if plan.config is None else plan.config.to_dict(),
            "negative_prompt": plan.condition.negative,
            "seconds_an_image": statistics.median(part["seconds_an_image"] for part in parts),
            "pushed": statistics.mean(part["pushed"] for part in parts),
            "measures": {
                name: triple(bootstrap(Mean(), values(parts, name), strata=strata))
                for name in names
            },
        }
        if plan.condition.name != UNGUIDED:
            entry["compared"] = {}
            for name in names:
                sides = (values(one, name) for one in (parts, drawn[UNGUIDED]))
                found = paired_bootstrap(Mean(), *sides, strata=strata)
                entry["compared"][name] = {"difference": triple(found), "verdict": found.verdict}
        conditions[plan.condition.name] = {**entry, "groups": list(parts)}
    return {
        "guidance_scale": plans[0].scale,
        "call": {key: generation.plain_value(value) for key, value in plans[0].call.items()},
        "drawn": "groups within prompts" if strata else "groups",
        "conditions": conditions,
    }
