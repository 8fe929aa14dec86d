"""Images of a condition, drawn one guidance group at a time with any pipeline, and stored.

Every group is stored under a hash of everything that decides its images. An interrupted run
therefore resumes, and runs share the groups that they have in common.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .... import generation
from ....config import NegToMeConfig
from ...conditions import Group, reference_identity
from ...store import Arrays, digest, fetch
from .request import NAME, OwnCondition, Request

if TYPE_CHECKING:
    from ....pipelines import Reference

_WITHOUT_EFFECT = (
    "`negative_prompt` has no effect without classifier-free guidance: use a `guidance_scale` "
    "above 1, or `true_cfg_scale` for a distilled model"
)


@dataclass(frozen=True)
class DrawPlan:
    """A condition at a guidance scale, for one pipeline.

    Attributes:
        condition: the condition.
        scale: classifier-free guidance scale; None: the pipeline's default.
        call: arguments of the pipeline's call, without prompt, number of images and generators.
        config: the complete configuration of the guidance; None: no guidance.
    """

    condition: OwnCondition
    scale: float | None
    call: Mapping[str, Any]
    config: NegToMeConfig | None


def plans(wanted: Request, pipe: Any) -> list[list[DrawPlan]]:
    """Return the plans of every scale, each in the order of the conditions.

    Raises:
        ValueError: a setting does not fit the pipeline, or would change nothing.
    """
    found = []
    for scale in wanted.scales:
        of_scale = []
        for condition in wanted.conditions():
            settings = condition.settings(wanted.settings, scale)
            call = generation.call_arguments(pipe, settings)
            if wanted.settings.negative_prompt is not None:
                _prepare_negative(pipe, call)
            guided = condition.guidance is not None
            config = generation.configuration(pipe, settings) if guided else None
            of_scale.append(DrawPlan(condition, scale, call, config))
        found.append(of_scale)
    calls = [of_scale[0].call for of_scale in found]
    if any(call in calls[:number] for number, call in enumerate(calls)):
        raise ValueError(
            "`guidance_scale` changes nothing: another setting gives the pipeline the same argument"
        )
    return found


def _prepare_negative(pipe: Any, call: dict[str, Any]) -> None:
    """Set an empty negative prompt, so that conditions differ in the negative prompt alone.

    Pipelines with a true_cfg_scale run no classifier-free guidance at all without a negative
    prompt. `check_differ` covers other pipelines.

    Raises:
        ValueError: the scale switches classifier-free guidance off.
    """
    scale = inspect.signature(type(pipe).__call__).parameters.get("true_cfg_scale")
    if scale is not None:
        if call.get("true_cfg_scale", scale.default) <= 1:
            raise ValueError(_WITHOUT_EFFECT)
        call.setdefault("negative_prompt", "")


def check_differ(plain: Mapping[str, np.ndarray], negative: Mapping[str, np.ndarray]) -> None:
    """Raise `ValueError` if a negative prompt changed no pixel of a group.

    Only the images show it, since pipelines start to use the prompt at different scales.
    """
    if np.array_equal(plain["images"], negative["images"]):
        raise ValueError(_WITHOUT_EFFECT)


class Drawing:
    """Groups of images from one pipeline; draws those that the store does not have.

    Args:
        wanted: the request.
        pipe: the pipeline of its model.
        store: folder of the drawn images.
    """

    def __init__(self, wanted: Request, pipe: Any, store: Path) -> None:
        self._settings, self._pipe, self._store = wanted.settings, pipe, store / NAME
        self._references = [entry.load() for entry in wanted.settings.references]
        self._drafts = wanted.settings.preset == "sharpen"

    def missing(self, plan: DrawPlan, groups: Sequence[Group]) -> int:
        """Return how many images would have to be drawn."""
        return sum(len(g.seeds) for g in groups if not self._path(plan, g).is_file())

    def group(
        self, plan: DrawPlan, group: Group, draft: Mapping[str, np.ndarray] | None = None
    ) -> Arrays:
        """Return images uint8 (N, H, W, 3), seconds per image, and the share of pushed tokens.

        Args:
            plan: how the images are made.
            group: their prompt and seeds.
            draft: the group of the same plan without guidance, needed to sharpen.
        """

        def make() -> Arrays:
            if self._drafts and plan.config is not None:
                assert draft is not None  # of the same seeds
                return self._sharpened(plan, group, draft)
            return self._drawn(plan, group.prompt, group.seeds, self._references)

        rows = {"images": len(group.seeds), "seconds": None, "pushed": None}
        return fetch(self._path(plan, group), make, self._identity(plan), rows)

    def _drawn(
        self, plan: DrawPlan, prompt: str, seeds: Sequence[int], references: Sequence[Reference]
    ) -> Arrays:
        from ....pipelines import negtome_guidance

        began, pushed = time.perf_counter(), 0.0
        if plan.config is None:
            made = generation.draw(self._pipe, plan.call, prompt, seeds)
        else:
            reference = list(references) or None
            with negtome_guidance(self._pipe, plan.config, reference=reference) as handle:
                made = generation.draw(self._pipe, plan.call, prompt, seeds)
                pushed = handle.summary().total.pushed
        seconds = (time.perf_counter() - began) / len(made)
        if not all(generation.is_image(image) for image in made):
            raise ValueError(f"{type(self._pipe).__name__} makes videos; eval own measures images")
        images = np.stack([np.asarray(image.convert("RGB")) for image in made])
        return {"images": images, "seconds": np.array(seconds), "pushed": np.array(pushed)}

    def _sharpened(self, plan: DrawPlan, group: Group, draft: Mapping[str, np.ndarray]) -> Arrays:
        """Push every image away from its own blurred draft; the draft's time counts as well."""
        from PIL import Image

        from ....pipelines import Reference

        parts = []
        for seed, pixels in zip(group.seeds, draft["images"], strict=True):
            blurred = generation.blurred(Image.fromarray(pixels), self._settings.blur)
            parts.append(self._drawn(plan, group.prompt, [seed], [Reference(blurred)]))
        joined = {name: np.array([part[name] for part in parts]) for name in ("seconds", "pushed")}
        return {
            "images": np.concatenate([part["images"] for part in parts]),
            "seconds": np.array(joined["seconds"].mean() + draft["seconds"]),
            "pushed": np.array(joined["pushed"].mean()),
        }

    def _path(self, plan: DrawPlan, group: Group) -> Path:
        folder = self._store / digest(self._identity(plan))
        return folder / f"{digest([group.prompt, *group.seeds])}.npz"

    def _identity(self, plan: DrawPlan) -> dict[str, Any]:
        """Return everything that decides the images."""
        identity = {
            **self._origin,
            "call": {name: generation.plain_value(value) for name, value in plan.call.items()},
            "guidance": None if plan.config is None else plan.config.to_dict(),
        }
        if plan.config is not None and self._references:
            identity["references"] = self._pictures
        if plan.config is not None and self._drafts:
            identity["blur"] = self._settings.blur
        return identity

    @cached_property
    def _pictures(self) -> list[dict[str, Any]]:
        return [reference_identity(reference) for reference in self._references]

    @cached_property
    def _origin(self) -> dict[str, Any]:
        pipe, versions = self._pipe, generation.versions()
        return {
            "model": _model(self._settings.model),
            "pipeline": type(pipe).__name__,
            "dtype": str(getattr(pipe, "dtype", None)),
            "device": str(getattr(pipe, "_execution_device", None)),
            "versions": {name: versions.get(name) for name in ("torch", "diffusers")},
        }


def _model(name: str) -> Any:
    """Return a model's identity: its name, or a folder's path with sizes and times of its files."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    of_files = [[str(p.relative_to(folder)), s.st_size, s.st_mtime_ns] for p, s in files]
    return [str(folder.resolve()), digest(of_files)]
