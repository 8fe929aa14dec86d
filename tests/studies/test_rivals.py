"""The rivals: their arithmetic in closed form, and what they do to a pipeline and leave of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from negtome_fast import models
from negtome_fast.studies import rivals
from negtome_fast.studies.rivals import (
    CADS,
    SPELL,
    Baseline,
    IntervalGuidance,
    LowerScale,
    ParticleGuidance,
)
from negtome_fast.studies.studies import overheads
from negtome_fast.studies.studies import rivals as study

STEPS = 4  # at sigma 1, 0.75, 0.5 and 0.25
PROMPTS = ("a pixel art person", "a big smile person")

ACTIVE: list[Baseline] = [
    LowerScale(1.5),
    IntervalGuidance(0.4, 0.8),
    CADS(),
    ParticleGuidance(60.0),
    ParticleGuidance(100.0, "clean", 0.5),
    ParticleGuidance(100.0, "noisy", 0.5),
    SPELL(60.0),
]
IDLE: list[Baseline] = [
    LowerScale(models.GUIDANCE_SCALE),
    IntervalGuidance(0.0, 1.0),
    CADS(tau1=1.0, tau2=1.0),
    ParticleGuidance(0.0),
    ParticleGuidance(0.0, "clean", 0.5),
    ParticleGuidance(100.0, "noisy", 1.0),
    SPELL(0.0),
]


def label(baseline: Baseline) -> str:
    space = getattr(baseline, "space", "")
    return f"{baseline.name} {space}".strip().replace(" ", "-")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return models.load_pipeline()


def sample(
    pipe: Any,
    baseline: Baseline | None = None,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0, 1, 2, 3),
    **call: Any,
) -> Tensor:
    """Latents `(B, 64, 32)`, prompt by prompt."""
    call = {
        "prompt": list(prompts),
        "negative_prompt": [""] * len(prompts),
        "true_cfg_scale": models.GUIDANCE_SCALE,
        "num_images_per_prompt": len(seeds) // len(prompts),
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "num_inference_steps": STEPS,
        "height": 64,
        "width": 64,
        "max_sequence_length": models.TEXT_LENGTH,
        "output_type": "latent",
        **call,
    }
    if baseline is None:
        return pipe(**call).images
    each = len(seeds) // len(prompts)
    with baseline.applied(pipe, prompts=len(prompts), images_per_prompt=each) as changed:
        return pipe(**{**call, **changed}).images


@pytest.fixture(scope="module")
def plain(pipe: Any) -> Tensor:
    return sample(pipe)


def state(pipe: Any) -> list[Any]:
    """State that a baseline could leave behind."""
    model = pipe.transformer
    hooks = [len(model._forward_pre_hooks), len(model._forward_hooks)]
    hooks.append(len(model._forward_pre_hooks_with_kwargs))
    return [*hooks, "forward" in vars(model), "step" in vars(pipe.scheduler), model.training]


@pytest.mark.parametrize("baseline", ACTIVE, ids=label)
def test_images_change_groups_are_apart_and_the_pipeline_is_left_as_it_was(
    pipe: Any, plain: Tensor, baseline: Baseline
) -> None:
    before = state(pipe)
    changed = sample(pipe, baseline)
    assert bool(changed.isfinite().all()) and not torch.equal(changed[:2], plain[:2])
    assert not torch.equal(changed[2:], plain[2:])
    assert state(pipe) == before

    # Another second group; the first one's images do not notice, and are the same once more.
    other = sample(pipe, baseline, (PROMPTS[0], "captain red"), (0, 1, 8, 9))
    assert torch.equal(other[:2], changed[:2]) and not torch.equal(other[2:], changed[2:])
    assert torch.equal(sample(pipe), plain)


@pytest.mark.parametrize("baseline", IDLE, ids=label)
def test_no_strength_changes_no_bit(pipe: Any, plain: Tensor, baseline: Baseline) -> None:
    assert torch.equal(sample(pipe, baseline), plain)


@pytest.mark.parametrize("baseline", ACTIVE, ids=label)
def test_a_failure_leaves_the_pipeline_as_it_was(
    pipe: Any, plain: Tensor, baseline: Baseline
) -> None:
    def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    before = state(pipe)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(pipe, baseline, callback_on_step_end=fail)
    assert state(pipe) == before
    assert torch.equal(sample(pipe), plain)


def test_what_was_replaced_on_the_object_itself_comes_back() -> None:
    class Owner:
        value = 1

    owner = Owner()
    with rivals._replaced(owner, "value", 2):
        with rivals._replaced(owner, "value", 3):
            assert owner.value == 3
        assert vars(owner) == {"value": 2}
    assert vars(owner) == {}


@pytest.mark.parametrize("space", ["features", "clean", "noisy"])
def test_an_image_alone_is_not_repelled(pipe: Any, space: Any) -> None:
    alone = sample(pipe, None, PROMPTS, (0, 1))
    assert torch.equal(sample(pipe, ParticleGuidance(100.0, space, 0.5), PROMPTS, (0, 1)), alone)
    assert torch.equal(sample(pipe, SPELL(100.0), PROMPTS, (0, 1)), alone)


# Interval guidance


def test_guidance_in_no_interval_is_no_guidance(pipe: Any) -> None:
    off = sample(pipe, true_cfg_scale=1.0)
    assert torch.equal(sample(pipe, IntervalGuidance(0.0, 0.0)), off)
    assert torch.equal(sample(pipe, LowerScale(1.0)), off)


def test_the_unconditional_forward_is_computed_in_the_interval_only(pipe: Any) -> None:
    counted = []
    block = pipe.transformer.transformer_blocks[0]
    handle = block.register_forward_hook(lambda *_: counted.append(None))
    try:
        sample(pipe)
        assert len(counted) == 2 * STEPS
        counted.clear()
        sample(pipe, IntervalGuidance(0.25, 0.75))  # open below, closed above: two steps
        assert len(counted) == STEPS + 2
    finally:
        handle.remove()


def test_velocities_of_the_interval(pipe: Any) -> None:
    """Guided where low < sigma <= high, the conditional velocity elsewhere."""
    steps: list[tuple[float, Tensor]] = []
    outputs: list[Tensor] = []
    step = pipe.scheduler.step

    def record(velocity: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append((float(timestep) / 1000, velocity))
        return step(velocity, timestep, *args, **kwargs)

    handle = pipe.transformer.register_forward_hook(lambda *a: outputs.append(a[2][0]))
    pipe.scheduler.step = record
    try:
        sample(pipe, IntervalGuidance(0.25, 0.75))
    finally:
        del pipe.scheduler.step
        handle.remove()
    assert [sigma for sigma, _ in steps] == [1.0, 0.75, 0.5, 0.25]
    for (sigma, velocity), conditional, other in zip(
        steps, outputs[::2], outputs[1::2], strict=True
    ):
        if sigma in (0.75, 0.5):
            assert not torch.equal(conditional, other)
            guided = other + models.GUIDANCE_SCALE * (conditional - other)
            assert torch.equal(velocity, guided)
        else:
            assert torch.equal(velocity, conditional)


# CADS


def test_annealing_schedule() -> None:
    cads = CADS(tau1=0.5, tau2=0.9)
    assert [cads.gamma(t) for t in (0.0, 0.5, 0.9, 1.0)] == [1.0, 1.0, 0.0, 0.0]
    assert cads.gamma(0.6) == pytest.approx(0.75) and cads.gamma(0.8) == pytest.approx(0.25)
    step = CADS(tau1=0.5, tau2=0.5)
    assert [step.gamma(t) for t in (0.5, 0.51)] == [1.0, 0.0]
    assert CADS(tau1=1.0, tau2=1.0).gamma(1.0) == 1.0


def test_corrupted_condition() -> None:
    generator = torch.Generator().manual_seed(0)
    condition = 3 + 2 * torch.randn(2, 16, 64, generator=generator)
    noise = torch.randn(2, 16, 64, generator=generator)
    # Without rescaling it is the formula itself; gamma 0.64 gives 0.8 and 0.6.
    noised = CADS(scale=0.5, psi=0.0).corrupt(condition, noise, 0.64)
    torch.testing.assert_close(noised, 0.8 * condition + 0.5 * 0.6 * noise)
    # With it each item keeps its mean and deviation and stays on the line of the formula.
    rescaled = CADS(scale=0.5, psi=1.0).corrupt(condition, noise, 0.64)
    for item in range(2):
        assert float(rescaled[item].mean()) == pytest.approx(float(condition[item].mean()), 1e-4)
        assert float(rescaled[item].std()) == pytest.approx(float(condition[item].std()), 1e-4)
        both = torch.stack([rescaled[item].flatten(), noised[item].flatten()])
        assert float(both.corrcoef()[0, 1]) == pytest.approx(1.0, abs=1e-5)
    mixed = CADS(scale=0.5, psi=0.25).corrupt(condition, noise, 0.64)
    torch.testing.assert_close(mixed, 0.25 * rescaled + 0.75 * noised)


def test_noise_goes_to_the_condition_alone_and_follows_the_image(pipe: Any) -> None:
    seen: list[Tensor] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["encoder_hidden_states"].clone())

    def conditions(baseline: Baseline, seeds: Sequence[int]) -> list[Tensor]:
        seen.clear()
        with baseline.applied(pipe, prompts=1, images_per_prompt=len(seeds)):
            handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
            try:
                sample(pipe, None, PROMPTS[:1], seeds)
            finally:
                handle.remove()
        return list(seen)

    clean = conditions(CADS(tau1=1.0, tau2=1.0), (0, 1))
    noised = conditions(CADS(), (0, 1))
    assert len(noised) == 2 * STEPS
    changed = [not torch.equal(a, b) for a, b in zip(clean, noised, strict=True)]
    # Conditional and unconditional in turn; annealing ends at sigma 0.6, after two steps.
    assert changed == [True, False, True, False, False, False, False, False]
    assert not torch.equal(noised[0], noised[2])  # drawn anew in every step
    swapped = conditions(CADS(), (1, 0))
    assert torch.equal(swapped[0].flip(0), noised[0]) and torch.equal(swapped[2].flip(0), noised[2])
    assert not torch.equal(noised[0][0], noised[0][1])
    assert not torch.equal(conditions(CADS(seed=1), (0, 1))[0], noised[0])


# Particle guidance


def test_repulsion_of_two_points() -> None:
    """n = 2: h = d^2 / log 2, so k = 1/2 and the force is log 2 / d^2 * (p_i - p_j)."""
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    expected = math.log(2) / 25 * torch.tensor([[-3.0, -4.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(rivals._repulsion(points, 1), expected)


def test_repulsion_is_the_gradient_of_the_potential() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2 * 5, 3, generator=generator, dtype=torch.float64)
    force = rivals._repulsion(points, 2)
    for p, f in zip(points.split(5), force.split(5), strict=True):
        for i in range(5):
            others = p[[j for j in range(5) if j != i]]
            distance = (p[i] - others).norm(dim=-1)
            bandwidth = distance.median() ** 2 / math.log(5)
            x = p[i].clone().requires_grad_()
            potential = torch.exp(-(x - others).square().sum(-1) / bandwidth).sum()
            (gradient,) = torch.autograd.grad(potential, x)
            torch.testing.assert_close(f[i], -gradient)


def test_equal_points_do_not_break_the_repulsion() -> None:
    force = rivals._repulsion(torch.ones(4, 7), 1)
    assert torch.equal(force, torch.zeros(4, 7))


@pytest.mark.parametrize("space", ["features", "clean", "noisy"])
def test_a_guided_step_moves_all_pairs_apart(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, space: Any
) -> None:
    """In the space of the method, by the velocity that the scheduler is given."""
    clean = sample(pipe, None, PROMPTS[:1], (0, 1, 2))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    sigma = 0.9
    x, velocity = (1 - sigma) * clean + sigma * noise, noise - clean
    monkeypatch.setattr(pipe.scheduler, "step", lambda velocity, timestep, sample: velocity)
    strength = {"features": 1.0, "clean": 100.0, "noisy": 100.0}[space]
    with ParticleGuidance(strength, space).applied(pipe, prompts=1, images_per_prompt=3):
        changed = pipe.scheduler.step(velocity, torch.tensor(1000 * sigma), x)

    def points(v: Tensor) -> Tensor:
        if space == "noisy":
            return (x - 0.05 * v).flatten(1)
        predicted = x - sigma * v
        return rivals._features(pipe, predicted) if space == "features" else predicted.flatten(1)

    with torch.no_grad():
        before, after = points(velocity), points(changed)
    assert bool((torch.pdist(after) > torch.pdist(before)).all())
    assert all(parameter.grad is None for parameter in pipe.vae.parameters())


# SPELL


def test_a_prediction_moves_to_the_surface_of_the_shell() -> None:
    centre = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 5.0], [1.0, 2.0, 100.0]])
    pushed = centre + SPELL(4.0, overcompensation=1.0).push(centre, 1)
    # The first two are 3 apart, each other's shells; the third is out of everybody's reach.
    assert float((pushed[0] - centre[1]).norm()) == pytest.approx(4.0)
    assert float((pushed[1] - centre[0]).norm()) == pytest.approx(4.0)
    assert torch.equal(pushed[2], centre[2])
    twice = SPELL(4.0, overcompensation=2.0).push(centre, 1)
    torch.testing.assert_close(twice, 2 * (pushed - centre))
    assert torch.equal(SPELL(3.0).push(centre, 1), torch.zeros(3, 3))


def test_shells_belong_to_groups_and_equal_predictions_have_no_direction() -> None:
    points = torch.tensor([[0.0], [50.0], [1.0], [80.0]])
    assert torch.equal(SPELL(10.0).push(points, 2), torch.zeros(4, 1))
    assert not torch.equal(SPELL(10.0).push(points, 1), torch.zeros(4, 1))
    assert torch.equal(SPELL(10.0).push(torch.ones(4, 3), 2), torch.zeros(4, 3))


def test_the_velocity_leads_to_the_pushed_prediction() -> None:
    class Scheduler:
        class config:
            num_train_timesteps = 1000

        def step(self, velocity: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
            return velocity

    class Pipe:
        scheduler = Scheduler()

    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(4, 6, generator=generator) for _ in range(2))
    sigma, spell = 0.25, SPELL(8.0)
    with spell.applied(Pipe, prompts=2, images_per_prompt=2):
        changed = Pipe.scheduler.step(v, torch.tensor(250.0), x)
    clean = x - sigma * v
    torch.testing.assert_close(x - sigma * changed, clean + spell.push(clean, 2))
    assert not torch.allclose(changed, v)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (IntervalGuidance, {"low": 0.8, "high": 0.2}, "0 <= low <= high <= 1"),
        (CADS, {"tau1": 0.9, "tau2": 0.6}, "0 <= tau1 <= tau2 <= 1"),
        (CADS, {"psi": 1.5}, "0 <= psi <= 1"),
        (ParticleGuidance, {"strength": 1.0, "space": "dino"}, "must be 'features'"),
        (SPELL, {"radius": -1.0}, "radius"),
    ],
)
def test_impossible_settings_are_refused(kind: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_sweeps_are_of_different_settings_at_several_scales() -> None:
    assert len({rival.label for rival in study.RIVALS}) == len(study.RIVALS)
    for rival in study.RIVALS:
        made = [(scale, method) for scale, _, method in rival.sweep]
        assert len(set(made)) == len(made) == len({one.name for one in rival.conditions()})
        assert len({type(method) for _, method in made}) == 1, rival.label
        assert len({scale for scale, _ in made}) >= 3, rival.label
        assert len({method for _, method in made}) >= 3 or rival.label == study.LOWER


# Their time


def test_added_time_is_paired_by_round() -> None:
    base = [1.0, 2.0, 4.0]
    method = overheads.figures_of([1.5, 2.0, 8.0], base)
    assert method["seconds_per_image"] == 2.0
    assert method["added"] == [0.5, 0.0, 1.0]
    assert overheads.figures_of(base, base)["added"] == [0.0, 0.0, 0.0]


def test_every_rival_is_timed() -> None:
    conditions = overheads.conditions()
    timed = {type(one.baseline) for one in conditions if one.baseline is not None}
    assert timed == {IntervalGuidance, CADS, ParticleGuidance, SPELL}
    assert len({one.name for one in conditions}) == len(conditions)
    assert conditions[0].name == overheads.UNGUIDED
