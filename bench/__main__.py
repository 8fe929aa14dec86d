"""`python -m bench [WORD] ...`: without a word it runs the operator's benchmark.

run             the operator against its rivals, shape by shape
compare         two result files: exit code 1 if the second is slower
end-to-end      time that guidance adds to a step and to an image
loaded          ours and rivals on a CPU beside processes that keep every core busy
host-time       time of a guided call on the host, with a stand-in for the GPU
fixed-cost      a guided block and a bare call where the tokens are few
outside-window  time that guidance costs in the steps that it leaves alone
coarse-columns  kind "coarse" against kind "tiles", and the columns that it leaves in question
report          one HTML page and plots of result files

Each word has its own --help.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "run": "suites.operator",
    "compare": "drawn.compare",
    "end-to-end": "suites.end_to_end",
    "loaded": "suites.loaded",
    "host-time": "suites.host_time",
    "fixed-cost": "suites.fixed_cost",
    "outside-window": "suites.outside_window",
    "coarse-columns": "suites.coarse_columns",
    "report": "drawn.report",
}
"""Word -> module whose `main` serves it."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench") -> int:
    """Return the exit code of the command: 0, 1 for a bad result, 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    word = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "run"
    if word not in COMMANDS:
        print(f"{prog}: {word!r} is none of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"bench.{COMMANDS[word]}")
    code: int = command.main(arguments, f"{prog} {word}")
    return code


if __name__ == "__main__":
    sys.exit(main())
