"""Translation of the fields that a library names in an error to the options of a command.

A field is a name in backticks, a name with an underscore, or the first word of the message:
"`call` eta: ...", "set guidance_scale above 1", "images must be at least 1, got 0".
"""

from __future__ import annotations

import argparse
import re

ALIASES = {"references": ("image",), "folder": ("output", "out")}
"""Fields that are set under another name: `references` by the option that begins a reference."""


# Parts of paths are not fields, and NAME=VALUE stays as the library writes it.
_LONG = r"(?<![\w/.'-])([a-z]+(?:_[a-z]+)+)(?![\w/'=-]|\.\w)"
_FIELD = re.compile(rf"`([a-z_]+)`|{_LONG}|^([a-z]+)(?=:? )")


def in_options(message: str, parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> str:
    """Replace fields by the options of the chosen command that set them.

    A name that no option of the command sets stays as it is.
    """
    options = _options_by_field(parser, chosen)
    return _FIELD.sub(lambda found: options.get(found[found.lastindex or 0], found[0]), message)


def _options_by_field(
    parser: argparse.ArgumentParser, chosen: argparse.Namespace
) -> dict[str, str]:
    """Options of the chosen command, by field.

    An option sets the field that is its destination. `--guidance-scale` with another destination,
    such as a list of scales, also stands for the field `guidance_scale`.
    """
    by_name: dict[str, str] = {}
    by_destination: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return _options_by_field(action.choices[getattr(chosen, action.dest)], chosen)
        option = next((name for name in action.option_strings if name.startswith("--")), None)
        if option is not None:
            by_name[option.removeprefix("--").replace("-", "_")] = option
            by_destination.setdefault(action.dest, option)
    for field, destinations in ALIASES.items():
        for destination in destinations:
            if destination in by_destination:
                by_destination.setdefault(field, by_destination[destination])
    return by_name | by_destination
