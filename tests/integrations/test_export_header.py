"""The exported header and the C++ example: compiled without a warning, and run.

They run on host memory, with a stand-in for the CUDA driver (helpers/host_driver.py). This cannot
show that a GPU runs the binaries.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.device import DEVICE
from helpers.oracle import Problem, bits

pytest.importorskip("triton", reason="Triton is not installed")

from helpers.exported import (
    CUDA_INCLUDE,
    EXAMPLE,
    GXX,
    HERE,
    HIP_INCLUDE,
    OPERATORS,
    PAGE,
    compile_with,
    include_options,
    interpreted_only,
    needs_compiler,
)
from helpers.host_driver import LONGER, TOKENS, CProblem, HostDriver, make_problem, memory
from negtome_fast.integrations import export
from negtome_fast.integrations.export import Operator
from negtome_fast.kernels import aot


# ---------------------------------------------------------------------------------------------
# Compiled
# ---------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------
# Run: kernels interpreted on host memory
# ---------------------------------------------------------------------------------------------
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
