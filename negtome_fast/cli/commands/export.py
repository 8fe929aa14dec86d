"""`negtome-fast export`: kernels, a C header and a description, for programs without Python."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="compile the kernels for programs without Python; needs no GPU",
        description="Kernels, a C header that launches them, and a description in JSON: "
        "docs/export.md. The options fix what negtome_fast.negtome chooses at run time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--target", required=True, help="sm_80, sm_89, sm_90, sm_100 or gfx942")
    add("--dtype", required=True, help="bf16, fp16 or fp32")
    add("--channels", required=True, type=int, help="channels of the tokens")
    add("--reference", choices=("first", "others", "external"), default="first")
    add("--matching", choices=("paper", "official"), default="paper")
    add("--combine", choices=("nearest", "sum"), default="nearest")
    add("--inplace", action="store_true", help="write into the tokens")
    add("--reference-mask", action="store_true", help="calls pass a reference mask")
    add("--source-mask", action="store_true", help="calls pass a source mask")
    add(
        "--kind",
        choices=("auto", "rows", "tiles"),
        default="auto",
        help="how to launch; auto: as the tuning table says for --items of --tokens",
    )
    add("--items", type=int, default=4, help="items of the batch")
    add("--tokens", type=int, default=4096, help="tokens of an item")
    add("--assembly", action="store_true", help="also write PTX or AMD assembly")
    add("--out", type=Path, default=Path("output/export"), help="folder")


def run(options: argparse.Namespace) -> int:
    from ...integrations import export

    values = {f.name: getattr(options, f.name) for f in fields(export.Operator)}
    for path in export.export(export.Operator(**values), options.out, options.assembly):
        print(path)
    return 0
