"""Several processes give what one process gives; gloo on the CPU, as many ranks as it says."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers import parallel_ranks
from helpers.parallel_ranks import on_ranks
from helpers.pipelines_fixtures import flux_pipeline, generate
from negtome_fast.pipelines import Reference, apply_negtome, split_with_reference

ITEMS, TOKENS, CHANNELS = 4, 23, 8


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask(*shape: int) -> Tensor:
    return tokens(*shape, seed=5) > -0.3


def repeated() -> Tensor:
    """Every token several times, on all ranks; products of them are exact, so that they tie."""
    one_hot = torch.eye(CHANNELS)[torch.arange(TOKENS) % 5]
    return one_hot.repeat(ITEMS, 1, 1) * torch.tensor([1.0, 2.0, 0.5, 4.0])[:, None, None]


def broken() -> Tensor:
    """Tokens that are not finite, in the reference and in other items, and one that is zero."""
    x = tokens(ITEMS, TOKENS, CHANNELS)
    x[0, 3, 0], x[1, 20, 1], x[2, 3, 2], x[3, 11] = torch.inf, torch.nan, -torch.inf, 0.0
    return x


X = tokens(ITEMS, TOKENS, CHANNELS)
LARGE = (2e4 * X).clamp(-65504, 65504).half()
CASES: dict[str, dict[str, Any]] = {
    "first": {"x": X},
    "first, groups": {"x": X, "groups": 2},
    "only references": {"x": X, "groups": ITEMS},
    "first, in place": {"x": X, "inplace": True},
    "first, masks": {"x": X, "reference_mask": mask(TOKENS), "source_mask": mask(ITEMS, TOKENS)},
    "first, mask of the batch": {"x": X, "groups": 2, "reference_mask": mask(ITEMS, TOKENS)},
    "dropout": {"x": X, "dropout": 0.5, "seed": 3},
    "bf16": {"x": X.bfloat16()},
    "fp64": {"x": X.double()},
    "conditions after the image": {"x": X[:, :7], "stream": TOKENS},
    "others": {"x": X, "reference": "others"},
    "others, groups": {"x": X, "reference": "others", "groups": 2, "reference_mask": mask(TOKENS)},
    "others, sum": {"x": X, "reference": "others", "combine": "sum"},
    "external": {"x": X, "reference": tokens(11, CHANNELS, seed=1)},
    "external, two": {
        "x": X,
        "reference": tokens(2, 11, CHANNELS, seed=1),
        "alpha": torch.tensor([0.9, -0.5]),
        "reference_mask": mask(2, 11),
    },
    "external, two for each item": {
        "x": X,
        "reference": tokens(ITEMS, 2, 11, CHANNELS, seed=1),
        "combine": "sum",
        "reference_mask": mask(ITEMS, 2, 11),
    },
    "official": {"x": X, "matching": "official"},
    "official, in place": {"x": X, "matching": "official", "inplace": True, "groups": 2},
    "official, masks": {
        "x": X,
        "matching": "official",
        "reference_mask": mask(TOKENS),
        "source_mask": mask(ITEMS, TOKENS),
    },
    "official, others": {"x": X, "matching": "official", "reference": "others"},
    "official, others, sum": {
        "x": X,
        "matching": "official",
        "reference": "others",
        "combine": "sum",
    },
    "official, external": {
        "x": X,
        "matching": "official",
        "reference": tokens(2, TOKENS, CHANNELS, seed=1),
        "threshold": torch.tensor([0.3, 0.6]),
    },
    "official, conditions after the image": {
        "x": X[:, :7],
        "stream": TOKENS,
        "matching": "official",
    },
    "equal tokens": {"x": repeated()},
    "equal tokens, official": {"x": repeated(), "matching": "official"},
    "not finite": {"x": broken()},
    "not finite, official": {"x": broken(), "matching": "official"},
    "gradient": {"x": X, "weight": tokens(ITEMS, TOKENS, CHANNELS, seed=2)},
    "saturated": {"x": LARGE},
    "saturated, official": {"x": LARGE, "matching": "official", "alpha": -3.0},
    "negated": {"x": X, "negated": True, "reference": "others"},
    "negated, official": {"x": X, "negated": True, "matching": "official", "inplace": True},
    "gradient, others": {
        "x": X,
        "weight": tokens(ITEMS, TOKENS, CHANNELS, seed=2),
        "reference": "others",
    },
    "gradient, official": {
        "x": X,
        "weight": tokens(ITEMS, TOKENS, CHANNELS, seed=2),
        "matching": "official",
    },
}
CASES = {name: {"threshold": 0.3, **case} for name, case in CASES.items()}


FAMILIES = ("flux2", "qwen", "wan")
BY_TWO = {"ulysses_degree": 2, "ulysses_anything": True}
OTHERS: dict[int, dict[str, Any]] = {
    2: {
        "output": functools.partial(parallel_ranks.gathering, True, "output"),
        "pre_projection": functools.partial(parallel_ranks.gathering, True, "pre_projection"),
        "unknown places": parallel_ranks.unknown_places,
        "edited": functools.partial(parallel_ranks.edited_flux, {"ulysses_degree": 2}),
        "tensor parallel": parallel_ranks.tensor_parallel,
        "fully sharded": parallel_ranks.fully_sharded,
        **{name: functools.partial(parallel_ranks.family, name, BY_TWO) for name in FAMILIES},
    },
    4: {"edited": functools.partial(parallel_ranks.edited_flux, {"ulysses_degree": 4})},
}


@functools.cache
def outcomes(ranks: int) -> list[dict[str, Any]]:
    """Outcomes of all cases, on each rank."""
    cases = {name: functools.partial(parallel_ranks.guide_part, **CASES[name]) for name in CASES}
    for name, (wanted, case) in FLUX_CASES.items():
        if wanted == ranks:
            cases[name] = functools.partial(parallel_ranks.guided_flux, **case)
    cases.update(OTHERS.get(ranks, {}))
    return on_ranks(ranks, parallel_ranks.every, cases)


def on_each_rank(ranks: int, name: str) -> list[Any]:
    results = [rank[name] for rank in outcomes(ranks)]
    for result in results:
        assert not isinstance(result, parallel_ranks.Failure), result
    return results


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_distributed_tokens_are_guided_as_in_one_process(name: str, ranks: int) -> None:
    """The matches are the same ones, and the numbers are equal up to the rounding of products."""
    expected = parallel_ranks.guide_alone(**CASES[name])
    parts = on_each_rank(ranks, name)
    assert all(part[0].shape[1] < TOKENS for part in parts)
    axes = (1, 1 if "gradient" in name else 2, 2)
    guided, measured, pushed = (
        torch.cat([part[i] for part in parts], dim=axis) for i, axis in enumerate(axes)
    )
    assert torch.equal(pushed, expected[2])
    torch.testing.assert_close(guided, expected[0], equal_nan=True)
    torch.testing.assert_close(measured, expected[1], equal_nan=True)
    if CASES[name].get("reference", "first") == "first" and "not finite" not in name:
        size = ITEMS // CASES[name].get("groups", 1)
        assert torch.equal(guided[::size], CASES[name]["x"][::size])
    if name != "only references":
        assert (pushed >= 0).any()


PAIR = {"ulysses_degree": 2}
ANYTHING = {"ulysses_degree": 4, "ulysses_anything": True}
UNEVEN = {"text": 5, "call": {"size": (48, 112)}}  # 21 image tokens
REFERENCES = [
    Reference(tokens(4, 8, 12, seed=4)),
    Reference(tokens(4, 8, 12, seed=5), mask=tokens(64, 96) > 0, alpha=-0.3),
]
SHORT_REFERENCES = Reference(tokens(4, 6, 14, seed=4))
FLUX_CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ulysses": (2, {"parallel": PAIR}),
    "ring": (2, {"parallel": {"ring_degree": 2}}),
    "ulysses, 4 ranks": (4, {"parallel": {"ulysses_degree": 4}}),
    "ring, 4 ranks": (4, {"parallel": {"ring_degree": 4}}),
    "both, 4 ranks": (4, {"parallel": {"ring_degree": 2, "ulysses_degree": 2}}),
    "uneven ulysses": (4, {"parallel": ANYTHING, **UNEVEN}),
    "uneven ring": (2, {"parallel": {"ring_degree": 2, "ring_anything": True}, **UNEVEN}),
    "others, guidance": (2, {"parallel": PAIR, "reference": "others", "call": {"cfg": True}}),
    "as the authors": (
        2,
        {"parallel": PAIR, "matching": "official", "placement": "pre_projection"},
    ),
    "groups, dropout": (2, {"parallel": PAIR, "groups": 2, "dropout": 0.5}),
    "alpha 0": (2, {"parallel": PAIR, "alpha": 0}),
    "references": (2, {"parallel": PAIR, "reference": REFERENCES}),
    "references, uneven": (4, {"parallel": ANYTHING, "reference": SHORT_REFERENCES, **UNEVEN}),
}


@pytest.mark.parametrize("name", FLUX_CASES)
def test_a_context_parallel_flux_is_guided_as_in_one_process(name: str) -> None:
    """Whole runs through diffusers' `enable_parallelism`; every rank has all latents at the end."""
    ranks, case = FLUX_CASES[name]
    expected = parallel_ranks.guided_flux(**{**case, "parallel": None})
    for result in on_each_rank(ranks, name):
        assert_equal_runs(result, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_context_parallel_families_are_guided_as_in_one_process(name: str) -> None:
    """Families that have a plan in diffusers and a pipeline in the tests."""
    expected = parallel_ranks.family(name, None)
    assert not any(unchanged(expected)[1:])
    for result in on_each_rank(2, name):
        assert_equal_runs(result, expected)


def assert_equal_runs(result: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(result["guided"], expected["guided"])
    assert torch.equal(result["after"], result["before"])
    assert unchanged(result) == unchanged(expected)
    assert_equal_summaries(result["summary"], expected["summary"])


def unchanged(result: dict[str, Any]) -> list[bool]:
    pairs = zip(result["guided"], result["before"], strict=True)
    return [torch.equal(*images) for images in pairs]


def assert_equal_summaries(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """In every block the same number of tokens were compared, matched and pushed."""
    for row, other in zip(result["rows"], expected["rows"], strict=True):
        assert row.pop("similarity") == pytest.approx(other["similarity"], rel=1e-4)
        assert row == {key: other[key] for key in row}
    assert [result[key] for key in ("forwards", "guided", "groups")] == [
        expected[key] for key in ("forwards", "guided", "groups")
    ]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_tokens_of_an_input_image_are_on_the_last_ranks(ranks: int) -> None:
    """They are not guided; of 4 ranks two and of 2 ranks one hold nothing else."""
    expected = parallel_ranks.edited_flux(None)
    for predicted in on_each_rank(ranks, "edited"):
        torch.testing.assert_close(predicted, expected)


@pytest.mark.parametrize("placement", ["output", "pre_projection"])
def test_attention_that_gathers_its_tokens_again_is_guided_where_it_has_them(
    placement: str,
) -> None:
    expected = parallel_ranks.gathering(False, placement)
    for guided in on_each_rank(2, placement):
        torch.testing.assert_close(guided, expected)


def test_a_plan_that_leaves_the_text_whole_is_refused() -> None:
    for error in on_each_rank(2, "unknown places"):
        assert "FluxTransformer2DModel" in error and "does not split the text" in error


def test_tensor_parallelism_is_refused_and_nothing_left_behind() -> None:
    for error, hooks in on_each_rank(2, "tensor parallel"):
        assert "FluxTransformer2DModel is tensor-parallel" in error
        assert "context parallelism" in error
        assert hooks == 0


def test_tensor_parallelism_that_comes_later_is_refused_too() -> None:
    pipe = flux_pipeline()
    handle = apply_negtome(pipe, t_end=0)
    pipe.transformer._parallel_config = SimpleNamespace(tensor_parallel_config=object())
    for _ in range(2):
        with pytest.raises(ValueError, match="tensor-parallel"):
            generate(pipe)
    handle.remove()


def test_sharded_parameters_are_no_tensor_parallelism() -> None:
    expected = parallel_ranks.guided_flux(None)["guided"]
    for guided in on_each_rank(2, "fully sharded"):
        torch.testing.assert_close(guided, expected)


def test_shares_have_the_reference_and_every_other_item_once() -> None:
    shares = [split_with_reference("abcdefgh", rank, 3) for rank in range(3)]
    assert ["".join(share) for share in shares] == ["abcd", "aef", "agh"]


@pytest.mark.parametrize("ranks", [1, 2, 5, 9])
def test_shares_are_even(ranks: int) -> None:
    shares = [split_with_reference(range(7), rank, ranks) for rank in range(ranks)]
    assert [item for share in shares for item in share[1:]] == list(range(1, 7))
    assert {share[0] for share in shares} == {0}
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_are_those_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_with_reference([5, 6, 7]) == [5, 6, 7]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert split_with_reference([5, 6, 7]) == [5, 7]


def test_wrong_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        split_with_reference([1, 2], 2, 2)
    with pytest.raises(ValueError, match="at least one item"):
        split_with_reference([], 0, 1)


EXAMPLE = Path(__file__).parents[2] / "examples" / "data_parallel.py"


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    """Pictures that the example's function makes in this process."""
    spec = importlib.util.spec_from_file_location("data_parallel", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    images = example.generate(None, "a pixel art person", list(range(4)), 2, torch.device("cpu"))
    return [np.asarray(image).astype(int) for image in images]


@pytest.mark.parametrize("options", [[], ["--accelerate"]], ids=["torchrun", "accelerate"])
def test_data_parallel_pictures_are_those_of_one_process(
    options: list[str], pictures: list[Any], tmp_path: Path
) -> None:
    """Up to one level: a batch of another size rounds its products differently."""
    from PIL import Image

    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(EXAMPLE), "--cpu", "--images=4", "--steps=2", f"--output={tmp_path}", *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}.png" for i in range(4)]
    for number, expected in enumerate(pictures):
        with Image.open(tmp_path / f"{number}.png") as image:
            assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
