"""The core needs torch and numpy alone: a bare environment, a loop by hand, and the loop below
all pipelines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

import negtome_fast as nf
from helpers.pipelines_fixtures import flux_pipeline, generate
from negtome_fast.guidance import Guidance

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plain-torch.md").read_text(encoding="utf-8")

IN_THE_BARE = """
import importlib.util, json, runpy, sys
import torch
import negtome_fast as nf

absent = ("diffusers", "transformers", "triton", "matplotlib", "PIL", "tqdm", "safetensors",
          "accelerate", "huggingface_hub", "scipy", "pytest", "setuptools")
there = [name for name in absent if importlib.util.find_spec(name)]
x = torch.randn(3, 5, 8)
layer = nf.NegToMe(alpha=0.9, threshold=0.1)
moved = bool((layer(x) != x).any())
found = runpy.run_path(sys.argv[1])["main"]()
refused = {}
from negtome_fast import models
for name, call in (
    ("embedded", models.load_pipeline),
    ("pipeline", lambda: nf.apply_negtome(object())),
):
    try:
        call()
    except Exception as error:
        refused[name] = [type(error).__name__, str(error)]
print(json.dumps({
    "there": there,
    "moved": moved,
    "changed": bool((found["plain"] != found["diverse"]).any()),
    "refused": refused,
}))
"""


def required(names: list[str]) -> set[str]:
    """These distributions and all that they need here, but Triton."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name.lower() in found or name.lower() in ("triton", "setuptools"):
            continue
        found.add(name.lower())
        for line in metadata.requires(name) or []:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                names.append(need.name)
    return found


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder of links to torch, numpy, what they need, and this package."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in required(["torch", "numpy"]):
        files = metadata.files(name) or []
        tops = {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            (folder / top).symlink_to(metadata.distribution(name).locate_file(top))
    package = folder / "negtome_fast"
    package.mkdir()
    for path in (ROOT / "negtome_fast").iterdir():
        (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")
    return folder


def test_bare_environment_imports_the_core_and_runs_the_loop(bare: Path) -> None:
    start = f"import sys; sys.path.append({str(bare)!r})\n"
    example = str(ROOT / "examples" / "plain_torch_dit.py")
    # -I and -S: the standard library alone, without what is installed beside this interpreter.
    command = [sys.executable, "-I", "-S", "-c", start + IN_THE_BARE, example]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["there"] == []
    assert result["moved"] and result["changed"]
    kind, words = result["refused"]["embedded"]
    assert kind == "ImportError" and "pip install 'negtome-fast[demo]'" in words
    assert result["refused"]["pipeline"][0] == "TypeError"


def test_code_of_the_page_runs() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    summaries = []
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
        summaries.append(names["guidance"].summary())
    assert [summary.guided for summary in summaries] == [3, 3]
    assert all(summary.total.pushed > 0 for summary in summaries)


@pytest.mark.filterwarnings("ignore:no block handed its tokens over")  # the stand-in keeps no count
def test_pipelines_are_guided_by_the_same_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Guidance.apply` changes a pipeline's tokens, in steps of `begin_step`."""
    pipe = flux_pipeline()
    plain = generate(pipe, 2)
    with nf.negtome_guidance(pipe, t_end=0, threshold=0.0) as handle:
        guided = generate(pipe, 2)
        assert isinstance(handle.guidance, Guidance)
    assert not torch.equal(plain, guided)

    calls = []
    begin_step = Guidance.begin_step

    def begin(self: Guidance, *args: object, **kwargs: object) -> bool:
        calls.append("begin_step")
        return begin_step(self, *args, **kwargs)  # type: ignore[arg-type]

    def apply(self: Guidance, image_tokens: torch.Tensor, **_: object) -> torch.Tensor:
        calls.append("apply")
        return image_tokens

    monkeypatch.setattr(Guidance, "begin_step", begin)
    monkeypatch.setattr(Guidance, "apply", apply)
    with nf.negtome_guidance(pipe, t_end=0, threshold=0.0) as handle:
        assert torch.equal(generate(pipe, 2), plain)
        blocks, forwards = len(handle.blocks), calls.count("begin_step")
    assert forwards > 1
    assert calls == ["begin_step", *["apply"] * blocks] * forwards
