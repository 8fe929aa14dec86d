"""Run in a process of its own by test_hf_kernel.py, outside of the repository: FOLDER PAGE.

There `kernels` is the package from PyPI, not the folder of this repository. Prints one line of JSON
for each check.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import torch
from torch import nn

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

    # The table of cases, by the Triton kernels under the interpreter.
    passed = 0
    for case in CASES:
        if case.slow:
            continue
        x, arguments = case.make()
        guided = kernel.functional.guide_tokens(x, backend="triton", **arguments)
        Problem(x, arguments).check_guide(*guided)
        passed += 1
    report("cases", passed=passed)

    # Beside the package that it was made of: the same bits, other operators.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, 24, generator=generator) + torch.randn(50, 24, generator=generator)
    expected = nf.negtome(x, alpha=0.7, threshold=0.3, backend="torch")
    same = torch.equal(
        bits(kernel.negtome(x, alpha=0.7, threshold=0.3, backend="torch")), bits(expected)
    )
    own = getattr(torch.ops, kernel._ops._NAMESPACE)
    report("beside", same=same, own=own is not torch.ops.negtome_fast, has=hasattr(own, "guide_"))

    # By its name on the Hub, found by LOCAL_KERNELS.
    os.environ["LOCAL_KERNELS"] = f"{REPO}={folder}"
    report("by name", same=kernels.get_kernel(REPO, version=0) is kernel)

    # A layer of a model, replaced.
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

    # Gradients.
    leaf = x.clone().requires_grad_()
    kernel.negtome(leaf, alpha=0.7, threshold=0.3, backend="torch").square().sum().backward()
    other = x.clone().requires_grad_()
    nf.negtome(other, alpha=0.7, threshold=0.3, backend="torch").square().sum().backward()
    report("gradient", same=torch.equal(leaf.grad, other.grad))

    # As old versions of `kernels` import a variant; another one, as each has its own operators.
    path = folder / "build" / "torch-cuda" / "negtome_fast" / "__init__.py"
    spec = importlib.util.spec_from_file_location("nested", path)
    assert spec is not None and spec.loader is not None
    nested = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nested)
    y = nested.negtome(x, alpha=0.7, threshold=0.3, backend="torch")
    report("nested", public=sorted(nested.__all__), same=torch.equal(bits(y), bits(expected)))

    # The page in the documentation.
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    report("page", blocks=len(blocks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
