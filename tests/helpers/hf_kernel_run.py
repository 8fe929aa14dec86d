"""Program of test_hf_kernel.py, run outside of the repository: hf_kernel_run.py FOLDER PAGE.

Outside of the repository `kernels` is the package from PyPI, not the folder `kernels/`. Prints one
line of JSON for each check.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernels  # the package from PyPI
import negtome_fast as nf
from helpers.cases import CASES
from helpers.oracle import Problem, bits

REPO = "owner/negtome-fast"


def report(check: str, **facts: object) -> None:
    print(json.dumps({"check": check, **facts}), flush=True)


def main(folder: Path, page: Path) -> None:
    kernel = kernels.get_local_kernel(folder)
    report("loaded", name=kernel.__name__, public=list(kernel.__all__), file=str(kernel.__file__))
    check_cases(kernel)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, 24, generator=generator) + torch.randn(50, 24, generator=generator)
    expected = push(nf, x)
    same = torch.equal(bits(push(kernel, x)), bits(expected))
    own = getattr(torch.ops, kernel._ops._NAMESPACE)
    report("beside", same=same, own=own is not torch.ops.negtome_fast, has=hasattr(own, "guide_"))

    # Loaded by its name on the Hub, which LOCAL_KERNELS maps to the folder.
    os.environ["LOCAL_KERNELS"] = f"{REPO}={folder}"
    report("by name", same=kernels.get_kernel(REPO, version=0) is kernel)
    check_layer(kernel, folder, x, expected)
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    push(kernel, leaf).square().sum().backward()
    push(nf, other).square().sum().backward()
    report("gradient", same=torch.equal(leaf.grad, other.grad))
    check_nested(folder, x, expected)
    check_page(page)


def push(package: Any, x: Tensor) -> Tensor:
    return package.negtome(x, alpha=0.7, threshold=0.3, backend="torch")


def check_cases(kernel: Any) -> None:
    """All cases of the operator, by the Triton kernels under the interpreter."""
    passed = 0
    for case in CASES:
        if case.slow:
            continue
        x, arguments = case.make()
        guided = kernel.functional.guide_tokens(x, backend="triton", **arguments)
        Problem(x, arguments).check_guide(*guided)
        passed += 1
    report("cases", passed=passed)


def check_layer(kernel: Any, folder: Path, x: Tensor, expected: Tensor) -> None:
    """A layer of a model is replaced by that of the kernel."""
    kernels.replace_kernel_forward_from_hub(nf.NegToMe, "NegToMe")
    model = nn.Sequential(nf.NegToMe(alpha=0.7, threshold=0.3, backend="torch"))
    layer = kernels.LocalLayerRepository(folder, layer_name="NegToMe")
    with kernels.use_kernel_mapping({"NegToMe": {"cpu": layer}}):
        mode = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE
        model = kernels.kernelize(model, mode=mode, device="cpu")
    replaced = model[0].forward.__func__ is kernel.layers.NegToMe.forward
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    report(
        "layer",
        replaced=replaced,
        same=torch.equal(bits(model(x)), bits(expected)),
        compiled=torch.equal(bits(compiled(x)), bits(expected)),
    )


def check_nested(folder: Path, x: Tensor, expected: Tensor) -> None:
    """Old versions of `kernels` import the folder inside a variant.

    Another variant than before, because each registers operators of its own.
    """
    path = folder / "build" / "torch-cuda" / "negtome_fast" / "__init__.py"
    spec = importlib.util.spec_from_file_location("nested", path)
    assert spec is not None and spec.loader is not None
    nested = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nested)
    same = torch.equal(bits(push(nested, x)), bits(expected))
    report("nested", public=sorted(nested.__all__), same=same)


def check_page(page: Path) -> None:
    """The code of the page in the documentation runs."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    report("page", blocks=len(blocks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
