"""Parts that several commands share: options, arguments `NAME=VALUE`, references, and warnings."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..generation import ReferenceFile


class OfReference(argparse.Action):
    """An option of the reference before it; the option that begins a reference has dest `image`."""

    def __init__(self, *args: Any, begun_by: str = "--reference", **options: Any) -> None:
        super().__init__(*args, **options)
        self.begun_by = begun_by

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        references = [*getattr(namespace, "references", [])]
        if self.dest == "image":
            references.append({"image": values})
        elif not references:
            parser.error(f"{option} belongs to a {self.begun_by}, which must come first")
        else:
            references[-1] = {**references[-1], self.dest: values}
        namespace.references = references


def reference_file(entry: dict[str, Any]) -> ReferenceFile:
    """Return the reference that the options of an `OfReference` describe."""
    from ..generation import ReferenceFile

    renamed = {"alpha_of": "alpha", "threshold_of": "threshold"}
    values = {renamed.get(name, name): value for name, value in entry.items()}
    if "noise" in values:
        values["noise"] = False
    return ReferenceFile(**values)


def name_and_value(text: str) -> tuple[str, Any]:
    """Read `NAME=VALUE`; the value is JSON if it can be read as such, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_call_argument(parser: Any) -> None:
    parser.add_argument(
        "--argument",
        action="append",
        type=name_and_value,
        dest="call",
        metavar="NAME=VALUE",
        help="any other argument of the pipeline",
    )


def add_loading(parser: Any, *, tiling: bool = True) -> None:
    """Add the options that say how a model is loaded."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--offload", choices=("model", "sequential", "group"))
    if tiling:
        parser.add_argument("--vae-tiling", action=argparse.BooleanOptionalAction)
    parser.add_argument("--revision", help="revision of the model on the Hub")
    parser.add_argument("--variant", help="variant of the model's files, such as fp16")


def add_files(parser: Any) -> None:
    """Add the options of the folder that a run is written to."""
    parser.add_argument("--output", type=Path, help="folder; default: output/run-NNN")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def printable(text: str) -> str:
    """Return the text with escapes for what a terminal would obey or could not show.

    Names in files may have been chosen to move the cursor or to hide a part of the line.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Show every `UserWarning` as one line on standard error, and no other warnings."""

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            line = f"negtome-fast: warning: {message}".replace("\n", " ")
            print(printable(line), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
