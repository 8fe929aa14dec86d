"""The commands of `negtome-fast`, one module each: `add_parser(commands)` and `run(options)`.

A module imports the libraries of its command only in `run`, so that the help appears at once.
"""

from types import ModuleType

from . import bank, demo, export, generate, info, nudge, tune, web
from . import eval as evaluation

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "generate": generate,
    "web": web,
    "tune": tune,
    "export": export,
    "eval": evaluation,
    "nudge": nudge,
    "bank": bank,
    "info": info,
}
"""Modules of the commands, in the order of the help."""
