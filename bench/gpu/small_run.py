"""`python -m bench.gpu.small_run DEVICE`: every kernel once on small odd shapes.

Memory checkers watch it. With PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor has an allocation to
itself, so that an access beyond its end is seen.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..compared.shapes import Shape, random_tokens


def main(device: str) -> int:
    """Return 0; raise if a result differs from the definition."""
    from negtome_fast.functional import match_tokens, negtome

    modes: tuple[dict[str, Any], ...] = (
        {},
        {"groups": 2},
        {"reference": "others"},
        {"reference": "others", "combine": "sum"},
        {"matching": "official"},
        {"inplace": True},
    )
    # The interpreter is a thousand times slower.
    tokens, channels = (67, 72) if device == "cuda" else (18, 20)
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.bfloat16,):
        x = random_tokens(Shape("odd", 4, tokens, channels), dtype, device)
        for arguments in modes:
            y = negtome(x.clone(), backend="triton", **arguments)
            expected = negtome(x.clone(), backend="reference", **arguments)
            resolution = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(y, expected, rtol=resolution, atol=resolution)
        match_tokens(x, x[0, 3:], backend="triton")
    print(f"{len(modes)} modes on {device} agree with the definition")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
