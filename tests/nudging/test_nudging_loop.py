"""`generate_with_nudging` on the embedded model: passing images stay, failing ones are flagged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.pipelines_fixtures import flux_pipeline
from negtome_fast import models
from negtome_fast.nudging import (
    CallableFilter,
    NudgeSchedule,
    NudgingFailed,
    PixelDistance,
    ReferenceBank,
    generate_with_nudging,
    points,
    steering,
)
from negtome_fast.nudging.schedule import METHODS

CALL = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 16}
NEVER = CallableFilter(lambda images: [0.0] * len(images), 1.0, "never")
ALWAYS = CallableFilter(lambda images: [2.0] * len(images), 1.0, "always")


@pytest.fixture(scope="module")
def pipe() -> Iterator[Any]:
    pipe = models.load_pipeline()
    yield pipe
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    assert not any(getattr(m, h) for m in pipe.transformer.modules() for h in hooks)


@pytest.fixture(scope="module")
def bank(pipe: Any) -> ReferenceBank:
    """A bank of the model's images of two prompts."""
    images = plain(pipe, ["captain red", "doctor blue"]).mul(255).round().to(torch.uint8)
    rows = images.permute(0, 2, 3, 1).numpy()
    return ReferenceBank.build([("captain", rows[0]), ("doctor", rows[1])], size=64)


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def plain(pipe: Any, prompts: list[str]) -> Tensor:
    images = pipe(prompts, generator=generators(len(prompts)), output_type="pt", **CALL).images
    return images.float()


def run(pipe: Any, prompts: Any = ("captain red", "doctor blue"), **arguments: Any) -> Any:
    options = {"generator": generators(), "output_type": "pt", **CALL, **arguments}
    return generate_with_nudging(pipe, list(prompts), **options)


