"""Rivals: other training-free methods for more diversity, as baselines for studies.

Each follows the formula of its paper, in terms of rectified flow: x_t = (1 - sigma) x_0 + sigma *
noise, the model predicts v = noise - x_0, and so x_0 = x_t - sigma * v. A rival changes a
`FluxPipeline` from outside while its context is open, and then restores it.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ..models.avatars import IMAGE_SIZE
from ..models.features import FeatureExtractor

_MISSING = object()

Call = dict[str, Any]
"""Arguments of the pipeline's call."""


class Baseline(Protocol):
    """A method that changes how a pipeline samples while its context is open.

    The items of a batch are ordered prompt by prompt. The images of one prompt are a group, and
    images of different groups never see each other.
    """

    @property
    def name(self) -> str:
        """Name of the method."""
        ...

    def applied(
        self, pipe: Any, *, prompts: int, images_per_prompt: int
    ) -> AbstractContextManager[Call]:
        """Change `pipe` for one call; yields arguments that the call must add."""
        ...


@dataclass(frozen=True)
class LowerScale:
    """Classifier-free guidance at another scale, the cheapest way to more diversity.

    Attributes:
        scale: guidance scale; 1 switches it off.
    """

    name: ClassVar[str] = "guidance scale"
    scale: float

    @contextmanager
    def applied(self, pipe: Any, *, prompts: int, images_per_prompt: int) -> Iterator[Call]:
        yield {"true_cfg_scale": self.scale}


@dataclass(frozen=True)
class IntervalGuidance:
    """Classifier-free guidance within an interval of noise levels only (arXiv 2404.07724).

        v = v_c + (w - 1) (v_c - v_u)   where   low < sigma <= high,   else   v = v_c

    Outside the interval the unconditional forward is skipped, which saves time. A noise level s of
    the paper, for x_0 + s * noise, is sigma = s / (1 + s) here: its (0.28, 2.9] for ImageNet is
    (0.22, 0.74], its (0.28, 5.42] for SD-XL is (0.22, 0.84].

    Attributes:
        low: lower end of sigma, from 0 (image) to 1 (noise).
        high: upper end of sigma.

    Raises:
        ValueError: the ends are not in order.
    """

    name: ClassVar[str] = "interval guidance"
    low: float = 0.22
    high: float = 0.84

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"needs 0 <= low <= high <= 1, not {self.low} and {self.high}")

    def guides(self, sigma: float) -> bool:
        """Return True if the two velocities are combined at this noise level."""
        return self.low < sigma <= self.high

    @contextmanager
    def applied(self, pipe: Any, *, prompts: int, images_per_prompt: int) -> Iterator[Call]:
        transformer = pipe.transformer
        forward = transformer.forward
        passes = _Passes()
        conditional: Any = None
        skipped = False

        def before(module: nn.Module, args: Any, kwargs: Call) -> None:
            nonlocal skipped
            is_conditional, sigma = passes.begin(kwargs)
            skipped = not is_conditional and not self.guides(sigma)

        def shortened(*args: Any, **kwargs: Any) -> Any:
            # With equal velocities, the pipeline's combination is exactly v_c.
            return conditional if skipped else forward(*args, **kwargs)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal conditional, skipped
            conditional, skipped = output, False

        with (
            _replaced(transformer, "forward", shortened),
            _removed(transformer.register_forward_pre_hook(before, with_kwargs=True)),
            _removed(transformer.register_forward_hook(after)),
        ):
            yield {}


