"""The kernels as they run: large shapes, poisoned outputs, repetition, in place, CUDA graphs.

On a GPU, kernels are compiled and shapes are those of models; without one, they are interpreted and
shapes are tiny. Results are checked against fp64 by the rule of the benchmarks: the best token, or
one as good to rounding.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from bench.compared.shapes import Shape, parse_shape, random_tokens
from bench.timing import correctness, memory
from helpers.device import DEVICE
from negtome_fast.functional import match_tokens, negtome

pytest.importorskip("triton", reason="Triton is not installed")

ON_GPU = DEVICE == "cuda"
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.bfloat16,)
#: Shapes of models, and ones that no tile divides.
LARGE = (
    ("4x2304x3072", "8x1024x1280/2", "8x4096x640/2", "4x4096x3072", "3x4097x640", "2x6889x3072")
    if ON_GPU
    else ("3x70x40", "4x33x24/2")
)
REPETITIONS = 100 if ON_GPU else 2
MODES: dict[str, dict[str, object]] = {
    "first": {},
    "others": {"reference": "others"},
    "others, sum": {"reference": "others", "combine": "sum"},
    "official": {"matching": "official"},
}


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEGTOME_FAST_BACKEND", "triton")


def bits(tensor: Tensor) -> Tensor:
    """Bit patterns: NaN equals NaN, and 0 differs from -0."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def small() -> Shape:
    return parse_shape("4x1024x640/2" if ON_GPU else "4x20x24/2")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", LARGE)
def test_shapes_of_models_are_right(text: str, dtype: torch.dtype, poisoned: None) -> None:
    shape = parse_shape(text)
    checked = correctness.check(shape, random_tokens(shape, dtype, DEVICE))
    assert checked["pushed_share"] > 0.1


@gpu_only
def test_video_with_offsets_beyond_32_bits() -> None:
    shape = parse_shape("6x75600x5120")  # 2.3 billion elements
    if torch.cuda.mem_get_info()[0] < 5 * 2 * shape.elements:
        pytest.skip("needs 24 GB of GPU memory")
    correctness.check(shape, random_tokens(shape, torch.bfloat16, DEVICE), rows=32)


@pytest.mark.parametrize("mode", MODES)
def test_every_run_gives_the_same_bits(mode: str) -> None:
    x = random_tokens(small(), torch.bfloat16, DEVICE)
    first = negtome(x, groups=2, **MODES[mode])
    similarity, index = match_tokens(x, groups=2)
    for _ in range(REPETITIONS - 1):
        assert torch.equal(bits(negtome(x, groups=2, **MODES[mode])), bits(first))
    again = match_tokens(x, groups=2)
    assert torch.equal(again[0], similarity) and torch.equal(again[1], index)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_gives_the_same_bits(mode: str, dtype: torch.dtype, poisoned: None) -> None:
    x = random_tokens(small(), dtype, DEVICE)
    expected = negtome(x, groups=2, **MODES[mode])
    assert not torch.equal(bits(expected), bits(x))
    assert negtome(x, groups=2, inplace=True, **MODES[mode]) is x
    assert torch.equal(bits(x), bits(expected))


@pytest.mark.parametrize("mode", MODES)
def test_image_part_of_a_longer_tensor(mode: str) -> None:
    """Memory before the slice is neither read nor written."""
    shape = small()
    whole = torch.full(
        (shape.items, 77 + shape.tokens, shape.channels),
        torch.nan,
        dtype=torch.bfloat16,
        device=DEVICE,
    )
    image = whole[:, 77:]
    image.copy_(random_tokens(shape, torch.bfloat16, DEVICE))
    expected = negtome(image.contiguous(), groups=2, **MODES[mode])
    negtome(image, groups=2, inplace=True, **MODES[mode])
    assert torch.equal(bits(image.contiguous()), bits(expected))
    assert bool(whole[:, :77].isnan().all())


@gpu_only
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_captured_in_a_cuda_graph(mode: str, inplace: bool) -> None:
    """A replayed graph computes from the values that its input has then."""
    shape = small()
    first, second = (random_tokens(shape, torch.bfloat16, DEVICE, seed) for seed in (0, 1))
    expected = negtome(second, groups=2, **MODES[mode])
    x = first.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        negtome(x.clone(), groups=2, inplace=inplace, **MODES[mode])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = negtome(x, groups=2, inplace=inplace, **MODES[mode])
    x.copy_(second)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(bits(y), bits(expected))


@gpu_only
def test_memory_in_place_is_a_fiftieth_of_the_authors() -> None:
    from bench.compared import baselines

    x = random_tokens(parse_shape("4x4096x3072"), torch.bfloat16, DEVICE)
    alpha, threshold = (torch.tensor(value, device=DEVICE) for value in (0.9, 0.65))
    theirs = memory.cuda_extra_bytes(baselines.authors, x, result=True)
    ours = memory.cuda_extra_bytes(
        lambda x: negtome(x, alpha=alpha, threshold=threshold, inplace=True), x, result=False
    )
    assert ours <= theirs / 50


@gpu_only
def test_kernels_are_compiled_here() -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
