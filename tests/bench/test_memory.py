"""Peak memory of the torch backend, counted by the operating system in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.compared.shapes import LONG, Shape
from bench.timing.memory import MIB, RESET, cpu_extra_bytes

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not RESET.exists(), reason="this system does not count peak memory per process"
)

SLICE = """
import bench, ctypes, gc, torch
import negtome_fast as nf
from bench.timing.memory import RESET, status_bytes
torch.set_num_threads(1)
whole = torch.randn(2, 512 + 8192, 1280)
image = whole[:, 512:]
image[1].lerp_(image[0].flip(0), 0.7)
with torch.no_grad():
    nf.negtome(torch.randn(2, 64, 1280), inplace=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")
    before = status_bytes("VmRSS")
    y = nf.negtome(image, inplace={inplace})
    moved = 0 if {inplace} else y.nbytes
    print(status_bytes("VmHWM") - before - moved, image.nbytes)
"""


def test_needs_at_most_64_mib_where_the_naive_matrix_is_a_gigabyte() -> None:
    naive = 4 * LONG.tokens**2
    assert (LONG.items, LONG.tokens, LONG.channels) == (2, 16384, 640) and naive >= 2**30
    extra = cpu_extra_bytes("ours", LONG, "float32", threads=1)
    assert extra is not None and extra <= 64 * MIB


def test_measurement_sees_the_naive_matrix() -> None:
    shape = Shape("small", 2, 4096, 64)
    extra = cpu_extra_bytes("authors", shape, "float32", threads=1)
    assert extra is not None and extra >= 4 * shape.tokens**2


@pytest.mark.parametrize("inplace", [False, True])
def test_slice_of_image_tokens_is_never_copied_whole(inplace: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLICE.format(inplace=inplace)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    extra, size = map(int, done.stdout.split())
    assert size == 2 * 8192 * 1280 * 4
    assert extra < size  # a copy alone would be `size`, beside the tiles
