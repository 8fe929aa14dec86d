"""Importing the package is cheap: torch only, and nothing that is not needed at once."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("diffusers", "transformers", "triton", "torch._dynamo", "matplotlib", "PIL", "tqdm")
PROGRAM = f"""
import json, sys, time, torch
before, started = set(sys.modules), time.process_time()
import negtome_fast
seconds = time.process_time() - started
new = [m for m in {HEAVY!r} if m in sys.modules and m not in before]
print(json.dumps({{"seconds": seconds, "new": new}}))
"""


def test_import_needs_torch_only_and_is_quick() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["new"] == []
    assert result["seconds"] < 0.2
