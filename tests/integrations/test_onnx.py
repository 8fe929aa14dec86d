"""ONNX: models with the operator, run by onnxruntime on the CPU, against the oracle."""

from __future__ import annotations

import builtins
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from helpers.cases import CASES
from helpers.export_block import block, tokens
from helpers.oracle import Problem
from negtome_fast.functional import guide_tokens, match_tokens, negtome
from negtome_fast.integrations.onnx import export_onnx, translation_table

pytest.importorskip("onnx", reason="extra onnx is not installed")
pytest.importorskip("onnxscript", reason="extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="extra onnx is not installed")

from negtome_fast.integrations._onnx_functions import BLOCK  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
PAGE = Path(__file__).parents[2] / "docs" / "compilers.md"
#: Exported once each: all ways to match, push and mask, and all dtypes.
SIGNATURES = (
    "first",
    "first, source mask",
    "others, groups",
    "three references, masked",
    "references per item, sum",
    "first, duplicates",
    "official",
    "official, duplicates",
    "official, masked",
    "first, bfloat16",
    "others, float16",
    "others, sum, float16",
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch.onnx says on every export that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


class Guide(nn.Module):
    """`guide_tokens`; types that numpy lacks enter and leave as fp32, which is exact."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__()
        self.dtype, self.options = dtype, options

    def forward(self, x: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = {k: v.to(self.dtype) if k == "reference" else v for k, v in tensors.items()}
        guided = guide_tokens(x.to(self.dtype), **{**self.options, **given})
        return guided[0].float(), guided[1], guided[2]


def session(program: torch.onnx.ONNXProgram) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = program.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model: Any, *inputs: Tensor) -> list[Tensor]:
    names = [entry.name for entry in model.get_inputs()]
    feeds = dict(zip(names, (value.contiguous().numpy() for value in inputs), strict=True))
    return [torch.from_numpy(value) for value in model.run(None, feeds)]


def split(arguments: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    return tensors, {k: v for k, v in arguments.items() if k not in tensors}


def signature(x: Tensor, arguments: dict[str, Any]) -> tuple[object, ...]:
    """Key of a case; one model serves all cases of a key."""
    tensors, options = split(arguments)
    shapes = tuple((k, v.shape, v.dtype) for k, v in tensors.items())
    return x.shape, x.dtype, shapes, tuple(sorted((k, str(v)) for k, v in options.items()))


def domains(graph: Any) -> set[str]:
    """Domains of all operators in a graph and in the bodies of its loops."""
    found = {node.domain for node in graph.node}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= domains(attribute.g)
    return found


@pytest.mark.parametrize("name", SIGNATURES)
def test_cases_of_the_operator(name: str) -> None:
    """One model serves all cases of its shapes: ties, NaN, zeros, thresholds, masks."""
    made = {case.name: case.make() for case in CASES if not case.slow}
    x, arguments = made[name]
    tensors, options = split(arguments)
    program = export_onnx(Guide(x.dtype, **options).eval(), (x.float(),), keywords=tensors)
    assert domains(program.model_proto.graph) == {""} and not program.model_proto.functions
    model = session(program)
    for other, (x, arguments) in made.items():
        if signature(x, arguments) == signature(*made[name]):
            y, similarity, pushed = run(model, x.float(), *split(arguments)[0].values())
            Problem(x, arguments).check_guide(y.to(x.dtype), similarity, pushed)
            assert pushed.dtype == torch.int64, other


def test_ties_and_numbers_that_are_not_finite_are_among_the_cases() -> None:
    made = {case.name: signature(*case.make()) for case in CASES if not case.slow}
    exported = {made[name] for name in SIGNATURES}
    for first in ("first", "official"):
        for kind in ("duplicates", "nan", "infinite", "zero tokens", "beyond fp32 norms"):
            assert made[f"{first}, {kind}"] in exported, (first, kind)
    for combine in ("", ", sum"):
        assert made[f"others{combine}, float16, saturated"] in exported


def test_double_precision_stays_double() -> None:
    x = tokens(3, 40).double()
    (y,) = run(session(export_onnx(Plain(alpha=0.5, threshold=0.375).eval(), (x,))), x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, negtome(x, alpha=0.5, threshold=0.375), rtol=1e-14, atol=1e-14)


def test_dropout_spares_other_tokens_in_every_run() -> None:
    x = tokens(4, 500)
    sizes = {0: torch.export.Dim("items", min=2), 1: torch.export.Dim("tokens", min=2)}
    plain = Plain(threshold=-1.0, dropout=0.25).eval()
    model = session(export_onnx(plain, (tokens(3, 90),), dynamic_shapes=(sizes,)))
    pushed = negtome(x, threshold=-1.0)
    first, second = (run(model, x)[0] for _ in range(2))
    for y in (first, second):
        moved = (y != x).any(dim=2)[1:]
        assert abs(float(moved.float().mean()) - 0.75) < 0.06  # five standard deviations
        torch.testing.assert_close(y[1:][moved], pushed[1:][moved])
    assert not torch.equal(first, second)


class Plain(nn.Module):
    """`negtome` alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return negtome(x, **self.options)


class Match(nn.Module):
    """`match_tokens` alone."""

    def forward(self, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        return match_tokens(x, reference)


def test_one_model_for_any_number_of_items_and_tokens(tmp_path: Path) -> None:
    """With two groups that share the batch, and with alpha as an input."""
    items = torch.export.Dim("half", min=2, max=8) * 2
    length = torch.export.Dim("tokens", min=2, max=8192)
    module = block(groups=2, reference="others")
    path = tmp_path / "block.onnx"
    alpha = torch.tensor(0.8)
    export_onnx(
        module,
        (tokens(4, 40), alpha),
        path,
        dynamic_shapes=({0: items, 1: length}, {}),
        input_names=["x", "alpha"],
        output_names=["y"],
        opset_version=20,
    )
    model = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in model.get_inputs()] == ["x", "alpha"]
    for shape in ((4, 40), (6, 2), (8, 37)):
        x = tokens(*shape)
        for strength in (alpha, torch.tensor(-0.5), torch.tensor(0.0)):
            with torch.no_grad():
                expected = module(x, strength)
            (y,) = run(model, x, strength)
            torch.testing.assert_close(y, expected)


def test_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the page, except AOTInductor, which another test compiles."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    numpy.random.seed(0)
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "_inductor" not in code:
            exec(compile(code, str(PAGE), "exec"), names)
    x = torch.from_numpy(names["x"])
    with torch.no_grad():
        expected = names["model"](x, torch.tensor(0.9))
    torch.testing.assert_close(torch.from_numpy(names["y"]), expected)


def test_matches_over_several_blocks_tie_to_the_lowest_token() -> None:
    x, reference = tokens(2, 30), tokens(1, 700, seed=3)[0]
    assert len(reference) > 2 * BLOCK
    # Copies in the first, the middle and the last block; the last is ragged.
    for copy in (20, 300, 690):
        reference[copy] = 3.0 * x[0, 5]
    similarity, index = run(session(export_onnx(Match().eval(), (x, reference))), x, reference)
    expected, chosen = match_tokens(x, reference, backend="torch")
    assert index[0, 5] == 20
    assert torch.equal(index, chosen)
    torch.testing.assert_close(similarity, expected)


MEMORY = """
import resource, sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
model = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
x = numpy.random.default_rng(0).standard_normal((2, int(sys.argv[2]), 8), dtype=numpy.float32)
before = peak()
model.run(None, {"x": x})
print((peak() - before) * 1024)
"""


def test_memory_is_linear_in_the_tokens(tmp_path: Path) -> None:
    length = torch.export.Dim("tokens", min=2, max=65536)
    path, count = tmp_path / "negtome.onnx", 12_000
    export_onnx(
        Plain().eval(),
        (torch.randn(2, 40, 8),),
        path,
        dynamic_shapes=({1: length},),
        input_names=["x"],
    )
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), str(count)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 4 * count * count / 3  # of one matrix of similarities


def test_what_cannot_be_exported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8, 4)
    with pytest.raises(ValueError, match="opset_version must be at least 18, got 17"):
        export_onnx(Plain(), (x,), opset_version=17)

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return negtome(x * 1.0, inplace=True)

    with pytest.raises(ValueError, match="use inplace=False"):
        export_onnx(InPlace().eval(), (x,))

    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "onnxscript":
            raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "negtome_fast.integrations._onnx_functions", raising=False)
    monkeypatch.delattr("negtome_fast.integrations._onnx_functions", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'negtome-fast\[onnx\]'"):
        translation_table()