@dataclass(frozen=True)
class CADS:
    """Condition-annealed diffusion sampling (arXiv 2310.17347).

        y' = sqrt(gamma) y + s sqrt(1 - gamma) n          n normal, new in every step
        y" = psi ((y' - mean y') / std y' * std y + mean y) + (1 - psi) y'
        gamma(t) = 1 for t <= tau1, (tau2 - t) / (tau2 - tau1), 0 for t >= tau2

    The time t is sigma. Noise is added to the prompt's token embeddings and its pooled embedding,
    but not to the negative prompt's. Mean and standard deviation are taken over each image's
    embedding. The noise of an image follows from its initial latents, not from its place in the
    batch.

    Attributes:
        scale: s, the strength of the noise.
        tau1: time at which annealing ends. Authors: 0.6.
        tau2: time at which annealing begins. Authors: 0.9. Both at 1 add no noise.
        psi: share of the rescaled condition. Authors: 1.
        seed: changes the noise for the same latents.

    Raises:
        ValueError: an attribute out of its range.
    """

    name: ClassVar[str] = "CADS"
    scale: float = 0.25
    tau1: float = 0.6
    tau2: float = 0.9
    psi: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.tau1 <= self.tau2 <= 1:
            raise ValueError(f"needs 0 <= tau1 <= tau2 <= 1, not {self.tau1} and {self.tau2}")
        if self.scale < 0 or not 0 <= self.psi <= 1:
            raise ValueError(f"needs scale >= 0, 0 <= psi <= 1, not {self.scale} and {self.psi}")

    def gamma(self, sigma: float) -> float:
        """Return the remaining share of the condition: 0 at pure noise, 1 at the end."""
        if sigma <= self.tau1:
            return 1.0
        return max(0.0, (self.tau2 - sigma) / (self.tau2 - self.tau1)) if sigma < self.tau2 else 0.0

    def corrupt(self, condition: Tensor, noise: Tensor, gamma: float) -> Tensor:
        """Return the annealed condition, `(B, ...)`, item by item."""
        axes = tuple(range(1, condition.dim()))
        noised = math.sqrt(gamma) * condition + self.scale * math.sqrt(1 - gamma) * noise
        mean, std = (f(condition, dim=axes, keepdim=True) for f in (torch.mean, torch.std))
        own_mean, own_std = (f(noised, dim=axes, keepdim=True) for f in (torch.mean, torch.std))
        rescaled = (noised - own_mean) / own_std.clamp_min(_TINY) * std + mean
        return self.psi * rescaled + (1 - self.psi) * noised

    @contextmanager
    def applied(self, pipe: Any, *, prompts: int, images_per_prompt: int) -> Iterator[Call]:
        passes = _Passes()
        generators: list[torch.Generator] = []

        def before(module: nn.Module, args: Any, kwargs: Call) -> tuple[Any, Call] | None:
            conditional, sigma = passes.begin(kwargs)
            if not generators:
                generators.extend(_generators(kwargs["hidden_states"], self.seed))
            gamma = self.gamma(sigma)
            if not conditional or gamma == 1:
                return None
            changed = {
                name: self.corrupt(kwargs[name], _normal_like(kwargs[name], generators), gamma)
                for name in ("encoder_hidden_states", "pooled_projections")
            }
            return args, {**kwargs, **changed}

        with _removed(pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)):
            yield {}


@dataclass(frozen=True)
class ParticleGuidance:
    """Particle guidance with a fixed potential (arXiv 2310.13102).

        v_i' = v_i - strength * sum_j 2 k_ij / h_i * (f_i - f_j) df_i/dx
        k_ij = exp(-|f_i - f_j|^2 / h_i),   h_i = median_j |f_i - f_j|^2 / log n

    over the n images of a group. Each image descends the potential sum_j k_ij while sigma is above
    `sigma_min`. The paper leaves the weight of the potential's gradient in the score free at every
    time; here it is (1 - sigma) / sigma, so that the gradient has a constant weight in the
    velocity. As in the authors' code, the model is not differentiated.

    Attributes:
        strength: weight of the gradient; 0 changes nothing.
        space: the meaning of f. `"features"`: EfficientNet-lite0 features of the decoded x_0, with
            gradients through the decoder (the authors use DINO); `"clean"`: the latents of x_0;
            `"noisy"`: the latents x_t, the authors' variant without features.
        sigma_min: guidance stops at this noise level. The authors' code stops at noise levels of 3
            (features) and 1 (latents), which are 0.75 and 0.5 here.

    Raises:
        ValueError: an unknown space.
    """

    name: ClassVar[str] = "particle guidance"
    strength: float
    space: Literal["features", "clean", "noisy"] = "features"
    sigma_min: float = 0.75

    def __post_init__(self) -> None:
        if self.space not in ("features", "clean", "noisy"):
            raise ValueError(f"space must be 'features', 'clean' or 'noisy', not {self.space!r}")

    @contextmanager
    def applied(self, pipe: Any, *, prompts: int, images_per_prompt: int) -> Iterator[Call]:
        def change(velocity: Tensor, sample: Tensor, sigma: float) -> Tensor:
            if sigma <= self.sigma_min:
                return velocity
            if self.space == "noisy":
                return velocity - self.strength * _repulsion(sample, prompts).to(velocity.dtype)
            clean = sample.float() - sigma * velocity.float()
            if self.space == "clean":
                return velocity - self.strength * _repulsion(clean, prompts).to(velocity.dtype)
            with torch.enable_grad():
                clean = clean.detach().requires_grad_()
                features = _features(pipe, clean)
                push = _repulsion(features.detach(), prompts)
                (gradient,) = torch.autograd.grad((features * push).sum(), clean)
            return velocity - self.strength * gradient.to(velocity.dtype)

        with _velocity_changed(pipe, change):
            yield {}


