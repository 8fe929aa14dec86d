"""Export: what the compiler made against what header and description say, and the header run.

The header and the C++ example are compiled with a stand-in for the CUDA driver on host memory
(fake_cuda.cpp), whose launches run the kernels under Triton's interpreter with exactly the
arguments that the header packs. What this cannot show is that a GPU runs the binaries.
"""

from __future__ import annotations

import ctypes
import json
import re
import shlex
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.cases import tokens
from helpers.device import DEVICE
from helpers.oracle import Problem, bits

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from negtome_fast.cli import build_parser, main
from negtome_fast.integrations import export
from negtome_fast.integrations.export import Operator
from negtome_fast.kernels import aot

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "helpers"
EXAMPLE = ROOT / "examples" / "export" / "negtome.cpp"
PAGE = ROOT / "docs" / "export.md"
BACKENDS = Path(triton.__file__).parent / "backends"
CUDA_INCLUDE, HIP_INCLUDE = BACKENDS / "nvidia" / "include", BACKENDS / "amd" / "include"
GXX = shutil.which("g++")
needs_compiler = pytest.mark.skipif(
    GXX is None or not (CUDA_INCLUDE / "cuda.h").is_file(), reason="needs g++ and cuda.h"
)
interpreted_only = pytest.mark.skipif(DEVICE == "cuda", reason="kernels are compiled here")

