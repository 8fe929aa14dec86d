"""`python -m bench [run | compare | end-to-end | fixed-cost | report] ...`; without a word it runs.

run         the operator against what it is to replace, shape by shape
compare     two result files: exit code 1 where the second is slower
end-to-end  what guidance adds to a step and to an image
loaded      ours and rivals on the CPU beside processes that keep every core busy
host-time   what a guided call costs the host, by a stand-in for the GPU
fixed-cost  what a guided block and a bare call take where the tokens are few
report      one HTML page and plots of result files

Each word has its own --help.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

#: The word -> the module whose `main` serves it.
COMMANDS = {
    "run": "run",
    "compare": "compare",
    "end-to-end": "end_to_end",
    "loaded": "loaded",
    "host-time": "host_time",
    "fixed-cost": "fixed_cost",
    "report": "report",
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench") -> int:
    """Exit code of the command: 0, 1 for a bad result, 2 for bad input."""
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
