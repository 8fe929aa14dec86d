"""Wrong arguments of the nudging functions are refused by name, before anything is generated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.interrupted import NoisePipeline
from negtome_fast.nudging import (
    CallableFilter,
    ImageEncoder,
    NudgeSchedule,
    PixelDistance,
    ReferenceBank,
    generate_with_nudging,
    judge,
    nudge,
    select_nearest,
)

BANK = ReferenceBank(("a",), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
NEVER = CallableFilter(lambda images: [0.0] * len(images), 1.0, "never")
X = torch.randn(2, 4)
ONE = torch.Generator()


class Undrawn(NoisePipeline):
    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("something was generated")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 5}, "prompt must be a string or several, got 5"),
        ({"filters": ["pixels"]}, "filters must have a method judge, str has none"),
        ({"undesired": "folder"}, "a ReferenceBank is needed, got str"),
        ({"desired": {"x": None}}, "a ReferenceBank is needed, got NoneType"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be 1 to 10000, got 0"),
        ({"num_images_per_prompt": 10**12}, "num_images_per_prompt must be 1 to 10000"),
        ({"num_images_per_prompt": 2.5}, "num_images_per_prompt must be an integer, got 2.5"),
        ({"generator": ["a"]}, "generator must be torch.Generator objects"),
        (
            {"num_images_per_prompt": 2, "generator": [ONE, ONE]},
            "one generator stands for two images",
        ),
        ({"first": np.zeros((1, 3, 8, 8))}, "first must be a tensor, got ndarray"),
        ({"first": torch.zeros(1, 3, 0, 0)}, r"first must be \(1, 3, H, W\)"),
        ({"schedule": {}}, "schedule must be a NudgeSchedule, got dict"),
        ({"negtome": {}}, "negtome must be a NegToMeConfig, got dict"),
        ({"return_dict": False}, "return_dict cannot be given"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must have 1 entries, got 2"),
    ],
    ids=lambda case: ", ".join(case) if isinstance(case, dict) else "",
)
def test_generate_with_nudging_refuses(arguments: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"prompt": "x", "filters": [NEVER], "undesired": BANK}
    with pytest.raises((ValueError, TypeError), match=message):
        generate_with_nudging(Undrawn(), **{**usual, **arguments})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"alpha": 10**400}, r"alpha must be finite, got 10000"),
        ({"beta": 1e39}, r"beta must be finite, got 1e\+39"),
        ({"alpha": torch.tensor(1j)}, "alpha must be real numbers, got torch.complex64"),
        ({"max_distance": torch.tensor(True)}, "max_distance must be real numbers"),
        ({"step_size": 1e300}, r"step_size must be at most 3\.403e\+38, got 1e"),
        ({"steps": 10**20}, "steps must be at most 1000000, got 1000"),
    ],
    ids=lambda case: ", ".join(case) if isinstance(case, dict) else "",
)
def test_nudge_refuses(weights: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        nudge(X, undesired=X, **weights)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReferenceBank((1,), BANK.images), "names must be strings"),
        (lambda: ReferenceBank(("a",), None), "images must be a tensor, got NoneType"),
        (lambda: BANK.thumbnails(0), "`size` must be 1 to"),
        (lambda: BANK.thumbnails((4, -1)), "`size` must be 1 to"),
        (lambda: BANK.with_features(None), "encoder must be an ImageEncoder"),
        (
            lambda: BANK.with_features(ImageEncoder("none", lambda images: None)),
            "the encoder 'none' must return a tensor",
        ),
        (lambda: BANK.passing([]), "filters is empty"),
        (lambda: judge([PixelDistance(BANK, 0.1)], torch.zeros(1, 3, 0, 0)), "must have pixels"),
        (lambda: select_nearest(X, None), "points must be a tensor, got NoneType"),
        (lambda: select_nearest(X, X[:0]), r"points must be \(K, ...\) and not empty"),
        (lambda: select_nearest(X[:, :0], X[:, :0]), r"latents must be \(K, ...\) and not empty"),
        (lambda: NudgeSchedule(steps=10**30), "steps must be at most 1000000"),
    ],
    ids=range(12),
)
def test_parts_refuse(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_escalation_stays_in_fp32() -> None:
    """Late attempts would otherwise end in an overflow after all others were drawn."""
    schedule = NudgeSchedule()
    assert schedule.factor(4) == 1.5**3
    assert schedule.factor(1000) == NudgeSchedule(escalation=1e200).factor(5) == 1e30
