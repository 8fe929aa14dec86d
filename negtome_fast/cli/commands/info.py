"""`negtome-fast info`: versions, devices, and the backend that would be used."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, devices, and the backend that is used")
    parser.add_argument("--kernels", action="store_true", help="compile every kernel and report")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    if options.kernels:
        from ...tuner import compile_report

        rows = compile_report.report()
        print(json.dumps(rows, indent=1) if options.json else compile_report.table(rows))
        return int(any(compile_report.problems(row) for row in rows))
    from .. import info

    print(json.dumps(info.collect(), indent=1) if options.json else info.text())
    return 0
