"""Rivals of the benchmarks: items that meet all others, and assignments of other packages."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.compared import baselines, candidates, rivals
from bench.compared.shapes import parse_shape, random_tokens
from bench.timing import correctness, measure
from negtome_fast.functional import negtome

OTHERS = parse_shape("6x30x24/2,others")
TINY = parse_shape("4x60x24/2")


# --- all items of a group with each other


def test_products_of_others_are_counted_in_both_directions() -> None:
    shape = parse_shape("4x10x3,others")
    assert shape.others and str(shape) == "4x10x3,others" and shape.products == 12
    assert shape.multiply_adds == 12 * 10 * 10 * 3
    assert parse_shape("6x10x3/2,independent,others").products == 12


def test_matmul_of_others_stores_every_product() -> None:
    x = torch.randn(6, 10, 4)
    stored = sum(product.numel() for product in baselines.matmul_others(x, groups=2))
    assert stored == parse_shape("6x10x4/2,others").products * 10 * 10
    first, *_ = baselines.matmul_others(x, groups=2)
    torch.testing.assert_close(first, x[0] @ x[1:3].flatten(0, 1).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [7, 1000])
def test_split_of_others_is_the_operator(dtype: torch.dtype, rows: int) -> None:
    x = random_tokens(OTHERS, dtype, "cpu")
    y = baselines.split_others(x, groups=2, rows=rows)
    expected = negtome(x, "others", groups=2, backend="reference")
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not torch.equal(y, x)


def test_others_are_checked_against_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    import negtome_fast.functional as functional

    x = random_tokens(OTHERS, torch.float32, "cpu")
    checked = correctness.check(OTHERS, x)
    assert checked["checked"] == 6 * 30 and 0 < checked["pushed_share"] < 1
    y, similarity, pushed = functional.guide_tokens(x, "others", groups=2)
    moved = pushed[0, 0] >= 0
    for breakage, message in (
        (lambda: y[0].add_(1e-3), "tokens are wrong"),
        (lambda: pushed[0, 0].copy_(torch.where(moved, 0, pushed[0, 0])), "from the best"),
        (lambda: pushed.fill_(1000), "matched no token"),
    ):
        breakage()
        monkeypatch.setattr(functional, "guide_tokens", lambda *a, **k: (y, similarity, pushed))
        with pytest.raises(correctness.WrongResult, match=message):
            correctness.check(OTHERS, x)


@pytest.mark.parametrize("matches", [True, False])
def test_a_push_that_is_left_out_is_seen(matches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import negtome_fast.functional as functional

    x = random_tokens(TINY, torch.float32, "cpu")
    nothing = torch.full((4, 1, 60), -1)
    monkeypatch.setattr(functional, "negtome", lambda x, **k: x)
    monkeypatch.setattr(functional, "guide_tokens", lambda x, *a, **k: (x, nothing, nothing))
    with pytest.raises(correctness.WrongResult, match="tokens are wrong"):
        correctness.check(TINY, x, matches=matches)


def test_every_shape_of_others_has_its_rivals_and_refuses_the_rest() -> None:
    inputs = [random_tokens(OTHERS, torch.float32, "cpu")]
    refused = measure.refusal(OTHERS, torch.float32, torch.device("cpu"))
    names = ["ours", "authors", "split", "matmul", "flashlib"]
    times = measure.measure_times(OTHERS, inputs, names, 0.0, refused=refused)
    for name in ("ours", "split", "matmul"):
        assert times[name]["seconds"]["median"] > 0
    for name in ("authors", "flashlib"):
        assert times[name]["failed"] == "does not match all items of a group with each other"


# --- assignments of other packages


def nearest(sources: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """By the definition: the centre of the least Euclidean distance."""
    return torch.cdist(sources.double(), centres.double()).argmin(-1).int()


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages as they are called, with the signatures of 0.3.1 and of 0.4.0."""
    called: list[str] = []

    def of_kmeans(x: Any, centroids: Any, x_sq: Any, out: Any = None, c_sq: Any = None) -> Any:
        called.append("flash-kmeans")
        assert x_sq.shape == x.shape[:2] and c_sq.shape == centroids.shape[:2]
        assert x_sq.dtype == c_sq.dtype == torch.float32
        return nearest(x, centroids)

    def of_flashlib(x: Any, centroids: Any, out: Any = None, c_sq: Any = None) -> Any:
        called.append("flashlib")
        assert c_sq.shape == centroids.shape[:2] and c_sq.dtype == torch.float32
        return nearest(x, centroids)

    functions = {"flash-kmeans": of_kmeans, "flashlib": of_flashlib}
    for package, (module, name) in rivals.ASSIGNMENTS.items():
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            path = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, path, made := ModuleType(path))
            made.__path__ = []  # type: ignore[attr-defined]
        setattr(sys.modules[module], name, functions[package])
    return called


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("package", rivals.ASSIGNMENTS)
def test_an_assignment_gives_the_operator(package: str, groups: int, doubles: list[str]) -> None:
    x = random_tokens(parse_shape(f"4x40x24/{groups}"), torch.float32, "cpu")
    y = rivals.negtome_by(rivals.assignment(package), x, groups)
    expected = negtome(x, groups=groups, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(y, x) and doubles == [package]


@pytest.mark.parametrize("name", candidates.OF_PACKAGES)
def test_a_rival_is_timed_where_its_package_is_installed(name: str, doubles: list[str]) -> None:
    inputs = [random_tokens(TINY, torch.float32, "cpu")]
    times = measure.measure_times(TINY, inputs, ["ours", name], 0.0)
    assert times[name]["seconds"]["median"] > 0 and set(doubles) == {name.removesuffix("-match")}


@pytest.mark.parametrize("package", rivals.ASSIGNMENTS)
def test_a_package_that_is_not_installed_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(rivals.NotInstalled, match=f"{package} is not installed"):
        rivals.assignment(package)
    inputs = [random_tokens(TINY, torch.float32, "cpu")]
    times = measure.measure_times(TINY, inputs, ["ours", package], 0.0)
    assert f"{package} is not installed" in times[package]["failed"]
