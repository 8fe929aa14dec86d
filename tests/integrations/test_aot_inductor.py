"""torch.export and AOTInductor: a guided attention block as a package, run from Python on the CPU.

The package calls the operator by its name, so the process that runs it must have imported
`negtome_fast`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import negtome_fast as nf
from helpers.export_block import block, tokens

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
HERE = Path(__file__).parents[1] / "helpers"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
ALPHAS = (0.8, -0.5, 0.0)


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    items = torch.export.Dim("items", min=2, max=16)
    length = torch.export.Dim("tokens", min=2, max=8192)
    with torch.no_grad():
        return torch.export.export(
            block(),
            (tokens(4, 40), torch.tensor(0.8)),
            dynamic_shapes=({0: items, 1: length}, {}),
        )


def test_exported_program_gives_the_same_bits(program: torch.export.ExportedProgram) -> None:
    module, exported = block(), program.module()
    for shape in ((4, 40), (2, 7), (7, 90)):
        for alpha in map(torch.tensor, ALPHAS):
            x = tokens(*shape)
            with torch.no_grad():
                assert torch.equal(exported(x, alpha), module(x, alpha))


def test_exported_program_is_saved_with_the_operator_in_it(
    program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2")
    assert any(node.target is torch.ops.negtome_fast.guide.default for node in loaded.graph.nodes)
    x, alpha = tokens(3, 20), torch.tensor(0.8)
    with torch.no_grad():
        assert torch.equal(loaded.module()(x, alpha), block()(x, alpha))


RUN = """
import sys, torch, negtome_fast
package = torch._inductor.aoti_load_package(sys.argv[1])
cases = torch.load(sys.argv[2])
torch.save([package(x, alpha) for x, alpha in cases], sys.argv[3])
"""


@needs_compiler
def test_package_runs_in_another_process(
    program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    """The package, compiled once for any number of items and tokens, and any alpha."""
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "block.pt2"),
        # Each saves seconds: no test program for every instruction set first, and the code that
        # calls the kernels is not optimised.
        inductor_configs={
            "cpp.vec_isa_ok": True,
            "aot_inductor.compile_wrapper_opt_level": "O0",
        },
    )
    cases = [
        (tokens(*shape), torch.tensor(alpha)) for shape in ((4, 40), (7, 90)) for alpha in ALPHAS
    ]
    torch.save(cases, tmp_path / "cases.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN, package, str(tmp_path / "cases.pt"), str(tmp_path / "y.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    module = block()
    for (x, alpha), y in zip(cases, torch.load(tmp_path / "y.pt"), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(y, module(x, alpha))
            unguided = module(x, torch.tensor(0.0))
        assert torch.equal(y, unguided) or alpha != 0
        assert alpha == 0 or not torch.allclose(y, unguided)


def test_a_guidance_is_not_exported() -> None:
    """A program would keep the window as it was when the program was made."""
    guidance = nf.Guidance(nf.NegToMeConfig(alpha=0.8, threshold=0.2, t_end=0))

    class Guided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + guidance.apply(x)

    x = tokens(3, 20)
    guidance.begin_step(900)
    with pytest.raises(RuntimeError, match="a Guidance cannot be exported"):
        torch.export.export(Guided(), (x,), strict=False)
    expected = x + nf.negtome(x, alpha=0.8, threshold=0.2)
    assert torch.equal(Guided()(x), expected)
    guidance.end_step()
    assert guidance.summary().guided == 1
