"""The coarse int8 product of the torch backend leaves every match as exact as without it.

All cases are forced through it, even on processors without int8 instructions, where it is slow.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import negtome_fast as nf
from bench.compared.shapes import Shape, random_tokens
from helpers.cases import CASES, Case, tokens
from helpers.oracle import Problem, bits
from negtome_fast import ops
from negtome_fast.arguments import check_problem
from negtome_fast.backends import coarse, small
from negtome_fast.backends.workers import ALONE
from negtome_fast.functional import guide_tokens

CHANNELS = 96
HAS_INT8_PRODUCTS = coarse.has_int8_products
SMALL_BLOCKS = {"BLOCK_COLUMNS": coarse.RUN, "ROWS": 32, "FIRST_ROWS": 8}


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the coarse product for every call, whatever its size and the processor."""
    monkeypatch.setattr(small, "SMALL", 0)
    monkeypatch.setattr(coarse, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(coarse, "LEAST_TOKENS", 1)
    monkeypatch.setattr(coarse, "LEAST_WORK", 0)
    monkeypatch.setattr(coarse, "has_int8_products", lambda: True)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every int8 product."""
    rows: list[int] = []
    multiply = torch._int_mm

    def counted(a: Tensor, b: Tensor, **out: Tensor) -> Tensor:
        rows.append(len(a))
        return multiply(a, b, **out)

    monkeypatch.setattr(torch, "_int_mm", counted)
    return rows


def set_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL_BLOCKS.items():
        monkeypatch.setattr(coarse, name, value)


def match(x: Tensor, reference: Tensor | str = "first", matching: str = "paper") -> tuple:
    p = check_problem(x, reference, None, matching, 1)
    return ops.match(
        x, p.reference, p.mask, p.pairing.mode, 1, p.pairing.per_item, matching, "torch"
    )


def match_without(x: Tensor, reference: Tensor | str = "first", matching: str = "paper") -> tuple:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse, "has_int8_products", lambda: False)
        return match(x, reference, matching)


def noise(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 200, CHANNELS, generator=generator)


def near_a_mean(generator: torch.Generator) -> Tensor:
    mean = 20 * torch.randn(CHANNELS, generator=generator)
    return noise(generator) + mean


def outlying_channels(generator: torch.Generator) -> Tensor:
    x = noise(generator)
    x[..., :3] *= 50
    return x


def outlying_tokens(generator: torch.Generator) -> Tensor:
    x = noise(generator)
    x[:, ::9, 5] = 300
    return x


def neighbours_in_bf16(generator: torch.Generator) -> Tensor:
    """Tokens that differ from another token by one unit in the last place of one channel."""
    x = noise(generator).bfloat16()
    half = x.shape[1] // 2
    x[:, half:] = x[:, :half]
    place = torch.randint(CHANNELS, (2, half, 1), generator=generator)
    nudged = x[:, half:].view(torch.int16)
    nudged.scatter_add_(2, place, torch.ones_like(place, dtype=torch.int16))
    return x


def signs(generator: torch.Generator) -> Tensor:
    """Tokens of mean zero that are rounded to +-127 without an error."""
    some = torch.randn(100, CHANNELS, generator=generator).sign()
    return torch.cat([some, -some])


def coarse_rows_alone(generator: torch.Generator) -> Tensor:
    """Tokens whose scale one channel sets; the others, less than a unit of it, decide the match."""
    x = noise(generator)
    x[1, :, 5] = 200
    x[0] = signs(generator)
    return x


def coarse_columns_alone(generator: torch.Generator) -> Tensor:
    x = noise(generator)[:, :100].repeat(1, 2, 1)
    x[0, :, 5] = 200
    x[0, 100:] *= -1
    x[1] = signs(generator)
    return x


def apart_in_size(generator: torch.Generator) -> Tensor:
    exponents = torch.randint(-9, 17, (2, 200, 1), generator=generator)
    return noise(generator) * 10.0**exponents


KINDS: list[Callable[[torch.Generator], Tensor]] = [
    *(noise, near_a_mean, outlying_channels, outlying_tokens, neighbours_in_bf16, apart_in_size),
    *(coarse_rows_alone, coarse_columns_alone),
]


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("case", [c for c in CASES if not c.slow], ids=str)
def test_match_and_output_are_right(
    case: Case,
    small_blocks: bool,
    everywhere: None,
    products: list[int],
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if small_blocks:
        set_small_blocks(monkeypatch)
    x, arguments = case.make("cpu")
    Problem(x, arguments).check_guide(*guide_tokens(x, **arguments, backend="torch"))
    assert products or "empty mask" in case.name


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_stays_within_its_bound(kind: Callable[[torch.Generator], Tensor]) -> None:
    x = kind(torch.Generator().manual_seed(0))
    centre, scratch = coarse._centre(x[0]), coarse._ThreadScratch(256, CHANNELS)
    a, b = (
        coarse._rounded(part, centre, len(part), scratch, along_centre=True)
        for part in (x[1], x[0])
    )
    wide, unit = (
        centre.double(),
        [
            part.double() / rounded.norm.double()[:, None]
            for part, rounded in ((x[1], a), (x[0], b))
        ],
    )
    p, q = a.values.double(), b.values.double()
    coarse_scores = a.scale.double()[:, None] * (p @ q.T) * b.scale.double()
    rest = unit[0] @ unit[1].T - (unit[0] @ wide)[:, None] - coarse_scores - b.along_centre.double()
    bound = a.error.double()[:, None] * b.length + a.length.double()[:, None] * b.error
    assert torch.all(rest.abs() <= bound + coarse.SCORE_ERROR)
    assert bound.mean() < 0.1 * (a.length.mean() * b.length.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_best_column_is_never_lost(
    kind: Callable[[torch.Generator], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = kind(torch.Generator().manual_seed(1))
    scratch = coarse._ThreadScratch(256, CHANNELS)
    block = coarse._RoundedColumns.of(x[0], None, ALONE, [scratch])
    assert block is not None
    rows = coarse._rounded(x[1], block.centre, len(x[1]), scratch, along_centre=False)
    row, column, left = coarse._candidates(rows, block, scratch)
    cosines = torch.nn.functional.normalize(x[1].double(), dim=-1)
    cosines = cosines @ torch.nn.functional.normalize(x[0].double(), dim=-1).T
    kept = torch.zeros(cosines.shape, dtype=torch.bool)
    kept[row, column] = True
    best = cosines == cosines.amax(dim=1, keepdim=True)
    assert torch.all(kept | ~best | left[:, None])
    assert not bool(kept[left].any())
    assert bool((column >= 0).all()) and bool((column < x.shape[1]).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("small_blocks", [False, True])
def test_match_is_exact_whatever_the_tokens(
    kind: Callable[[torch.Generator], Tensor],
    small_blocks: bool,
    everywhere: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if small_blocks:
        set_small_blocks(monkeypatch)
    x = kind(torch.Generator().manual_seed(2))
    for arguments in ({}, {"matching": "official"}, {"reference": "others"}):
        Problem(x, arguments).check_match(*match(x, **arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("matching", ["paper", "official"])
@pytest.mark.parametrize("reference", ["first", "others"])
def test_chooses_as_the_product_in_fp32(
    dtype: torch.dtype, matching: str, reference: str, everywhere: None, products: list[int]
) -> None:
    x = random_tokens(Shape("", 3, 150, 256), torch.float32, "cpu").to(dtype)
    similarity, index = match(x, reference, matching)
    assert products
    expected, expected_index = match_without(x, reference, matching)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(similarity, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("copies", [2, 40])
@pytest.mark.parametrize("small_blocks", [False, True])
def test_first_of_equal_tokens_is_chosen(
    copies: int, small_blocks: bool, everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two copies are compared by the scores of pairs, forty by a product in fp32, block by block.
    if small_blocks:
        set_small_blocks(monkeypatch)
    some = tokens(torch.Generator().manual_seed(0), (3, 37, CHANNELS))
    x = some.repeat(1, copies, 1)
    for matching in ("paper", "official"):
        _, index = match(x, "others", matching)
        assert bool(((index >= 0) & (index < 37)).all())


@pytest.mark.parametrize("threads", [1, 2])
def test_score_of_a_pair_does_not_depend_on_the_others(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 1000, generator=generator)
    row, column = torch.arange(300), torch.arange(300).flip(0)
    scratch = coarse._ThreadScratch(1, 1000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        scores = coarse._scores_of_pairs(x[1], row, x[0], column, scratch)
        for count in (1, 2, 7, 64):
            part = coarse._scores_of_pairs(x[1], row[-count:], x[0], column[-count:], scratch)
            assert torch.equal(part, scores[-count:])
    finally:
        torch.set_num_threads(before)


def test_is_given_up_where_it_tells_nothing_apart(
    everywhere: None, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_small_blocks(monkeypatch)
    x = 1e-3 * torch.randn(3, 300, CHANNELS, generator=torch.Generator().manual_seed(0))
    x[..., 0] = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)).sign()
    similarity, index = match(x)
    assert products == [coarse.FIRST_ROWS]
    Problem(x, {}).check_match(similarity, index)


def test_few_undecided_rows_do_not_end_it(everywhere: None, products: list[int]) -> None:
    x = random_tokens(Shape("", 2, 600, CHANNELS), torch.float32, "cpu")
    x[1, 300:310] = 0  # equally far from everything
    similarity, index = match(x)
    assert sum(products) == 600
    assert torch.equal(index, match_without(x)[1])
    assert torch.all(similarity[1, 0, 300:310] == 0)


def test_in_place_equals_out_of_place(everywhere: None) -> None:
    x = tokens(torch.Generator().manual_seed(0), (4, 200, CHANNELS), torch.bfloat16)
    for reference in ("first", "others"):
        expected = nf.negtome(x, reference, backend="torch")
        moved = nf.negtome(x.clone(), reference, backend="torch", inplace=True)
        assert torch.equal(bits(moved), bits(expected))


def test_ignores_the_default_device_and_autocast(everywhere: None, products: list[int]) -> None:
    x = tokens(torch.Generator().manual_seed(0), (3, 130, CHANNELS))
    expected = nf.negtome(x, backend="torch")
    with torch.device("meta"):
        assert torch.equal(nf.negtome(x, backend="torch"), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nf.negtome(x, backend="torch"), expected)
    assert len(products) == 3 * len(products[: len(products) // 3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_ignores_the_default_dtype(
    dtype: torch.dtype, everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_small_blocks(monkeypatch)
    # Every column comes again in a later block, where a less rounded score would take its place.
    x = tokens(torch.Generator().manual_seed(0), (2, 300, CHANNELS)).repeat(1, 2, 1)
    expected = match(x, x[0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = match(x, x[0])
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("saturate", [False, True])
def test_a_library_whose_products_overflow_is_not_used(
    saturate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def multiply(a: Tensor, b: Tensor) -> Tensor:
        product = a.int() @ b.int()
        return product.clamp(-(2**15), 2**15 - 1) if saturate else product

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", multiply)
    coarse._products_are_exact.cache_clear()
    try:
        assert HAS_INT8_PRODUCTS() is not saturate
    finally:
        coarse._products_are_exact.cache_clear()


def test_is_used_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def pays(rows: int, columns: int, channels: int, dtype: torch.dtype, device: str) -> bool:
        # Expanded, so that large tokens take no memory.
        searched = torch.zeros(1, 1, dtype=dtype, device=device).expand(columns, channels)
        search = coarse.Search(searched[:1].expand(rows, channels), *[searched] * 3)
        return coarse.pays(searched, [search] * 3)

    monkeypatch.setattr(coarse, "has_int8_products", lambda: True)
    assert pays(1024, 1024, 1280, torch.bfloat16, "cpu")
    assert pays(1024, 1024, 1280, torch.float32, "cpu")
    assert not pays(1024, 1024, 1280, torch.float64, "cpu")
    assert not pays(1024, 1024, 1280, torch.bfloat16, "meta")
    assert not pays(1024, 1024, 320, torch.bfloat16, "cpu")
    assert not pays(10**6, 77, 1280, torch.bfloat16, "cpu")
    assert not pays(10**6, 10**6, 64, torch.bfloat16, "cpu")
    assert not pays(1024, 1024, 2**17, torch.bfloat16, "cpu")
    monkeypatch.setattr(coarse, "has_int8_products", lambda: False)
    assert not pays(1024, 1024, 1280, torch.bfloat16, "cpu")


def test_processor_without_int8_products_multiplies_in_fp32(
    everywhere: None, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(coarse, "has_int8_products", HAS_INT8_PRODUCTS)
    nf.negtome(torch.randn(2, 64, 32), backend="torch")
    assert not products