# Every target, dtype, reference, way of launching and choice at least once.
OPERATORS = {
    "sm_80": Operator("sm_80", "bf16", 64),
    "sm_80, fp16, in place, rows": Operator("sm_80", "fp16", 64, inplace=True, kind="rows"),
    "sm_80, fp32, odd channels": Operator("sm_80", "fp32", 40, kind="tiles", inplace=True),
    "sm_89, others": Operator("sm_89", "bf16", 64, "others", kind="tiles"),
    "sm_89, external, masks, rows": Operator(
        "sm_89", "bf16", 64, "external", reference_mask=True, source_mask=True, kind="rows"
    ),
    "sm_90": Operator("sm_90", "bf16", 3072),
    "sm_90, external, masks": Operator(
        "sm_90", "bf16", 64, "external", reference_mask=True, source_mask=True, kind="tiles"
    ),
    "sm_100, official, masks": Operator(
        "sm_100", "fp16", 64, matching="official", reference_mask=True, source_mask=True
    ),
    "sm_80, others, sum": Operator("sm_80", "fp32", 64, "others", combine="sum"),
    "gfx942, external, official, sum": Operator(
        "gfx942", "bf16", 64, "external", matching="official", combine="sum"
    ),
}
MACHINES = {"cubin": 190, "hsaco": 224}  # EM_CUDA, EM_AMDGPU


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All operators exported, with assembly, in one process that compiles."""
    root = tmp_path_factory.mktemp("exported")
    result = {name: root / str(number) for number, name in enumerate(OPERATORS)}
    written = export.export_all([(OPERATORS[n], result[n]) for n in OPERATORS], assembly=True)
    for paths, folder in zip(written, result.values(), strict=True):
        assert sorted(paths) == sorted(folder.iterdir())
    return result


def description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "negtome.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------
def symbols(binary: bytes) -> tuple[int, set[str]]:
    """Machine and names of the symbols of a 64-bit little-endian ELF file."""
    assert binary[:6] == b"\x7fELF\x02\x01"
    (machine,) = struct.unpack_from("<H", binary, 18)
    (table,) = struct.unpack_from("<Q", binary, 40)
    entry, count = struct.unpack_from("<HH", binary, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", binary, table + i * entry) for i in range(count)]
    found = set()
    for _, kind, _, _, offset, size, link, _, _, step in sections:
        if kind in (2, 11):  # SHT_SYMTAB, SHT_DYNSYM
            names = sections[link][4]
            for at in range(offset, offset + size, step):
                start = names + struct.unpack_from("<I", binary, at)[0]
                found.add(binary[start : binary.index(b"\0", start)].decode())
    return machine, found


@pytest.mark.parametrize("name", OPERATORS)
def test_files_are_binaries_of_the_target_with_the_described_kernels(
    name: str, folders: dict[str, Path]
) -> None:
    operator, described = OPERATORS[name], description(folders[name])
    assert described["operator"] == {**vars(operator)}
    expected = [launch.name for launch in export.launches(operator)]
    assert [kernel["name"] for kernel in described["kernels"]] == expected
    for kernel in described["kernels"]:
        machine, found = symbols((folders[name] / kernel["file"]).read_bytes())
        assert machine == MACHINES[kernel["file"].rsplit(".", 1)[1]]
        assert kernel["symbol"] in found
        assert kernel["shared"] <= aot.TARGETS[operator.target].shared_limit


def compiled_arguments(folder: Path, kernel: dict[str, Any]) -> list[int]:
    """Bytes of every argument, as the compiler's assembly declares them."""
    text = folder / f"{kernel['name']}.ptx"
    if text.is_file():
        entry = text.read_text(encoding="utf-8").split(f".entry {kernel['symbol']}(")[1]
        widths = re.findall(r"\.param \.[usbf](\d+)", entry.split("\n)")[0])
        return [int(width) // 8 for width in widths]
    metadata = text.with_suffix(".amdgcn").read_text(encoding="utf-8").split(".args:")[1]
    found = re.findall(r"\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", metadata.split(".group")[0])
    return [int(size) for size, kind in found if not kind.startswith("hidden_")]


@pytest.mark.parametrize("name", OPERATORS)
def test_described_arguments_are_those_of_the_compiled_kernels(
    name: str, folders: dict[str, Path]
) -> None:
    for kernel in description(folders[name])["kernels"]:
        expected = [entry["bytes"] for entry in kernel["arguments"]]
        assert compiled_arguments(folders[name], kernel) == expected
        arguments = {entry["name"] for entry in kernel["arguments"][:-2]}
        assert arguments | set(kernel["constants"]) == set(kernel["parameters"])
        assert not arguments & set(kernel["constants"])


def test_promises_to_the_compiler_follow_the_channels(folders: dict[str, Path]) -> None:
    def promised(name: str) -> dict[str, int | None]:
        (kernel,) = (k for k in description(folders[name])["kernels"] if k["name"] == "tiles")
        return {entry["name"]: entry.get("multiple_of") for entry in kernel["arguments"]}

    divisible, odd = promised("sm_90"), promised("sm_80, fp32, odd channels")
    assert divisible["D"] == divisible["stride_rn"] == divisible["row_ptr"] == 16
    assert odd["D"] is None and odd["stride_rn"] is None and odd["row_ptr"] == 16
    assert divisible["N"] is None  # sizes that change from call to call


# ---------------------------------------------------------------------------------------------
# The header, compiled
# ---------------------------------------------------------------------------------------------
def compile_with(compiler: str, arguments: list[str]) -> None:
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def include_options(operator: Operator) -> list[str]:
    if operator.target.startswith("gfx"):
        return ["-D__HIP_PLATFORM_AMD__", "-isystem", str(HIP_INCLUDE)]
    return ["-isystem", str(CUDA_INCLUDE)]


@needs_compiler
@pytest.mark.parametrize(
    "name", ["sm_90", "sm_100, official, masks", "gfx942, external, official, sum"]
)
@pytest.mark.parametrize("language", ["c", "c++"])
def test_header_compiles_without_a_warning(
    name: str, language: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    operator = OPERATORS[name]
    source = tmp_path / ("a.c" if language == "c" else "a.cpp")
    source.write_text('#include "negtome.h"\n')
    standard = {"c": "-std=c99", "c++": "-std=c++11"}[language]
    options = ["-x", language, standard, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    if operator.target.startswith("gfx") and not (HIP_INCLUDE / "hip").is_dir():
        pytest.skip("no HIP headers")
    options += ["-I", str(folders[name]), *include_options(operator), str(source)]
    compile_with(GXX, options)  # type: ignore[arg-type]


@needs_compiler
def test_example_compiles_with_the_compilers_that_are_here(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    options = ["-std=c++17", "-I", str(folders["sm_90"]), "-c", str(EXAMPLE)]
    strict = ["-Wall", "-Wextra", "-Werror", *include_options(OPERATORS["sm_90"])]
    compile_with(GXX, [*options, *strict, "-o", str(tmp_path / "gxx.o")])  # type: ignore[arg-type]
    if nvcc := shutil.which("nvcc"):
        compile_with(nvcc, [*options, "-o", str(tmp_path / "nvcc.o")])


@needs_compiler
def test_code_of_the_page_compiles(folders: dict[str, Path], tmp_path: Path) -> None:
    (code,) = re.findall(r"```cpp\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    source = tmp_path / "page.cpp"
    source.write_text(code)
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(source)]
    options += ["-I", str(folders["sm_90"]), *include_options(OPERATORS["sm_90"])]
    compile_with(GXX, options)  # type: ignore[arg-type]


def test_commands_and_links_of_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) == 2
    for line in lines:
        options = vars(build_parser().parse_args(shlex.split(line)[1:]))
        Operator(**{name: options[name] for name in Operator.__dataclass_fields__})
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (PAGE.parent / target).is_file()


# ---------------------------------------------------------------------------------------------
# The header, run: kernels interpreted on host memory
# ---------------------------------------------------------------------------------------------
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
    """What lies at an address. The interpreter follows offsets from it, whatever its size."""
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
    """A problem on host memory, the image part of longer rows, and what it consists of."""
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


@needs_compiler
@interpreted_only
@pytest.mark.parametrize("name", [n for n in OPERATORS if not n.startswith("gfx")])
def test_header_runs_the_operator(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The whole call: grids, arguments and scratch memory of every launch, against the oracle."""
    operator = OPERATORS[name]
    driver = HostDriver(folders[name], [HERE / "export_entry.cpp"], tmp_path)
    library = driver.library
    library.test_check.restype = ctypes.c_char_p
    library.test_workspace_bytes.restype = ctypes.c_size_t
    assert library.test_problem_bytes() == ctypes.sizeof(CProblem)
    problem, parts = make_problem(operator, min(operator.channels, 64))
    expected = Problem(parts["x"].clone(), parts["arguments"])
    before = parts["whole"].clone()

    assert library.test_check(ctypes.byref(problem)) is None
    size = library.test_workspace_bytes(ctypes.byref(problem))
    workspace = torch.full((size + 512,), 0xFF, dtype=torch.uint8)
    start = -workspace.data_ptr() % 256
    call = (ctypes.byref(problem), ctypes.c_uint64(workspace.data_ptr() + start))
    folder = str(driver.folder).encode()
    assert driver.call("test_run", folder, *call, ctypes.c_size_t(size)) == 0
    assert driver.launched == [launch.name for launch in export.launches(operator)]
    assert library.fake_cuda_open_modules() == 0
    expected.check_guide(parts["out"], parts["similarity"], parts["pushed"])
    assert bool((parts["pushed"] >= 0).any()) and bool((parts["pushed"] < 0).any())

    if operator.inplace:
        problem.out_item_stride = problem.x_item_stride * 2
        assert b"strides of out must be those of x" in library.test_check(ctypes.byref(problem))
        problem.out_item_stride = 0
    if operator.reference == "external":
        problem.out, right = problem.reference, problem.out
        assert library.test_check(ctypes.byref(problem)).startswith(b"out must not be the ref")
        problem.out = right

    # Nothing else was written: neither past the scratch memory nor before the image tokens.
    assert bool((workspace[start + size :] == 0xFF).all())
    outside = slice(0, LONGER - TOKENS)
    assert torch.equal(bits(parts["whole"][:, outside]), bits(before[:, outside]))

    # Without places for similarity and pushed the scratch memory grows, and the output is the same.
    first = parts["out"].clone()
    parts["whole"].copy_(before)
    problem.similarity = problem.pushed = 0
    more = library.test_workspace_bytes(ctypes.byref(problem))
    assert more > size
    assert driver.call("test_run", folder, *call, ctypes.c_size_t(size)) == 2  # out of memory
    assert driver.launched == []
    workspace = torch.full((more + 512,), 0xFF, dtype=torch.uint8)
    start = -workspace.data_ptr() % 256
    call = (ctypes.byref(problem), ctypes.c_uint64(workspace.data_ptr() + start))
    assert driver.call("test_run", folder, *call, ctypes.c_size_t(more)) == 0
    assert torch.equal(bits(parts["out"]), bits(first))


@needs_compiler
def test_header_refuses_what_the_kernels_cannot_do(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    driver = HostDriver(folders["sm_89, others"], [HERE / "export_entry.cpp"], tmp_path)
    check = driver.library.test_check
    check.restype = ctypes.c_char_p
    operator = OPERATORS["sm_89, others"]

    def refused(**changes: int) -> str:
        problem, parts = make_problem(operator, 64)
        for key, value in changes.items():
            setattr(problem, key, value)
        wrong = check(ctypes.byref(problem))
        code = driver.call(
            "test_run", str(driver.folder).encode(), ctypes.byref(problem), 0, ctypes.c_size_t(1)
        )
        assert code == 1 and driver.launched == [] and parts is not None  # invalid value
        return wrong.decode()

    problem, parts = make_problem(operator, 64)
    assert refused(items=0) == "items, tokens and channels must be positive"
    assert refused(channels=40).startswith("channels must be a multiple of NEGTOME_DIVISOR")
    assert refused(groups=3) == "groups must divide items"
    assert refused(groups=4) == 'reference "others" needs 2 items in a group'
    assert refused(alpha=0) == "x, out, alpha and threshold are needed"
    assert refused(x=parts["x"].data_ptr() + 2) == "all pointers must be aligned to 16 bytes"
    assert refused(out=parts["x"].data_ptr(), x=parts["x"].data_ptr()).startswith("out must not")
    assert refused(source_mask=16) == "these kernels were exported without a source mask"
    assert refused(reference=16) == "these kernels take references from the batch"
    assert refused(alphas=3).startswith("alpha and threshold need one value")
    assert "below 2^31" in refused(x_item_stride=2**31)
    assert "multiples" in refused(x_item_stride=64 * 50 + 8)
    assert refused(tokens=2**24) == "too many tiles"
    missing = str(tmp_path / "nowhere").encode()
    assert driver.call("test_run", missing, ctypes.byref(problem), 0, ctypes.c_size_t(0)) == 301
    assert driver.library.fake_cuda_open_modules() == 0


EXAMPLES = ["sm_80", "sm_80, fp16, in place, rows", "sm_80, fp32, odd channels"]


@needs_compiler
@interpreted_only
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(
    name: str, folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    driver = HostDriver(folders[name], [EXAMPLE], tmp_path)

    def run(*words: object) -> int:
        encoded = [str(word).encode() for word in ("negtome", *words)]
        return driver.call(
            "_Z12example_mainiPPc", len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)
        )

    channels = min(OPERATORS[name].channels, 64)
    assert run(driver.folder, 3, 35, channels) == 0
    driver.library.fflush(None)
    assert re.search(r"3 x 35 x \d+: \d+ tokens pushed, 0 wrong", capfd.readouterr().out)
    assert run() == 2 and run(driver.folder, 3, 35, 0) == 2

    # It notices a single wrong value.
    right = driver._interpret

    def spoil(launch: str, *rest: Any) -> None:
        right(launch, *rest)
        kernel = driver.described["kernels"][-1]
        if launch == kernel["name"]:
            place = [entry["name"] for entry in kernel["arguments"]].index("out_ptr")
            address = ctypes.cast(rest[-1][place], ctypes.POINTER(ctypes.c_uint64)).contents.value
            out = memory(address, OPERATORS[name].dtype, 41 * channels)
            assert out is not None
            out[40 * channels] += 1.0

    driver._interpret = spoil  # type: ignore[method-assign]
    assert run(driver.folder, 3, 35, channels) == 1


@pytest.mark.skipif(DEVICE != "cuda" or torch.version.hip is not None, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("options", [{}, {"kind": "rows"}, {"inplace": True}], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_example_runs_on_this_gpu(dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    target = f"sm_{major}{minor}"
    if target not in aot.TARGETS or GXX is None:
        pytest.skip(f"no target {target}, or no g++")
    library = next(
        (p for f in ("/usr/lib", "/usr/lib64", "/usr/local") for p in Path(f).rglob("libcuda.so*")),
        None,
    )
    if library is None:
        pytest.skip("the CUDA driver's library was not found")
    export.export(Operator(target, dtype, 640, **options), tmp_path / "exported")
    program = tmp_path / "negtome"
    arguments = ["-std=c++17", "-O2", "-I", str(tmp_path / "exported"), str(EXAMPLE)]
    arguments += ["-isystem", str(CUDA_INCLUDE), str(library), "-o", str(program)]
    compile_with(GXX, arguments)
    command = [str(program), str(tmp_path / "exported"), "3", "300", "640"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------
# Bad input, and the command line
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "sm_70"}, "target must be one of sm_80, sm_89"),
        ({"dtype": "fp8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"channels": 0}, "channels must be a positive integer, got 0"),
        ({"reference": "last"}, "reference must be one of first, others, external"),
        ({"matching": "theirs"}, "matching must be one of paper, official"),
        ({"combine": "mean"}, "combine must be one of nearest, sum"),
        ({"kind": "fast"}, "kind must be one of auto, rows, tiles"),
        ({"items": 1}, "reference 'first' needs at least 2 items"),
        ({"reference": "others", "inplace": True}, "inplace cannot serve others"),
        ({"matching": "official", "kind": "rows"}, 'use kind="tiles"'),
    ],
)
def test_what_cannot_be_exported_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"target": "sm_90", "dtype": "bf16", "channels": 3072}
    with pytest.raises(ValueError, match=re.escape(message)):
        Operator(**arguments | change)


def test_command_writes_a_folder_and_says_what_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Operator, Path, bool]] = []

    def record(operator: Operator, folder: Path, assembly: bool) -> list[Path]:
        seen.append((operator, folder, assembly))
        return [folder / "negtome.h"]

    monkeypatch.setattr(export, "export", record)
    words = ["export", "--target", "gfx942", "--dtype", "fp16", "--channels", "640"]
    words += ["--reference", "external", "--reference-mask", "--kind", "rows", "--assembly"]
    assert main([*words, "--out", str(tmp_path / "here")]) == 0
    expected = Operator("gfx942", "float16", 640, "external", reference_mask=True, kind="rows")
    assert seen == [(expected, tmp_path / "here", True)]
    assert "negtome.h" in capsys.readouterr().out
    assert main(["export", "--target", "sm_90", "--dtype", "bf16", "--channels", "-1"]) == 2
    assert "channels must be a positive integer" in capsys.readouterr().err


def test_folder_that_cannot_be_written_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["export", "--target", "sm_90", "--dtype", "bf16", "--channels", "64"]
    assert main([*words, "--out", str(tmp_path / "file" / "below")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("negtome-fast: error:") and error.count("\n") == 1


def test_compiling_that_fails_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "require_triton", _no_triton)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        aot.run_compiling("negtome_fast.integrations.export.compile", [])
    monkeypatch.undo()
    with pytest.raises(
        RuntimeError, match=r"compiling the kernels \(--nothing\) failed: .*nothing"
    ):
        aot.run_compiling("json.tool", ["--nothing"])


def _no_triton() -> None:
    raise RuntimeError("Triton is not installed; the kernels cannot be compiled without it")
