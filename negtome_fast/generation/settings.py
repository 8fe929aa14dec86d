"""Settings of a run of `generate`, the applications that it knows, and their replay from a record.

Errors name fields in backticks, such as `vae_tiling`; the command line shows its options instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import NegToMeConfig
from .call_checks import shown
from .settings_checks import EMBEDDED, check_batch, check_fields, check_mask

if TYPE_CHECKING:
    from ..pipelines.references import Reference

RECORD = "run.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("model", "sequential", "group")
_FAMILY = ("model", "preset")
"""Settings that decide the defaults of the guidance."""


@dataclass(frozen=True)
class Application:
    """An application of guidance, with defaults that the caller may override.

    Attributes:
        purpose: a line for users.
        guidance: fields of `NegToMeConfig` that replace the authors' values for the model's family.
        embedded: further fields for the embedded model, tuned on it.
        references: True if it needs images from outside the batch, False if it cannot use them,
            "drafts" if it makes its own from a draft of each image.
    """

    purpose: str
    guidance: Mapping[str, Any]
    embedded: Mapping[str, Any]
    references: bool | str


APPLICATIONS: dict[str, Application] = {
    "diversity": Application(
        "every image is pushed away from all others of its prompt",
        {"reference": "others"},
        {"alpha": 0.5, "threshold": 0.65, "t_start": 1000, "t_end": 750},
        references=False,
    ),
    "avoid": Application(
        "away from a protected image",
        {"alpha": 0.9},
        {"alpha": 3.0, "threshold": 0.2, "t_start": 1000, "t_end": 400},
        references=True,
    ),
    "style": Application(
        "away from the style of an image",
        {"alpha": 0.9},
        {"alpha": 1.5, "threshold": 0.65, "t_start": 1000, "t_end": 700},
        references=True,
    ),
    "sharpen": Application(
        "every image away from a blurred draft of itself",
        {"alpha": 0.5},
        {"alpha": 0.3, "threshold": 0.65, "t_start": 700, "t_end": 100},
        references="drafts",
    ),
    "interpolate": Application(
        "toward an image",
        {"alpha": -0.4},
        {"alpha": -0.6, "threshold": 0.3, "t_start": 1000, "t_end": 700},
        references=True,
    ),
}


@dataclass(frozen=True)
class ReferenceFile:
    """File of an image from outside the batch; see `negtome_fast.Reference` for the fields."""

    image: str
    mask: str | None = None
    alpha: float | None = None
    threshold: float | None = None
    noise: bool = True

    def __post_init__(self) -> None:
        for name in ("image", "mask"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))

    def load(self) -> Reference:
        from ..pipelines.references import Reference

        return Reference(self.image, self.mask, self.alpha, self.threshold, self.noise)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the images of a run. None leaves a value to the pipeline.

    Attributes:
        prompts: one or several; every prompt is a batch.
        model: a folder, the id of a Hub repository, or `EMBEDDED`.
        preset: a name of `APPLICATIONS`; None guides by the authors' settings.
        images: number of images of each prompt; image i starts from the noise of seed + i.
        guidance_scale: scale of classifier-free guidance. It is the pipeline's `true_cfg_scale`
            if the model is not distilled, else its `guidance_scale`.
        true_cfg_scale: the pipeline's argument of this name, for distilled models.
        steps: steps of the scheduler.
        frames, fps: number of frames of a video, and frames per second of its file.
        references: images from outside the batch; without any, the batch guides itself.
        blur: radius of the drafts' blur for `preset="sharpen"`, in 64ths of the longer side.
        guidance: fields of `NegToMeConfig`.
        call: further arguments of the pipeline's call.
        compare: also make the images without guidance, from the same seeds.
        dtype: a name of `DTYPES`; None is bfloat16 on a GPU, else float32.
        offload: one of `OFFLOADS`, diffusers' ways to keep a model partly in the host's memory.
    """

    prompts: tuple[str, ...] = ()
    model: str = EMBEDDED
    preset: str | None = None
    images: int = 4
    seed: int = 0
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: int = 16
    references: tuple[ReferenceFile, ...] = ()
    blur: float = 2.0
    guidance: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    compare: bool = False
    dtype: str | None = None
    device: str | None = None
    offload: str | None = None
    vae_tiling: bool = False
    revision: str | None = None
    variant: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_record(cls, path: Path, *, trust_paths: bool = False, **changes: Any) -> Settings:
        """Return the settings of a recorded run, with some replaced.

        The whole configuration is the run's, so that the run repeats even after a preset changed.
        With another model or preset, only the guidance that the run's caller chose is kept. The
        files of references are found beside the record.

        Args:
            path: `run.json`, or the folder that holds it.
            trust_paths: read references that lie outside of the record's folder, too. A run copies
                its references, so the record of a stranger could put any picture of this machine
                into the new run's folder.
            changes: fields of `Settings`; `guidance` and `call` are added to those of the run.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not the record of a run, or a reference lies outside of its folder.
        """
        path = path / RECORD if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"there is no record of a run at {path}")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            values = dict(record["settings"])
            files = [ReferenceFile(**entry) for entry in values.pop("references")]
            settings = replace(cls(**values), references=tuple(files))
            check_fields(settings)
            config = NegToMeConfig.from_dict(record["config"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else f"{error}"
            raise ValueError(
                f"{path} is not the record of a run of negtome-fast generate: {reason}"
            ) from error
        settings = replace(settings, prompts=tuple(settings.prompts))
        references = changes.pop("references", None)
        if references is None:
            references = tuple(_beside(path.parent, entry, trust_paths) for entry in files)
        same = all(changes.get(n, getattr(settings, n)) == getattr(settings, n) for n in _FAMILY)
        guidance = {**(config.to_dict() if same else settings.guidance)}
        chosen = changes.pop("guidance", {})
        if chosen.keys() & _WINDOWS:
            guidance["steps"] = None
            guidance.pop("first_steps", None)
        return replace(
            settings,
            **{
                "references": references,
                **changes,
                "guidance": {**guidance, **chosen},
                "call": {**settings.call, **changes.pop("call", {})},
            },
        )

    def check(self) -> None:
        """Check the settings before anything is loaded.

        Raises:
            ValueError, TypeError: a value is invalid; names the field to change.
            FileNotFoundError: the file of a reference or mask does not exist.
        """
        check_fields(self)
        if not self.prompts:
            raise ValueError("needs `prompts`: what is to be made?")
        if any(not prompt.strip() for prompt in self.prompts) and self.model != EMBEDDED:
            raise ValueError("`prompts`: one is empty; say what is to be made")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be between 0 and 2**63, got {shown(self.seed)}")
        if self.preset is not None and self.preset not in APPLICATIONS:
            raise ValueError(f"no `preset` {self.preset!r}; there are {', '.join(APPLICATIONS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.offload is not None and self.offload not in OFFLOADS:
            raise ValueError(
                f"`offload` must be one of {', '.join(OFFLOADS)}, not {self.offload!r}"
            )
        config = NegToMeConfig().with_overrides(**self.overrides())
        self._check_references()
        check_batch(self, config, self.preset == "sharpen")
        if self.model == EMBEDDED:
            from ..models import check_prompt

            for prompt in (*self.prompts, self.negative_prompt or ""):
                check_prompt(prompt)

    def _check_references(self) -> None:
        wanted = APPLICATIONS[self.preset].references if self.preset else None
        if wanted is True and not self.references:
            raise ValueError(f"`preset` {self.preset!r} needs `references`")
        if wanted in (False, "drafts") and self.references:
            raise ValueError(f"`preset` {self.preset!r} has no use for `references`")
        alphas = [self.overrides().get("alpha"), *(r.alpha for r in self.references)]
        if self.preset == "interpolate" and any(a is not None and a >= 0 for a in alphas):
            raise ValueError(
                "`preset` 'interpolate' pulls toward the image: `alpha` must be negative"
            )
        for reference in self.references:
            loaded = reference.load().load()
            if self.model == EMBEDDED:
                check_mask(self, loaded.settings, str(reference.mask))

    def overrides(self) -> dict[str, Any]:
        """Fields of the configuration that differ from the authors' for the family."""
        chosen: dict[str, Any] = {}
        if self.preset is not None:
            application = APPLICATIONS[self.preset]
            chosen.update(application.guidance)
            if self.model == EMBEDDED:
                chosen.update(application.embedded)
        if self.guidance.keys() & _WINDOWS:
            chosen["steps"] = None
        return {**chosen, **self.guidance}


_WINDOWS = {"t_start", "t_end", "steps", "first_steps"}
"""Fields of `NegToMeConfig` that set the window. One that is given replaces the others."""


def _beside(folder: Path, entry: ReferenceFile, trust_paths: bool) -> ReferenceFile:
    """Return the reference with its files in the folder of the record that names them.

    Raises:
        ValueError: a file lies elsewhere, and `trust_paths` is False.
    """

    def found(name: str) -> str:
        path, root = folder / name, folder.resolve()
        if not trust_paths and not path.resolve().is_relative_to(root):
            raise ValueError(
                f"`references`: the record names {name}, which lies outside of its folder {folder} "
                "and would be copied; if you trust the record, use `trust_paths`"
            )
        return str(path)

    mask = None if entry.mask is None else found(entry.mask)
    return replace(entry, image=found(entry.image), mask=mask)


def take_guidance(values: dict[str, Any]) -> dict[str, Any]:
    """Take the fields of `NegToMeConfig` out of `values`, which maps names to values.

    `steps_window` is the configuration's `steps`, since `steps` are those of the scheduler.

    Raises:
        ValueError: a window in two of timesteps, fractions of the steps and their number.
    """
    window = values.pop("steps_window", None)
    by_timestep, by_number = values.keys() & {"t_start", "t_end"}, "first_steps" in values
    if window is not None and by_timestep:
        raise ValueError("`steps_window` and `t_start` or `t_end` are two ways to say one thing")
    if by_number and (by_timestep or window is not None):
        other = "`steps_window`" if window is not None else "`t_start` or `t_end`"
        raise ValueError(f"`first_steps` and {other} are two ways to say one thing")
    names = [f.name for f in fields(NegToMeConfig) if f.name not in ("steps", "seed")]
    guidance = {name: values.pop(name) for name in names if name in values}
    if window is not None:
        guidance["steps"] = tuple(window)
    return guidance
