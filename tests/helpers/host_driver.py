"""The exported header, run on host memory: a stand-in for the CUDA driver, and problems.

The header is compiled with fake_cuda.cpp, whose launches run the kernels under Triton's interpreter
with exactly the arguments that the header packs.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.cases import tokens
from helpers.exported import CUDA_INCLUDE, GXX, HERE, compile_with, description
from negtome_fast.integrations import export
from negtome_fast.integrations.export import Operator
from negtome_fast.kernels import aot

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    *[ctypes.c_uint] * 4,
    ctypes.POINTER(ctypes.c_void_p),
)


_C_TYPES = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32, "int64": ctypes.c_int64}


def memory(address: int, dtype: str, elements: int = 1) -> Tensor | None:
    """A tensor at an address. The interpreter follows offsets beyond its size."""
    if not address:
        return None
    size = elements * _DTYPES[dtype].itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=_DTYPES[dtype])


class HostDriver:
    """A library of `sources` with the stand-in driver, and the kernels of an exported folder."""

    def __init__(self, folder: Path, sources: list[Path], work: Path) -> None:
        self.described = description(folder)
        self.folder = work / "texts"
        self.folder.mkdir()
        library = work / "library.so"
        options = ["-std=c++17", "-O0", "-shared", "-fPIC", "-Dmain=example_main"]
        options += ["-I", str(folder), "-isystem", str(CUDA_INCLUDE), "-o", str(library)]
        compile_with(GXX, [*options, *map(str, sources), str(HERE / "fake_cuda.cpp")])  # type: ignore[arg-type]
        for kernel in self.described["kernels"]:
            (self.folder / kernel["file"]).write_bytes(kernel["name"].encode() + b"\0")
        self.library = ctypes.CDLL(str(library))
        self.launched: list[str] = []
        self.failure: Exception | None = None
        self.callback = _LAUNCH(self._launch)
        self.library.fake_cuda_begin(self.callback)

    def _launch(
        self,
        text: bytes,
        symbol: bytes,
        grid_x: int,
        grid_y: int,
        block: int,
        shared: int,
        packed: Any,
    ) -> int:
        try:
            self._interpret(text.decode(), symbol.decode(), (grid_x, grid_y), block, shared, packed)
        except Exception as error:  # an exception cannot cross the C code
            self.failure = error
            return 1
        return 0

    def _interpret(
        self, name: str, symbol: str, grid: tuple[int, int], block: int, shared: int, packed: Any
    ) -> None:
        (kernel,) = (k for k in self.described["kernels"] if k["name"] == name)
        assert symbol == kernel["symbol"]
        assert [block, 1, 1] == kernel["block"] and shared == kernel["shared"]
        values: dict[str, Any] = {}
        for position, entry in enumerate(kernel["arguments"]):
            kind = _C_TYPES[entry["type"]]
            value = ctypes.cast(packed[position], ctypes.POINTER(kind)).contents.value
            if entry["to" if entry["type"] == "pointer" else "name"] == "void":
                assert value == 0
                continue
            assert value % entry.get("multiple_of", 1) == 0, (entry, value)
            values[entry["name"]] = (
                memory(value, entry["to"]) if entry["type"] == "pointer" else value
            )
        constants = dict(kernel["constants"])
        if "INTERPRETED" in constants:
            constants["INTERPRETED"] = True
        launches = export.launches(Operator(**self.described["operator"]))
        (kind,) = (launch.kernel for launch in launches if launch.name == name)
        aot._function(kind)[grid](**values, **constants)
        self.launched.append(name)

    def call(self, function: str, *arguments: Any) -> int:
        self.launched.clear()
        code = int(getattr(self.library, function)(*arguments))
        if self.failure:
            raise self.failure
        return code


class CProblem(ctypes.Structure):
    """`negtome_problem` of the header."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("items", "tokens", "channels", "groups")),
        ("x", ctypes.c_uint64),
        ("x_item_stride", ctypes.c_int64),
        ("x_token_stride", ctypes.c_int64),
        ("out", ctypes.c_uint64),
        ("out_item_stride", ctypes.c_int64),
        ("out_token_stride", ctypes.c_int64),
        ("reference", ctypes.c_uint64),
        ("reference_item_stride", ctypes.c_int64),
        ("reference_token_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("references", "reference_tokens", "per_item")),
        ("alpha", ctypes.c_uint64),
        ("threshold", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("alphas", "thresholds")),
        *((name, ctypes.c_uint64) for name in ("reference_mask", "source_mask")),
        *((name, ctypes.c_uint64) for name in ("similarity", "pushed")),
    ]


ITEMS, TOKENS, LONGER, REFERENCE_TOKENS = 4, 41, 50, 37


def make_problem(operator: Operator, channels: int) -> tuple[CProblem, dict[str, Any]]:
    """A problem on host memory, the image part of longer items, and its tensors by name."""
    generator = torch.Generator().manual_seed(7)
    dtype = getattr(torch, operator.dtype)
    external, official = operator.reference == "external", operator.matching == "official"
    groups = 1 if external else 2
    whole = tokens(generator, (ITEMS, LONGER, channels), dtype)
    x = whole[:, LONGER - TOKENS :]
    out = x if operator.inplace else torch.full((ITEMS, TOKENS, channels), torch.nan, dtype=dtype)
    columns = TOKENS if official or not external else REFERENCE_TOKENS
    arguments: dict[str, Any] = {
        "reference": operator.reference,
        "matching": operator.matching,
        "combine": operator.combine,
        "groups": groups,
        "alpha": torch.tensor([0.9]),
        "threshold": torch.tensor([0.65]),
    }
    slots = 1
    if external:
        slots = 2
        pattern = x[:1, :1].new_zeros(ITEMS, slots, columns, channels)
        reference = (x[:, None, :columns].expand(pattern.shape) * 0.7).float()
        reference += 0.5 * torch.randn(reference.shape, generator=generator)
        arguments["reference"] = reference.to(dtype).contiguous()
        arguments["alpha"] = torch.tensor([0.9, -0.4])
        arguments["threshold"] = torch.tensor([0.65, 0.7])
    masks = {}
    if operator.reference_mask:
        shape = (ITEMS, slots, columns) if external else (ITEMS, columns)
        masks["reference_mask"] = torch.rand(shape, generator=generator) < 0.6
    if operator.source_mask:
        masks["source_mask"] = torch.rand((ITEMS, TOKENS), generator=generator) < 0.7
    rows = ITEMS // groups - 1 if operator.reference == "others" else slots
    rows = rows if operator.combine == "sum" else 1
    similarity = torch.full((ITEMS, rows, TOKENS), torch.nan)
    pushed = torch.full((ITEMS, rows, TOKENS), 77)
    problem = CProblem(
        items=ITEMS,
        tokens=TOKENS,
        channels=channels,
        groups=groups,
        x=x.data_ptr(),
        x_item_stride=x.stride(0),
        out=out.data_ptr(),
        out_item_stride=0 if operator.inplace else out.stride(0),
        alpha=arguments["alpha"].data_ptr(),
        alphas=len(arguments["alpha"]),
        threshold=arguments["threshold"].data_ptr(),
        thresholds=len(arguments["threshold"]),
        similarity=similarity.data_ptr(),
        pushed=pushed.data_ptr(),
        **{name: mask.data_ptr() for name, mask in masks.items()},
    )
    if external:
        problem.reference = arguments["reference"].data_ptr()
        problem.references, problem.reference_tokens, problem.per_item = slots, columns, 1
    parts = {"x": x, "out": out, "whole": whole, "similarity": similarity, "pushed": pushed}
    return problem, parts | {"arguments": arguments | masks}
