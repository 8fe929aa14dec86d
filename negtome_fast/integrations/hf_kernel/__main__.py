"""`python -m negtome_fast.integrations.hf_kernel FOLDER`: assemble the Hugging Face kernel."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import NAME, assemble


def main(argv: Sequence[str] | None = None) -> int:
    """Assemble the kernel; returns the exit code: 0, or 2 after one line on the error."""
    parser = argparse.ArgumentParser(
        prog="python -m negtome_fast.integrations.hf_kernel", description=__doc__
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--repo-id", default=f"OWNER/{NAME}", help="repository that it will be published in"
    )
    options = parser.parse_args(argv)
    try:
        written = assemble(options.folder, options.repo_id)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"hf_kernel: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(written)} files in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
