"""`python -m docs.render [--check] [PAGE ...]`: writes the generated parts of README.md and docs/.

Tables come from the files in bench/results, and the figures of those results are drawn again. With
--check nothing is written, and the exit code is 1 if a page differs from what would be written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench._path import ROOT

from .pages import FIGURES, PAGES, check_markers, render


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Render pages below `root`; return 1 if --check finds one that is not up to date."""
    parser = argparse.ArgumentParser(prog="python -m docs.render", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument(
        "pages", nargs="*", metavar="PAGE", help=f"default: all of {', '.join(PAGES)}"
    )
    options = parser.parse_args(argv)
    unknown = [page for page in options.pages if page not in PAGES]
    if unknown:
        parser.error(f"no page {', '.join(unknown)}; there are {', '.join(PAGES)}")
    stale = []
    for page in options.pages or PAGES:
        path = root / page
        text = path.read_text(encoding="utf-8")
        check_markers(page, text)
        rendered = render(page, text)
        if rendered != text:
            stale.append(page)
        if not options.check:
            if page in FIGURES:
                FIGURES[page]()
            path.write_text(rendered, encoding="utf-8")
    if options.check and stale:
        print(f"not up to date: {', '.join(stale)}; run make pages", file=sys.stderr)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
