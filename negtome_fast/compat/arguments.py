"""`negtome_args` of the authors' two pipelines: keys, defaults and the window."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from ..config import NegToMeConfig

TEXT_TOKENS = 512
"""The authors' `num_lang_tokens`: number of text tokens of FLUX.1."""


@dataclass
class NegtomeArgs:
    """Values of `negtome_args`; every default is the authors'.

    They have a class of this name for each pipeline. This one has the keys of both; None stands
    for the default of the pipeline that is called.

    Attributes:
        use_negtome: not used, as in their code: the call's own `use_negtome` decides.
        merging_alpha: push strength; positive pushes away from the reference.
        merging_threshold: cosine similarity that a match must exceed; None is 0.65 for FLUX.1, 0.7
            for SDXL.
        merging_dropout: probability, 0 to 1, that a matched token is spared. It is drawn by a
            private generator that every call restarts; theirs is torch's global generator.
        merging_t_start, merging_t_end: window in timesteps, both ends included. None as the end is
            900 for FLUX.1, 800 for SDXL.
        num_joint_blocks, num_single_blocks: FLUX.1: number of double and of single blocks that are
            guided, from the first on; negative is all.
        num_lang_tokens: FLUX.1: number of text tokens. The model's input tells it, so a value that
            is neither that nor their default is an error.
        blocks: SDXL: beginnings of the names of guided attention modules; None is `["up_blocks"]`.
        min_attn_dim: SDXL: smallest height and width, in tokens, of a guided block.
        use_rag_assets: the first image of the batch is the picture of `rag_assets` in every step,
            encoded again from its distribution as in their code, and the others are pushed away
            from it. With `use_negtome=False` the picture is in the batch too, so that both runs
            hold the same images.
        noise_rag: noise the picture to the timestep of the step.
        rag_assets: `[(image, mask)]`, PIL images. White in the mask says which tokens may move
            (`matching="official"`) or be matched (`"paper"`); a mask of None is all white.
        matching: `"official"` computes what their code does, `"paper"` what their paper says. Not
            one of their keys.
        backend: `"auto"`, `"triton"`, `"torch"` or `"reference"`. Not one of their keys.
    """

    use_negtome: bool = False
    merging_alpha: float = 0.9
    merging_threshold: float | None = None
    merging_dropout: float = 0.0
    merging_t_start: float = 1000
    merging_t_end: float | None = None
    num_joint_blocks: int = -1
    num_single_blocks: int = -1
    num_lang_tokens: int = TEXT_TOKENS
    blocks: Sequence[str] | None = None
    min_attn_dim: int = 32
    use_rag_assets: bool = False
    noise_rag: bool = False
    rag_assets: Sequence[tuple[Any, Any]] | None = None
    matching: Literal["official", "paper"] = "official"
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"

    @classmethod
    def of(
        cls, given: NegtomeArgs | Mapping[str, Any] | None, without: Sequence[str], pipeline: str
    ) -> NegtomeArgs:
        """Returns the call's `negtome_args`, with defaults for missing keys.

        Args:
            given: the call's `negtome_args`.
            without: keys that this pipeline does not use. Their code ignores them silently; here a
                value that is not the default warns.
            pipeline: class name of the pipeline, for messages.

        Raises:
            ValueError: a key is unknown, or values contradict each other.
            TypeError: `given` is neither a mapping nor `NegtomeArgs`.
        """
        arguments = given if isinstance(given, NegtomeArgs) else update_args(cls(), given)
        unused = [name for name in without if getattr(arguments, name) != getattr(cls(), name)]
        if unused:
            warnings.warn(f"{pipeline} has no use for {', '.join(unused)}", stacklevel=4)
        if arguments.use_rag_assets and not arguments.rag_assets:
            raise ValueError("use_rag_assets needs rag_assets=[(image, mask)]")
        if arguments.use_rag_assets and len(arguments.rag_assets or ()) > 1:
            warnings.warn(
                "only the first of rag_assets is used, as in the authors' code", stacklevel=4
            )
        return arguments


def update_args(defaults: NegtomeArgs, args: Mapping[str, Any] | None) -> NegtomeArgs:
    """Returns `defaults` with the values of `args`; an unknown key is a `ValueError`."""
    if args is None:
        return replace(defaults)
    if not isinstance(args, Mapping):
        raise TypeError(f"negtome_args must be a dict or NegtomeArgs, not {type(args).__name__}")
    known = [field.name for field in fields(NegtomeArgs)]
    unknown = [name for name in args if name not in known]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), known, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"negtome_args has no key {', '.join(map(repr, unknown))}{meant}; "
            f"the keys are {', '.join(known)}"
        )
    return replace(defaults, **args)


@dataclass(frozen=True)
class AuthorsConfig(NegToMeConfig):
    """A configuration with the authors' window: no slack, and the timestep rounded.

    Their FLUX.1 code compares the timestep in the dtype of the latents: in bf16 a timestep of 899
    is 900, which lies inside [900, 1000].

    Attributes:
        time_dtype: the dtype that the timestep is rounded to.
    """

    time_dtype: torch.dtype = torch.float32

    def includes_step(
        self,
        timestep: float | None,
        step: int | None = None,
        num_steps: int | None = None,
        tolerance: float = 0.0,
    ) -> bool:
        if timestep is None or self.steps is not None:
            return super().includes_step(timestep, step, num_steps, tolerance)
        rounded = torch.tensor(timestep, dtype=self.time_dtype).item()
        return self.t_end <= rounded <= self.t_start
