"""Stored arrays that are damaged, folders that cannot be written to, and foreign result files."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers", reason="the extra 'eval' is not installed")
pytest.importorskip("dicebear", reason="the extra 'eval' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'eval' is not installed")

from bench.results import FOLDER
from helpers.eval_own import COMMAND
from negtome_fast import generation
from negtome_fast.cli import main
from negtome_fast.studies import store
from negtome_fast.studies.conditions import Condition, groups_of
from negtome_fast.studies.sampler import Sampler
from negtome_fast.studies.studies import STUDIES, own
from negtome_fast.studies.studies.own.drawing import Drawing, DrawPlan
from negtome_fast.studies.studies.study import Sizes, StudyRun

RESULTS = FOLDER / "eval"
ARRAYS = {"images": np.arange(4), "pushed": np.array(0.5)}
ROWS = {"images": 4, "pushed": None}


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


DAMAGED = {
    "empty": b"",
    "text": b"not an archive",
    "half": npz(**ARRAYS)[:150],
    "a single array": npy(np.arange(4)),
    "pickles": npz(images=np.array([{}]), pushed=np.array(0.5)),
    "other keys": npz(pictures=np.arange(4)),
    "fewer images": npz(images=np.arange(3), pushed=np.array(0.5)),
    "a number for images": npz(images=np.array(4), pushed=np.array(0.5)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_store_is_named_and_made_again(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.npz"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"b\.npz (is damaged|has ).* made again"):
        found = store.fetch(path, lambda: ARRAYS, rows=ROWS)
    assert found is ARRAYS
    kept = store.fetch(path, lambda: pytest.fail("made a third time"), rows=ROWS)
    assert kept.keys() == ARRAYS.keys() and (kept["images"] == ARRAYS["images"]).all()


def drawn_twice(sample: Callable[[], Any], folder: Path) -> None:
    """Every stored file is damaged by leaving out an array between two calls of `sample`."""
    sample()
    paths = list(folder.rglob("*.npz"))
    assert paths
    for path in paths:
        arrays = store.load(path)
        del arrays["images"]
        store.save(path, arrays)
    with pytest.warns(UserWarning, match="has no 'images'"):
        sample()
    assert all("images" in store.load(path) for path in paths)


def test_studies_know_the_arrays_of_their_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(self: Any, condition: Any, batch: Any) -> store.Arrays:
        count = sum(len(group.seeds) for group in batch)
        images = np.zeros((count, 3, 64, 64), np.uint8)
        rest = {name: np.zeros((count, 2)) for name in ("features", "indices", "seconds")}
        return {"images": images, "guidance": np.zeros(3), **rest}

    monkeypatch.setattr(Sampler, "_measured", measured)
    groups = groups_of(("a pixel art person",), 4, size=2)
    drawn_twice(lambda: Sampler(tmp_path / "a").sample(Condition("x"), groups), tmp_path / "a")

    monkeypatch.setattr(Drawing, "_drawn", lambda *_: {"images": np.zeros((2, 8, 8, 3)), **ONE})
    request = own.request({"model": "a/b", "prompts": ["x"], "images": 4, "group": 2})
    drawing = Drawing(request, SimpleNamespace(), tmp_path / "b")
    plan = DrawPlan(request.conditions()[0], None, {}, None)
    drawn_twice(lambda: drawing.group(plan, request.groups()[0]), tmp_path / "b")


ONE = {"seconds": np.array(1.0), "pushed": np.array(0.0)}


def test_a_full_disk_is_named_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.npz"
    store.save(path, ARRAYS)
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> None:
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.npz'"):
        store.save(path, {"images": np.arange(9)})
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.png'"):
        store.save_png(tmp_path / "x.png", Image.new("RGB", (2, 2)))
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("option", ["--out", "--store"])
@pytest.mark.parametrize("kind", ["file", "below a file", "read-only"])
@pytest.mark.parametrize("command", [COMMAND, ["eval", "diversity", "--quick"]], ids=["own", "-"])
def test_folders_are_tried_before_a_model_is_loaded(
    command: list[str],
    kind: str,
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generation, "load_pipeline", loaded)
    monkeypatch.setattr(Sampler, "draw", loaded)
    monkeypatch.setattr(own.run, "Meter", lambda wanted: None)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    where = {"file": "file", "below a file": "file/x/y", "read-only": "/proc/none"}[kind]
    given = {"--out": str(tmp_path / "out"), "--store": str(tmp_path / "store")}
    given[option] = str(tmp_path / where)
    assert main([*command, *(word for pair in given.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert f"error: {option} {given[option]}" in error and error.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", STUDIES)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_drawn(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Sampler, "draw", lambda *_, **__: pytest.fail("something was drawn"))
    where = ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    for count in ("0", "-8", "4097", str(10**30)):
        assert main(["eval", name, "--samples", count, *where]) == 2, count
        error = capsys.readouterr().err
        assert count in error and error.count("\n") == 1
    if name != "nudging-cost":  # which takes any number
        run = StudyRun(Sampler(None), Sizes(13), tmp_path, progress=False)
        with pytest.raises(ValueError, match=r"images .*must be"):
            STUDIES[name].run(run)
    assert not list(tmp_path.iterdir())


FOREIGN: dict[str, Any] = {
    "diversity": "",
    "conventions": '{"study": "conventions", "schema": 1, "condit',
    "hyperparameters": [1, 2],
    "rivals": {"study": "rivals", "schema": 1},
    "protected": "[" * 100_000,
    "applications": '{"study": 1' + "0" * 5000 + "}",
    "nudging": {"study": "diversity", "schema": 1},
    "nudging-cost": b"\xff\xfe\x00",
    "own": None,  # set in the test
}


def test_the_report_leaves_out_what_is_no_result_with_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(RESULTS / "overheads.json", tmp_path)
    measures = {"m": [10**400, "low", None]}
    one = {"measures": measures, "seconds_an_image": "x", "config": None, "pushed": 0}
    scales = [{"guidance_scale": 10**400, "conditions": {"unguided": one}}]
    settings = {"model": 5, "prompts": 7, "references": {}, "preset": [], "negative_prompt": 1}
    sizes = {"images": "many", "group": 0}
    result = {"study": "own", "schema": 2, "scales": scales, "better": {"m": 1}, "sizes": sizes}
    for name, content in {**FOREIGN, "own": {**result, "settings": settings}}.items():
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / f"{name}.json").write_bytes(data)
    (tmp_path / "overheads-none.png").mkdir()
    assert main(["eval", "report", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(FOREIGN)
    for name, line in zip(sorted(FOREIGN), sorted(lines), strict=True):
        assert line.startswith("negtome-fast: warning: skipped: ") and len(line) < 500
        assert any(f"/{name}.json" in line for line in lines), name
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<h2") == 1 and 'id="overheads"' in page
    (tmp_path / "overheads.json").unlink()
    assert main(["eval", "report", "--out", str(tmp_path)]) == 2
    assert "there are no results of studies" in capsys.readouterr().err
