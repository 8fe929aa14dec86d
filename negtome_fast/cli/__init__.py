"""The command `negtome-fast`. Bad input is answered by one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from .commands import COMMANDS
from .fields import in_options
from .options import printable

DEBUG_VARIABLE = "NEGTOME_FAST_DEBUG"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="negtome-fast",
        description="Steer diffusion models away from images, at inference time.",
        epilog=f"{DEBUG_VARIABLE}=1 shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS.values():
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 if a command reports failures; 2 for bad input; 130 if interrupted.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        return COMMANDS[options.command].run(options)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        message = in_options(str(error), parser, options)
        line = f"negtome-fast: error: {message}".replace("\n", " ")
        print(printable(line), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("negtome-fast: interrupted", file=sys.stderr)
        return 130
    except MemoryError:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print("negtome-fast: error: not enough memory for this request", file=sys.stderr)
        return 2
