"""References from outside of the batch: loaded, encoded, and noised to the timestep of a step.

Record and apply: on a guided step the model first sees the references' latents at this timestep, in
the conditioning of the first item of each guidance group (`reference_forward`). Its attention
outputs are kept, and the run's own forward is pushed away from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import check_flag
from ..config import ReferenceSettings
from ..thread_state import PerThread, ThreadState
from .layouts import ImageTokens, Layout
from .pictures import read_frames, read_mask, to_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

    from .pictures import Picture


@dataclass(frozen=True)
class Reference:
    """An image or a video that a run is pushed away from, or pulled toward.

    ```python
    apply_negtome(pipe, reference=Reference("character.png", mask="region.png", alpha=1.5))
    ```

    Attributes:
        image: a picture, a video or latents:
            a PIL image, a uint8 array (H, W, 3) or the path of an image;
            a sequence of these, a uint8 array (F, H, W, 3), or the path of a video, an animated
            image or a folder of frames;
            a floating-point tensor, clean latents on the denoiser's scale, (C, h, w), (1, C, h, w),
            with frames, or in the shape of the denoiser's input.
            Pictures are stretched to the size of the run, so crop them first if the proportions
            matter. A video is sampled evenly at the frames of the run; an image stands still.
        mask: region of the reference that may be matched: a picture as above (white may be matched,
            black may not), or a bool array or tensor (H, W) or (F, H, W). It is stretched to the
            reference.
        alpha: push strength; positive pushes away, negative pulls toward. None: the
            configuration's.
        threshold: cosine similarity, -1 to 1, that a match must exceed. None: the configuration's.
        noise: noise the latents to the timestep of the step, by the pipeline's scheduler. The noise
            is drawn once per run from a copy of the caller's generator, so the caller's random
            numbers do not change. False gives the model clean latents, the authors' default.
    """

    image: Picture | Tensor | Sequence[Picture]
    mask: Picture | Tensor | Sequence[Picture] | None = None
    alpha: float | None = None
    threshold: float | None = None
    noise: bool = True

    def load(self) -> LoadedReference:
        """Reads the files and checks them.

        Raises:
            FileNotFoundError: a path does not exist.
            TypeError, ValueError: the image or the mask is of the wrong kind.
        """
        latents = self.image if isinstance(self.image, Tensor) else None
        if latents is not None:
            _check_latents(latents)
        frames = None if latents is not None else read_frames(self.image, "reference image")
        mask = None if self.mask is None else read_mask(self.mask)
        return LoadedReference(
            ReferenceSettings(self.alpha, self.threshold, mask),
            frames,
            latents,
            check_flag("noise", self.noise),
        )


def _check_latents(latents: Tensor) -> None:
    if not latents.is_floating_point():
        raise TypeError(
            f"a reference that is a tensor is latents, floating point, not {latents.dtype}; "
            "give pixels as a numpy array (H, W, 3) or a PIL image"
        )
    if latents.ndim < 2 or not latents.numel():
        raise ValueError(
            f"a reference that is latents must be (C, h, w), not {tuple(latents.shape)}"
        )
    if latents.is_meta or not bool(latents.isfinite().all()):
        raise ValueError("the latents of a reference must be finite: nothing would match them")


@dataclass(frozen=True)
class LoadedReference:
    """A checked `Reference`: either frames or latents."""

    settings: ReferenceSettings
    frames: tuple[Image, ...] | None
    latents: Tensor | None
    noise: bool

    def pixels(self, size: tuple[int, int, int]) -> Tensor:
        """Returns (F, 3, H, W) in [-1, 1] for the (frames, height, width) of a run."""
        assert self.frames is not None
        return to_pixels(self.frames, size)


class References:
    """The references of one guided pipeline, with their latents and noise in this run.

    Args:
        references: the checked references.
        layout: layout of the denoiser.
        model: its class name, for errors.
    """

    # Clean latents and noise, each (1, ...) in fp32 or fp64, for runs of this key.
    _key = PerThread[tuple[Any, ...] | None](None)
    _clean = PerThread[Sequence[Tensor]](())
    _noise = PerThread[Sequence[Tensor]](())

    def __init__(self, references: Sequence[LoadedReference], layout: Layout, model: str) -> None:
        self._references = tuple(references)
        self._layout = layout
        self._model = model
        self._thread_state = ThreadState()

    @property
    def settings(self) -> tuple[ReferenceSettings, ...]:
        return tuple(reference.settings for reference in self._references)

    def __len__(self) -> int:
        return len(self._references)

    def check(self, pipe: Any) -> None:
        """Refuses pictures that the pipeline cannot encode; `pipe` is None for a bare model."""
        if all(reference.frames is None for reference in self._references):
            return
        if pipe is None:
            reason = "a bare model has no VAE; pass its pipeline"
        elif getattr(pipe, "vae", None) is None:
            reason = f"{type(pipe).__name__} has no VAE; load one"
        elif self._layout.encode is None:
            reason = f"it is not known how to encode pictures for {self._model}"
        else:
            return
        raise ValueError(f"reference images cannot be encoded: {reason}, or give them as latents")

    def begin_run(self) -> None:
        """Drops the noise; the next step draws it again. Encoded pictures are kept."""
        self._noise = ()

    @torch.no_grad()
    def latents(
        self,
        pipe: Any,
        latents: Tensor,
        tokens: ImageTokens | None,
        channels: int | None,
        scheduler: tuple[Any, Tensor] | None,
        generator: Callable[[], torch.Generator | None],
    ) -> list[Tensor]:
        """Returns the model's input for each reference at this step: (1, ...), dtype of `latents`.

        Args:
            pipe: the pipeline, to encode pictures; None for a bare model.
            latents: latents of the run, items first.
            tokens: the image tokens, where known.
            channels: channels that the model generates, where known; its input may have more.
            scheduler: a copy of the scheduler at this step, and the timestep (1,); None where not
                known.
            generator: finds the caller's generator; called once per run.
        """
        place = (tokens.generated, tokens.grid, tokens.frames) if tokens else None
        shape = latents.shape[1:]
        if tokens is not None and latents.ndim == 3:
            # Ideogram 4 has text among the tokens of one denoiser, and none in the other's.
            shape = torch.Size([tokens.generated, shape[1]])
        key = (tuple(shape), place, latents.device)
        if key != self._key:
            self._clean = [
                self._encode(number, reference, pipe, latents, tokens, channels)
                for number, reference in enumerate(self._references)
            ]
            self._key, self._noise = key, ()
        if not self._noise:
            self._noise = draw_noise(self._clean, generator())
        return [
            at_timestep(clean, noise if reference.noise else None, scheduler).to(latents.dtype)
            for reference, clean, noise in zip(
                self._references, self._clean, self._noise, strict=True
            )
        ]

    def _encode(
        self,
        number: int,
        reference: LoadedReference,
        pipe: Any,
        latents: Tensor,
        tokens: ImageTokens | None,
        channels: int | None,
    ) -> Tensor:
        encode = self._layout.encode
        candidates = []
        if reference.latents is None:
            assert encode is not None  # `check` refused it
            grid, frames = (tokens.grid, tokens.frames) if tokens else (None, 1)
            size = encode.size(pipe, latents, grid, frames)
            if len(reference.frames or ()) > 1 and size[0] == 1:
                raise ValueError(
                    f"reference {number} is a video, and {self._model} makes images; give one frame"
                )
            candidates.append(encode(pipe, reference.pixels(size)))
        else:
            given = reference.latents.detach()
            given = given.to(torch.promote_types(given.dtype, torch.float32))
            candidates += [given, given[None]]
            if encode is not None and latents.ndim == 3:
                candidates += [encode.pack(c) for c in candidates if c.ndim in (4, 5)]
        for candidate in candidates:
            if _fits(candidate, latents, tokens, channels):
                if tokens is not None and candidate.ndim == 3:
                    candidate = generated_part(candidate, tokens)
                return candidate.to(latents.device)
        shape = tuple((candidates[0] if reference.latents is None else reference.latents).shape)
        raise ValueError(
            f"reference {number} has latents of the shape {shape}, which do not fit those of this "
            f"run, {tuple(latents.shape)}; generate in their size, or give the reference as an "
            "image, which is resized"
        )


def generated_part(latents: Tensor, tokens: ImageTokens) -> Tensor:
    """Returns the generated tokens of packed latents (1, tokens, C), of all or of these alone."""
    if latents.shape[1] == tokens.generated:
        return latents
    return latents[:, tokens.offset : tokens.offset + tokens.generated]


def _fits(
    candidate: Tensor, latents: Tensor, tokens: ImageTokens | None, channels: int | None
) -> bool:
    """Returns True if a candidate (1, ...) has the shape of the run's latents.

    It may have the shape of the generated part alone: edit pipelines add the tokens or channels of
    their conditions.
    """
    if candidate.ndim != latents.ndim or candidate.shape[0] != 1:
        return False
    for axis in range(1, latents.ndim):
        own, run = candidate.shape[axis], latents.shape[axis]
        generated = latents.ndim == 3 and axis == 1 and tokens and own == tokens.generated
        if own != run and not generated and not (own == channels and own < run):
            return False
    return True


def draw_noise(clean: Sequence[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Draws standard normal noise for each of the latents.

    It is drawn on the CPU, so that a seed gives the same noise on every device, and by another
    generator, seeded from the caller's, so that it is not the noise that the scheduler adds next.

    Args:
        clean: latents, each of any shape.
        generator: read but not advanced; torch's default generator if None.
    """
    state = torch.random.default_generator if generator is None else generator
    copied = torch.Generator(state.device)
    copied.set_state(state.get_state())
    seed = torch.randint(2**62, (1,), generator=copied, device=copied.device).item()
    seeded = torch.Generator().manual_seed(int(seed))
    options: dict[str, Any] = {"generator": seeded, "dtype": torch.float32, "device": "cpu"}
    return [torch.randn(c.shape, **options).to(c) for c in clean]


