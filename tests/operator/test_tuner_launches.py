"""Candidates are compiled once: in parallel, and found in Triton's cache by their launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from negtome_fast.kernels.tuning import Config
from negtome_fast.tuner import compile_report

PROGRAM = Path(__file__).parents[1] / "helpers" / "tuner_launches.py"
TILES = Config(64, 64, 64, 4, 3, DESCRIPTORS=1, FLATTEN=1)


def test_what_is_compiled_in_parallel_is_found_at_the_launch(tmp_path: Path) -> None:
    rows = Config(64, 64, 64, 4, 2)
    given = [("tiles", TILES), ("tiles", TILES._replace(OVERLAP=1)), ("fused", rows)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path)],
        input=json.dumps(given),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Every launch that compiles anything finds it.
    hits = [hit for hits in found["hits"] for hit in hits]
    assert len(hits) == len(set(found["notes"])) and all(hits), found["hits"]
    # The call that checks the results launches nothing else than the one that is timed.
    assert found["same"]
    # The two that differ in nothing that is compiled are compiled once, and both have the row.
    assert [Config(*row["config"]) for row in found["rows"]] == [config for _, config in given]
    assert [row["kernel"] for row in found["rows"]] == ["tiles", "tiles", "fused"]
    assert found["compiled"] == len(set(found["notes"])) < len(found["notes"])
    assert found["rows"][0]["registers"] == found["rows"][1]["registers"] > 0
    assert not any(compile_report.problems(row) for row in found["rows"])
