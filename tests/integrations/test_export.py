"""Export: the compiled files against their description, the command, and bad input."""

from __future__ import annotations

import re
import shlex
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from helpers.exported import OPERATORS, PAGE, description
from negtome_fast.cli import build_parser, main
from negtome_fast.integrations import export
from negtome_fast.integrations.export import Operator
from negtome_fast.kernels import aot

MACHINES = {"cubin": 190, "hsaco": 224}  # EM_CUDA, EM_AMDGPU


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
# The page, bad input and the command line
# ---------------------------------------------------------------------------------------------
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