def at_timestep(
    clean: Tensor, noise: Tensor | None, scheduler: tuple[Any, Tensor] | None
) -> Tensor:
    """Returns the model's input for clean latents: noised unless `noise` is None, and scaled.

    Flow matching: (1 - s) x + s e. DDPM: sqrt(a) x + sqrt(1 - a) e. Euler: x + s e, which is then
    scaled by 1 / sqrt(s^2 + 1).

    Args:
        clean, noise: latents of one shape.
        scheduler: a copy of the scheduler at the step, and the timestep (1,); None where not known.

    Raises:
        ValueError: the scheduler is not known or has no rule for adding noise.
    """
    if scheduler is None:
        if noise is None:
            return clean
        raise ValueError(
            "a reference is noised by the pipeline's scheduler, which does not know the timestep "
            "of this forward; apply to the pipeline that is run, or use Reference(noise=False)"
        )
    rule, timestep = scheduler
    if noise is not None:
        if getattr(rule.config, "invert_sigmas", False):  # from 0 (noise) to 1: Mochi, OmniGen
            clean, noise = noise, clean
        add = getattr(rule, "scale_noise", None)
        if add is not None:
            if rule.sigmas[rule.step_index or 0] > 1:
                raise ValueError(
                    f"this {type(rule).__name__} has sigmas above 1, as Cosmos has, whose pipeline "
                    "scales its latents itself; use Reference(noise=False) with latents at the "
                    "scale of the model's input"
                )
            clean = add(clean, timestep, noise)
        elif hasattr(rule, "add_noise"):
            clean = rule.add_noise(clean, noise, timestep)
        else:
            raise ValueError(
                f"{type(rule).__name__} does not tell how to add noise to a reference; use "
                "Reference(noise=False)"
            )
    scale = getattr(rule, "scale_model_input", None)
    return clean if scale is None else scale(clean, timestep[0])