def calls(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of the pipeline from now on."""
    seen: list[dict[str, Any]] = []
    original = type(pipe).__call__

    def call(self: Any, prompt: Any, **kwargs: Any) -> Any:
        seen.append({"prompt": prompt, **kwargs})
        return original(self, prompt, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", call)
    return seen


def test_images_that_pass_are_the_pipelines_own(
    pipe: Any, bank: ReferenceBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(pipe, ["captain red", "doctor blue"])
    seen = calls(pipe, monkeypatch)
    result = run(pipe, filters=[NEVER], undesired=bank)
    assert torch.equal(torch.stack(result.images), expected)
    assert result.passed == (True, True) and [len(rows) for rows in result.attempts] == [1, 1]
    assert len(seen) == 1 and "callback_on_step_end" not in seen[0]


def test_pictures_are_those_of_the_pipeline(pipe: Any, bank: ReferenceBank) -> None:
    expected = pipe(["captain red"], generator=generators(1), **CALL).images[0]
    result = run(
        pipe,
        ["captain red"],
        filters=[NEVER],
        undesired=bank,
        generator=generators(1)[0],
        output_type="pil",
    )
    assert result.images[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_only_flagged_images_are_generated_again(
    pipe: Any, bank: ReferenceBank, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(pipe, ["captain red", "doctor blue"])
    known = PixelDistance(ReferenceBank(("captain",), bank.images[:1]), 0.01)
    seen = calls(pipe, monkeypatch)
    result = run(pipe, filters=[known], undesired=bank, method=method, max_attempts=2)
    assert [call["prompt"] for call in seen] == [["captain red", "doctor blue"], ["captain red"]]
    assert torch.equal(result.images[1], expected[1])
    assert not torch.equal(result.images[0], expected[0])
    first, again = result.attempts[0]
    assert first.verdicts[-1].nearest == "captain" and first.verdicts[-1].score < 0.01
    assert again.verdicts[-1].score > first.verdicts[-1].score
    assert again.undesired == (() if method == "reseed" else ("captain",))
    assert (again.distance > 0) == (method in ("nudge", "both"))
    assert [len(rows) for rows in result.attempts] == [2, 1]


def test_retries_escalate_and_failures_stay_flagged(pipe: Any, bank: ReferenceBank) -> None:
    schedule = NudgeSchedule(escalation=2.0, beta=1.5)
    result = run(pipe, filters=[NEVER, ALWAYS], undesired=bank, max_attempts=3, schedule=schedule)
    assert result.passed == (False, False)
    for rows in result.attempts:
        assert [row.number for row in rows] == [0, 1, 2]
        assert [row.beta for row in rows] == [None, 1.5, 3.0]
        assert rows[2].distance > rows[1].distance > 0
        assert [v.filter for v in rows[0].verdicts] == ["never", "always"]


def test_a_failure_can_be_an_exception_that_holds_the_images(
    pipe: Any, bank: ReferenceBank
) -> None:
    with pytest.raises(
        NudgingFailed, match=r"after 1 attempts .* flag the images \[0, 1\]"
    ) as info:
        run(pipe, filters=[ALWAYS], undesired=bank, max_attempts=1, on_failure="raise")
    assert info.value.result.passed == (False, False) and len(info.value.result.images) == 2


def test_toward_desired_and_away_from_undesired_images(pipe: Any, bank: ReferenceBank) -> None:
    """A captain that is nudged toward the doctor ends nearer to it than without desired points."""
    captain, doctor = (
        ReferenceBank((n,), bank.images[i : i + 1]) for i, n in enumerate(bank.names)
    )
    schedule = NudgeSchedule(objective="squared", alpha=0.3, beta=0.3, max_distance=0.3)
    far = PixelDistance(doctor, 0.0, name="distance").judge(bank.pixels[:1])[0].score
    result = run(
        pipe,
        filters=[ALWAYS],
        undesired=captain,
        desired=doctor,
        max_attempts=2,
        schedule=schedule,
    )
    assert result.attempts[0][1].desired == ("doctor",)
    near = PixelDistance(doctor, 0.0).judge(result.images[0][None])[0].score
    assert near < far


@pytest.mark.parametrize("method", ["nudge", "both"])
def test_an_exception_leaves_the_pipeline_as_it_was(
    pipe: Any, bank: ReferenceBank, method: Any
) -> None:
    expected, steps = plain(pipe, ["captain red"]), []

    def stop(own: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        if len(steps) == 6:
            raise RuntimeError("stop")
        return {}

    with pytest.raises(RuntimeError, match="stop"):
        run(
            pipe,
            ["captain red"],
            filters=[ALWAYS],
            undesired=bank,
            method=method,
            generator=generators(1),
            callback_on_step_end=stop,
        )
    assert torch.equal(plain(pipe, ["captain red"]), expected)


def test_the_callers_callback_is_called_in_every_attempt(pipe: Any, bank: ReferenceBank) -> None:
    steps: list[int] = []

    def count(own: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {"latents": tensors["latents"]}

    result = run(
        pipe,
        ["captain red"],
        filters=[ALWAYS],
        undesired=bank,
        max_attempts=2,
        generator=generators(1),
        callback_on_step_end=count,
    )
    assert steps == [0, 1, 2, 3, 0, 1, 2, 3]
    assert result.attempts[0][1].distance > 0


def test_lists_of_arguments_follow_their_images(
    pipe: Any, bank: ReferenceBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([[0.0, 0.0, 2.0, 0.0], [0.0]])
    seen = calls(pipe, monkeypatch)
    run(
        pipe,
        filters=[CallableFilter(lambda images: next(scores), 1.0)],
        undesired=bank,
        num_images_per_prompt=2,
        generator=generators(4),
        negative_prompt=["", "a big smile person"],
        true_cfg_scale=2.0,
    )
    assert seen[0]["negative_prompt"] == ["", "a big smile person"]
    assert seen[1]["prompt"] == ["doctor blue"]
    assert seen[1]["negative_prompt"] == ["a big smile person"]


def test_a_run_is_saved_with_its_record(pipe: Any, bank: ReferenceBank, tmp_path: Path) -> None:
    scores = iter([[0.0, 2.0]])
    flag = CallableFilter(lambda images: next(scores), 1.0, "second")
    result = run(pipe, filters=[flag], undesired=bank, max_attempts=1, output_type="pil")
    paths = result.save(tmp_path)
    assert [path.name for path in paths] == ["image-0.png", "image-1.flagged.png"]
    record = json.loads((tmp_path / "image.json").read_text())
    assert record["passed"] == [True, False]
    assert record["attempts"][1][0]["verdicts"][0]["score"] == 2.0
    assert record["settings"]["filters"] == ["second"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": []}, "filters is empty"),
        ({"method": "pray"}, "method must be one of nudge, negtome, both, reseed"),
        ({"on_failure": "hide"}, "on_failure"),
        ({"max_attempts": 0}, "max_attempts must be a positive integer"),
        ({"generator": generators(3)}, "2 images need a generator each.*got 3"),
        ({"output_type": "latent"}, "output_type"),
        ({"latents": torch.zeros(1)}, "latents cannot be given"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments_say_what_is_wrong(
    pipe: Any, bank: ReferenceBank, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(pipe, **{"filters": [NEVER], "undesired": bank, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": (0.5, 0.5)}, "window"),
        ({"escalation": 0.5}, "escalation must be at least 1"),
        ({"max_distance": 0.0}, "max_distance must be positive"),
        ({"nearest": 0}, "nearest must be at least 1"),
        ({"nearest": 3, "pool": 2}, "pool must be at least nearest, 3"),
        ({"extend": 1.5}, "extend is a fraction"),
    ],
    ids=str,
)
def test_bad_schedules_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NudgeSchedule(**changes)


def test_a_pipeline_without_a_vae_cannot_be_nudged(bank: ReferenceBank) -> None:
    from negtome_fast.nudging.latents import LatentPoints
    from negtome_fast.pipelines.layouts import layout_of

    bare = flux_pipeline()
    with pytest.raises(ValueError, match="method='negtome' or 'reseed'"):
        LatentPoints(bare, layout_of(bare.transformer), [bank.pixels], (64, 64))


# --------------------------------------------------------------------------------------------
# Desired points, schedules, arguments of retries
# --------------------------------------------------------------------------------------------
def test_one_negative_prompt_for_several_images_is_kept_in_retries(
    pipe: Any, bank: ReferenceBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls(pipe, monkeypatch)
    scores = iter([[2.0, 0.0, 2.0], [0.0, 0.0]])
    result = generate_with_nudging(
        pipe,
        "captain red",
        filters=[CallableFilter(lambda images: next(scores), 1.0)],
        undesired=bank,
        num_images_per_prompt=3,
        generator=generators(3),
        negative_prompt="",
        true_cfg_scale=2.0,
        **CALL,
    )
    assert all(result.passed)
    assert [call["negative_prompt"] for call in seen] == ["", ["", ""]]


def test_each_prompt_can_have_desired_images_of_its_own(pipe: Any, bank: ReferenceBank) -> None:
    captain, doctor = (
        ReferenceBank((n,), bank.images[i : i + 1]) for i, n in enumerate(bank.names)
    )
    swapped = {"captain red": doctor, "doctor blue": captain}
    result = run(pipe, filters=[ALWAYS], undesired=bank, desired=swapped, max_attempts=2)
    assert [rows[1].desired for rows in result.attempts] == [("doctor",), ("captain",)]
    with pytest.raises(ValueError, match="desired has no bank for the prompt 'doctor blue'"):
        run(pipe, filters=[ALWAYS], undesired=bank, desired={"captain red": doctor})


def test_desired_points_are_drawn_among_the_nearest_by_seed_and_attempt() -> None:
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 8, 8)
    many = points.BankSearch(ReferenceBank(tuple("abcdefghij"), images.contiguous()))
    flagged = torch.zeros(20, 3, 8, 8)

    def names(seeds: list[int], attempt: int = 1, pool: int = 4) -> list[str]:
        schedule = NudgeSchedule(pool=pool)
        found = points.choose_points(
            flagged[: len(seeds)], seeds, many, [many] * len(seeds), schedule, attempt
        )
        assert all(point.undesired_names == ("a",) for point in found)
        return [point.desired_names[0] for point in found]

    drawn = names(list(range(20)))
    assert set(drawn) == set("abcd")
    assert names([7]) == [drawn[7]]
    assert names(list(range(20)), attempt=2) != drawn
    assert set(names(list(range(20)), pool=1)) == {"a"}


def test_retries_move_latents_in_more_steps(
    pipe: Any, bank: ReferenceBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[tuple[float, float]] = []
    original = steering.nudge

    def counted(*args: Any, **kwargs: Any) -> Any:
        weights.append((kwargs["alpha"], kwargs["beta"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(steering, "nudge", counted)
    schedule = NudgeSchedule(window=(0.5, 0.5001), extend=0.25, alpha=1.0, beta=3.0, escalation=2)
    run(pipe, filters=[ALWAYS], undesired=bank, max_attempts=4, schedule=schedule)
    # The retries move latents after step 2; after steps 2 and 3; after steps 2, 3 and 4 of four.
    assert weights == [(1, 3)] + [(2, 6)] * 2 + [(4, 12)] * 3


def test_images_that_exist_already_are_judged_in_place_of_a_generation(
    pipe: Any, bank: ReferenceBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(pipe, ["captain red", "doctor blue"])
    whole = run(pipe, filters=[ALWAYS], undesired=bank, max_attempts=2)
    seen = calls(pipe, monkeypatch)
    result = run(pipe, filters=[ALWAYS], undesired=bank, max_attempts=2, first=expected)
    assert len(seen) == 1
    assert torch.equal(torch.stack(result.images), torch.stack(whole.images))
    assert torch.equal(plain(pipe, ["captain red", "doctor blue"]), expected)
    with pytest.raises(ValueError, match=r"first must be \(2, 3, H, W\)"):
        run(pipe, filters=[ALWAYS], undesired=bank, first=expected[:1])