@dataclass(frozen=True)
class SPELL:
    """Sparse repellency within a group (arXiv 2410.06025).

        x_0' = x_0 + lambda * sum_k relu(r / |x_0 - z_k| - 1) (x_0 - z_k)
        v' = v - (x_0' - x_0) / sigma

    The z_k are the other images' predictions of clean latents in the same step. A prediction that
    is closer to z_k than the radius is pushed out to that distance; others do not change. A
    prediction that equals z_k has no direction and is not pushed away from it.

    Attributes:
        radius: r, a Euclidean distance between two images' latents; 0 changes nothing.
        overcompensation: lambda. Authors: 1.6.

    Raises:
        ValueError: a negative attribute.
    """

    name: ClassVar[str] = "SPELL"
    radius: float
    overcompensation: float = 1.6

    def __post_init__(self) -> None:
        if self.radius < 0 or self.overcompensation < 0:
            raise ValueError(
                f"needs radius and overcompensation >= 0, not {self.radius} and "
                f"{self.overcompensation}"
            )

    @contextmanager
    def applied(self, pipe: Any, *, prompts: int, images_per_prompt: int) -> Iterator[Call]:
        def change(velocity: Tensor, sample: Tensor, sigma: float) -> Tensor:
            clean = sample.float() - sigma * velocity.float()
            return velocity - (self.push(clean, prompts) / sigma).to(velocity.dtype)

        with _velocity_changed(pipe, change):
            yield {}

    def push(self, clean: Tensor, groups: int) -> Tensor:
        """Return the change of x_0 `(B, ...)`, whose items form `groups` equal groups."""
        difference, squared = _pairs(clean, groups)
        distance = squared.sqrt()
        excess = (self.radius / distance.clamp_min(_TINY) - 1).clamp_min(0) * (distance > 0)
        push = torch.einsum("gij,gijd->gid", excess, difference)
        return self.overcompensation * push.reshape(clean.shape)


_TINY = 1e-12


def _pairs(points: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return p_i - p_j `(groups, n, n, D)` of `(B, ...)`, and squared lengths `(groups, n, n)`."""
    flat = points.reshape(groups, len(points) // groups, -1)
    difference = flat[:, :, None] - flat[:, None]
    return difference, difference.square().sum(-1)


def _repulsion(points: Tensor, groups: int) -> Tensor:
    """Return sum_j 2 k_ij / h_i * (p_i - p_j), `(B, ...)`: the way down the potential."""
    difference, squared = _pairs(points, groups)
    count = squared.shape[1]
    if count < 2:
        return torch.zeros_like(points)
    others = squared[:, ~torch.eye(count, dtype=torch.bool, device=points.device)]
    median = others.view(len(squared), count, count - 1).sqrt().median(-1, keepdim=True).values
    bandwidth = (median.square() / math.log(count)).clamp_min(_TINY)
    weight = 2 / bandwidth * torch.exp(-squared / bandwidth)
    return torch.einsum("gij,gijd->gid", weight, difference).reshape(points.shape)


@cache
def _network() -> nn.Module:
    return FeatureExtractor().requires_grad_(False)


def _features(pipe: Any, clean: Tensor) -> Tensor:
    """Return features of packed latents, `(B, tokens, channels)` -> `(B, 1280)`, with gradients."""
    latents = pipe._unpack_latents(clean, IMAGE_SIZE, IMAGE_SIZE, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    images = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
    # The extractor switches gradients off everywhere else, so its decorator is unwrapped here.
    return inspect.unwrap(FeatureExtractor.forward)(_network(), images / 2 + 0.5)


class _Passes:
    """Detector of the conditional forward, which is the first of each timestep."""

    def __init__(self) -> None:
        self._sigma: float | None = None

    def begin(self, kwargs: Call) -> tuple[bool, float]:
        """Return whether this forward is the conditional one, and its sigma."""
        sigma = float(kwargs["timestep"][0])
        first = sigma != self._sigma
        self._sigma = sigma
        return first, sigma


@contextmanager
def _velocity_changed(
    pipe: Any, change: Callable[[Tensor, Tensor, float], Tensor]
) -> Iterator[None]:
    """Make the scheduler step along `change(velocity, sample, sigma)`."""
    scheduler = pipe.scheduler
    step = scheduler.step

    def changed(model_output: Tensor, timestep: Any, sample: Tensor, *rest: Any, **kw: Any) -> Any:
        sigma = float(timestep) / scheduler.config.num_train_timesteps
        return step(change(model_output, sample, sigma), timestep, sample, *rest, **kw)

    with _replaced(scheduler, "step", changed):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of this object alone, and restore it afterwards."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _generators(latents: Tensor, seed: int) -> list[torch.Generator]:
    """Return one generator per item, seeded by its initial latents."""
    return [
        torch.Generator().manual_seed(
            seed + zlib.crc32(item.detach().float().cpu().numpy().tobytes())
        )
        for item in latents
    ]


def _normal_like(condition: Tensor, generators: list[torch.Generator]) -> Tensor:
    drawn = [torch.randn(condition.shape[1:], generator=generator) for generator in generators]
    return torch.stack(drawn).to(condition)
