"""The examples of docs/applications.md, from the record of `make pictures`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def shell(commands: Sequence[str]) -> str:
    """Commands as a block of Markdown; long ones are broken before an option."""
    lines = [
        re.sub(r" (--(?:reference|output|compare)\b)", r" \\\n    \1", command, count=1)
        if len(command) > 90
        else command
        for command in commands
    ]
    return "```bash\n" + "\n".join(lines) + "\n```"


def example(name: str, record: dict[str, Any]) -> str:
    """Commands, picture and measured effect of one example."""
    found = record[name]
    plain, guided = found["plain"], found["guided"]
    gained = plain - guided if found["lower_is_meant"] else guided - plain
    words = (
        "the intended direction" if gained > 0 else "no change" if gained == 0 else "the other way"
    )
    return (
        f"{shell(found['commands'])}\n\n![{name}](pictures/{name}.png)\n\n"
        f"Measured on these {found['images']} images: {found['measure']}: "
        f"{plain:.2f} without guidance, {guided:.2f} with it ({words}); {found['pushed']:.0%} of "
        "the tokens in the window were pushed."
    )
