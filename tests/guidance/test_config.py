"""NegToMeConfig: what it accepts, what it refuses and says, and its filters and window."""

from __future__ import annotations

import json
from typing import Any

import pytest

from negtome_fast.config import NegToMeConfig


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("flux", {"alpha": 0.9, "threshold": 0.65, "t_start": 1000, "t_end": 900, "blocks": None}),
        ("sdxl", {"alpha": 0.9, "threshold": 0.7, "t_start": 1000, "t_end": 800}),
        ("sdxl", {"blocks": ("up_blocks",), "min_grid": (32, 32)}),
    ],
)
def test_presets_hold_the_authors_defaults(preset: str, expected: dict[str, Any]) -> None:
    config = NegToMeConfig.preset(preset)
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_preset_takes_overrides() -> None:
    assert NegToMeConfig.preset("sdxl", min_grid=None, alpha=-1).min_grid is None


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'flux', 'sdxl'"):
        NegToMeConfig.preset("fluxx")


@pytest.mark.parametrize(
    "config",
    [
        NegToMeConfig(),
        NegToMeConfig.preset("sdxl"),
        NegToMeConfig(steps=(0.1, 0.5), blocks=("a", "b.*"), exclude_blocks=("c",), groups=2),
    ],
)
def test_a_configuration_survives_json(config: NegToMeConfig) -> None:
    assert NegToMeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_key_is_named_and_the_known_are_listed() -> None:
    with pytest.raises(ValueError, match=r"'alhpa'.*'alpha', 'threshold'"):
        NegToMeConfig.from_dict({"alhpa": 0.5})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"alpha": "0.9"}, TypeError, "alpha must be a number, not str"),
        ({"alpha": True}, TypeError, "alpha must be a number"),
        ({"threshold": 1.5}, ValueError, "cosine similarity"),
        ({"dropout": 1.1}, ValueError, "dropout is a probability"),
        ({"dropout": -0.1}, ValueError, "dropout is a probability"),
        ({"t_start": 1001}, ValueError, "t_start is a scheduler timestep"),
        ({"t_end": -1}, ValueError, "t_end is a scheduler timestep"),
        ({"t_start": 900, "t_end": 1000}, ValueError, "exchange the two"),
        ({"steps": 0.5}, TypeError, "two values"),
        ({"steps": (0.5, 0.5)}, ValueError, "0 <= start < end <= 1"),
        ({"steps": (0, 2)}, ValueError, "0 <= start < end <= 1"),
        ({"reference": "last"}, ValueError, "'first', 'others'"),
        ({"matching": "fast"}, ValueError, "'paper', 'official'"),
        ({"combine": "mean"}, ValueError, "'nearest', 'sum'"),
        ({"placement": "input"}, ValueError, "'output', 'pre_projection'"),
        ({"backend": "cuda"}, ValueError, "'auto', 'triton'"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"groups": 1.0}, TypeError, "groups must be an integer"),
        ({"min_grid": 32}, TypeError, r"\(height, width\)"),
        ({"min_grid": (32, 0)}, ValueError, "min_grid must be at least 1"),
        ({"blocks": ()}, ValueError, "None means all"),
        ({"blocks": (3,)}, TypeError, "names or patterns"),
        ({"exclude_blocks": None}, TypeError, "names or patterns"),
    ],
)
def test_what_cannot_be_right_is_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        NegToMeConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "block", "included"),
    [
        ({}, "anything", True),
        ({"blocks": "up_blocks"}, "up_blocks.0.attentions.1.attn1", True),
        ({"blocks": "up_blocks"}, "down_blocks.0.attentions.1.attn1", False),
        ({"blocks": "transformer_blocks"}, "single_transformer_blocks.0.attn", False),
        ({"blocks": "transformer_blocks.1"}, "transformer_blocks.1.attn", True),
        ({"blocks": "transformer_blocks.1"}, "transformer_blocks.10.attn", False),
        ({"blocks": "*transformer_blocks.?.attn"}, "single_transformer_blocks.3.attn", True),
        ({"blocks": ("a", "b")}, "x.b", True),
        ({"exclude_blocks": "attn2"}, "up_blocks.0.attn2", False),
        ({"blocks": "up_blocks", "exclude_blocks": "*.attn2"}, "up_blocks.0.attn1", True),
    ],
)
def test_blocks_are_filtered_by_parts_and_patterns(
    settings: dict[str, Any], block: str, included: bool
) -> None:
    assert NegToMeConfig(**settings).includes_block(block) is included


@pytest.mark.parametrize(
    ("grid", "included"), [((32, 32), True), ((64, 32), True), ((64, 31), False), ((31, 64), False)]
)
def test_min_grid_asks_for_height_and_width(grid: tuple[int, int], included: bool) -> None:
    assert NegToMeConfig(min_grid=(32, 32)).includes_grid(grid) is included


def test_min_grid_without_a_grid_is_an_error() -> None:
    with pytest.raises(ValueError, match="pass grid="):
        NegToMeConfig(min_grid=(32, 32)).includes_grid(None)


@pytest.mark.parametrize(
    ("timestep", "tolerance", "included"),
    [
        (1000, 0, True),
        (900, 0, True),
        (899.99994, 0, True),
        (899, 0, False),
        (898.4, 0, False),
        (898.4, 7.8, True),
        (0, 0, False),
    ],
)
def test_the_window_holds_both_ends(timestep: float, tolerance: float, included: bool) -> None:
    assert NegToMeConfig().includes_step(timestep, tolerance=tolerance) is included


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 28, 50])
@pytest.mark.parametrize("end", [0.25, 0.3, 0.5, 1.0])
def test_a_fraction_of_steps_guides_that_many(num_steps: int, end: float) -> None:
    config = NegToMeConfig(steps=(0.0, end))
    guided = [i for i in range(num_steps) if config.includes_step(None, i, num_steps)]
    expected = -(-num_steps * round(end * 100) // 100)  # the ceiling, without rounding errors
    assert guided == list(range(expected))


def test_adjoining_fractions_share_no_step() -> None:
    first, second = NegToMeConfig(steps=(0.0, 0.3)), NegToMeConfig(steps=(0.3, 1.0))
    for i in range(10):
        assert first.includes_step(None, i, 10) != second.includes_step(None, i, 10)


def test_fractions_need_the_number_of_steps() -> None:
    with pytest.raises(ValueError, match="number of steps"):
        NegToMeConfig(steps=(0.0, 0.3)).includes_step(900)
