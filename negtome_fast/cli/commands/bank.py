"""`negtome-fast bank`: build or describe a bank of reference images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..options import one_line_warnings, printable


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("bank", help="build or describe a bank of reference images")
    words = parser.add_subparsers(dest="bank_command", required=True, metavar="COMMAND")
    build = words.add_parser("build", help="build a bank from a folder of images")
    add = build.add_argument
    add("folder", type=Path, metavar="DIR", help="searched recursively")
    add("--out", type=Path, required=True, metavar="BANK", help="folder to write")
    add("--size", type=int, default=512, help="pixels a side that are kept")
    add("--encoder", choices=("none", "efficientnet"), default="none", help="features to keep")
    add("--quiet", action="store_true", help="no progress bar")
    info = words.add_parser("info", help="describe a bank")
    info.add_argument("bank", type=Path, metavar="BANK")
    info.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    with one_line_warnings():
        if options.bank_command == "build":
            return _build(options)
        found = describe(options.bank)
        print(json.dumps(found, indent=1) if options.json else _described(found))
        return 0


def _build(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ...files import check_writable
    from ...nudging.bank import ReferenceBank
    from ...nudging.encoders import default_encoder
    from ...nudging.images import check_side, named_images

    check_side("size", options.size)
    if options.out.is_file():
        raise FileExistsError(f"--out {options.out} is a file; give a folder")
    check_writable("out", options.out)
    encoder = default_encoder() if options.encoder == "efficientnet" else None
    images = list(named_images(options.folder))
    shown = tqdm(images, desc="reading", unit="image", disable=options.quiet)
    bank = ReferenceBank.build(shown, size=options.size, encoder=encoder)
    bank.save(options.out)
    for name, reason in bank.skipped:
        print(printable(f"skipped {name}: {reason}"))
    print(printable(f"{len(bank)} images in {options.out}"))
    return 0


def describe(path: Path) -> dict[str, Any]:
    """Return what a saved bank holds, as plain values."""
    from ...nudging.bank import ReferenceBank

    bank = ReferenceBank.load(path)
    features = None if bank.features is None else int(bank.features.shape[1])
    return {
        "images": len(bank),
        "size": int(bank.images.shape[-1]),
        "encoder": bank.encoder,
        "features": features,
        "bytes": sum((path / name).stat().st_size for name in ("bank.json", "bank.safetensors")),
        "skipped": dict(bank.skipped),
        "names": list(bank.names),
    }


def _described(found: Mapping[str, Any]) -> str:
    names, size = found["names"], found["size"]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    encoder = f"{found['features']} features of {found['encoder']}" if found["encoder"] else "none"
    lines = [
        f"images    {found['images']}, {size} x {size} pixels, {found['bytes'] / 2**20:.1f} MiB",
        f"features  {encoder}",
        f"names     {', '.join(names[:5])}{more}",
    ]
    lines += [f"skipped   {name}: {reason}" for name, reason in found["skipped"].items()]
    return "\n".join(map(printable, lines))
