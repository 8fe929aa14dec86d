"""Selection of points, reference banks and filters of embedding nudging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from negtome_fast.nudging import (
    CallableFilter,
    EncoderSimilarity,
    ImageEncoder,
    LatentDistance,
    PerceptualHash,
    PixelDistance,
    ReferenceBank,
    judge,
    select_nearest,
    selection,
)

MEANS = ImageEncoder("channel means", lambda images: images.mean(dim=(2, 3)))
RED, GREEN, BLUE = (np.full((20, 30, 3), c, np.uint8) for c in np.eye(3, dtype=np.uint8) * 255)


def bank(**options: Any) -> ReferenceBank:
    options = {"size": 16, **options}
    return ReferenceBank.build([("red", RED), ("green", GREEN)], **options)


def solid(*colours: np.ndarray) -> Tensor:
    return (
        torch.stack([torch.from_numpy(c[:16, :16].copy()) for c in colours])
        .permute(0, 3, 1, 2)
        .float()
        / 255
    )


# --------------------------------------------------------------------------------------------
# Selection
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("search", ["torch", "faiss"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_nearest_points_are_those_of_a_full_table(
    metric: Any, search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if search == "faiss":
        pytest.importorskip("faiss", reason='the extra "faiss" is not installed')
    monkeypatch.setattr(selection, "CHUNK", 40 * 24)  # forty points at a time
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 4, 6, generator=random)
    points = torch.randn(501, 4, 6, generator=random)
    score, index = select_nearest(latents, points, 7, metric=metric, search=search)
    a, b = latents.flatten(1).double(), points.flatten(1).double()
    table = torch.cdist(a, b) if metric == "l2" else F.normalize(a) @ F.normalize(b).T
    expected = table.sort(dim=1, descending=metric == "cosine")
    assert torch.equal(index, expected.indices[:, :7])
    torch.testing.assert_close(score.double(), expected.values[:, :7], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_equal_points_come_in_their_order_and_a_copy_is_at_distance_zero(metric: Any) -> None:
    points = torch.ones(6, 8)
    points[0], points[2] = -1, -1
    score, index = select_nearest(1000 * torch.ones(1, 8), 1000 * points, 4, metric=metric)
    assert index.tolist() == [[1, 3, 4, 5]]
    torch.testing.assert_close(score, torch.full((1, 4), 0.0 if metric == "l2" else 1.0))


@pytest.mark.parametrize("search", ["torch", "faiss"])
def test_an_item_that_is_not_finite_has_no_finite_score(search: Any) -> None:
    if search == "faiss":
        pytest.importorskip("faiss", reason='the extra "faiss" is not installed')
    latents = torch.tensor([[torch.nan, 0.0], [1.0, 0.0]])
    score, index = select_nearest(latents, torch.eye(2), search=search)
    assert bool(score[0].isnan().all()) and 0 <= int(index[0]) < 2
    assert index[1].item() == 0 and score[1].item() == 0


def test_the_nearest_of_hundreds_of_thousands_are_found_in_parts() -> None:
    random = torch.Generator().manual_seed(0)
    points = torch.randn(300_000, 24, generator=random).bfloat16()
    rows = torch.tensor([7, 299_999, 123_456])
    score, index = select_nearest(points[rows], points)
    assert index.flatten().tolist() == rows.tolist() and bool((score == 0).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count must be 1 to 3"),
        ({"count": 4}, "count must be 1 to 3"),
        ({"metric": "dot"}, "metric must be"),
        ({"search": "hnsw"}, "search must be"),
        ({"latents": torch.zeros(2, 5)}, r"\(3, 4\).*\(2, 5\)"),
    ],
    ids=str,
)
def test_bad_selections_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_nearest(**{"latents": torch.zeros(2, 4), "points": torch.zeros(3, 4), **changes})


# --------------------------------------------------------------------------------------------
# Banks
# --------------------------------------------------------------------------------------------
def test_a_bank_from_a_folder_names_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.fromarray(RED).save(tmp_path / "b.png")
    Image.fromarray(GREEN).save(tmp_path / "deep" / "a.jpg")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("ignored")
    with pytest.warns(UserWarning, match=r"broken\.png"):
        built = ReferenceBank.build(tmp_path, size=8, encoder=MEANS)
    assert built.names == ("b.png", "deep/a.jpg")
    assert [name for name, _ in built.skipped] == ["broken.png"]
    assert built.images.shape == (2, 3, 8, 8)
    assert built.features is not None
    torch.testing.assert_close(built.features[0], torch.tensor([1.0, 0.0, 0.0]))


def test_whatever_a_decoder_raises_leaves_out_its_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.concatenate([noise] * 8)).save(tmp_path / "huge.png")
    Image.fromarray(RED).save(tmp_path / "red.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000)
    with pytest.warns(UserWarning, match=r"cut\.png.*huge\.png"):
        built = ReferenceBank.build(tmp_path, size=8)
    assert built.names == ("red.png",)
    assert {name for name, _ in built.skipped} == {"cut.png", "huge.png"}


def test_a_bank_without_what_the_filters_flag() -> None:
    three = ReferenceBank.build([("red", RED), ("blue", BLUE), ("green", GREEN)], size=16)
    three = three.with_features(MEANS)
    known = PixelDistance(bank(), 0.1)
    kept = three.passing([known])
    assert kept.names == ("blue",) and kept.encoder == MEANS.name
    assert kept.features is not None and kept.features.tolist() == [[0.0, 0.0, 1.0]]
    with pytest.raises(ValueError, match="flag all 1 images"):
        kept.passing([CallableFilter(lambda images: [1.0] * len(images), 0.5)])


def test_thumbnails_are_the_images_made_smaller() -> None:
    small = bank().thumbnails((8, 4))
    assert small.shape == (2, 3, 8, 4)
    torch.testing.assert_close(small[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))


def test_images_are_cropped_to_the_centre() -> None:
    wide = np.concatenate([GREEN[:, :10], RED[:, :20], GREEN[:, :10]], axis=1)
    built = ReferenceBank.build([wide], size=20)
    assert torch.equal(built.images[0, 0], torch.full((20, 20), 255, dtype=torch.uint8))


@pytest.mark.parametrize("encoder", [None, MEANS])
def test_a_saved_bank_loads_as_it_was(tmp_path: Path, encoder: ImageEncoder | None) -> None:
    original = bank(encoder=encoder)
    original.save(tmp_path / "bank")
    original.save(tmp_path / "bank")
    loaded = ReferenceBank.load(tmp_path / "bank", encoder)
    assert loaded.names == original.names and loaded.encoder == original.encoder
    assert torch.equal(loaded.images, original.images)
    assert sorted(p.name for p in (tmp_path / "bank").iterdir()) == [
        "bank.json",
        "bank.safetensors",
    ]


def test_a_bank_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    bank(encoder=MEANS).save(tmp_path)
    with pytest.raises(ValueError, match=r"'channel means', not of 'other'"):
        ReferenceBank.load(tmp_path, ImageEncoder("other", MEANS.encode))
    description = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps({**description, "version": 99}))
    with pytest.raises(ValueError, match="version 99, this package reads version 1"):
        ReferenceBank.load(tmp_path)
    (tmp_path / "bank.json").write_text(json.dumps({**description, "names": ["one"]}))
    with pytest.raises(ValueError, match=r"2 images need as many different names"):
        ReferenceBank.load(tmp_path)
    (tmp_path / "bank.json").write_text("{")
    with pytest.raises(ValueError, match=r"bank\.json is corrupt"):
        ReferenceBank.load(tmp_path)
    (tmp_path / "bank.json").write_text(json.dumps(description))
    tensors = load_file(tmp_path / "bank.safetensors")
    save_file({"features": tensors["features"]}, tmp_path / "bank.safetensors")
    with pytest.raises(ValueError, match=r"bank\.safetensors is corrupt"):
        ReferenceBank.load(tmp_path)
    (tmp_path / "bank.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match=r"bank\.safetensors is corrupt"):
        ReferenceBank.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a reference bank"):
        ReferenceBank.load(tmp_path / "nowhere")


def test_a_bank_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image in"):
        ReferenceBank.build(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        ReferenceBank.build(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="0: not an image: int"), pytest.raises(ValueError):
        ReferenceBank.build([3])
    with pytest.raises(ValueError, match="different names"):
        ReferenceBank.build([("a", RED), ("a", GREEN)], size=8)


# --------------------------------------------------------------------------------------------
# Filters
# --------------------------------------------------------------------------------------------
def filters() -> dict[str, Any]:
    return {
        "pixels": PixelDistance(bank(), 0.1, size=8),
        "latents": LatentDistance(bank(), 0.1, lambda x: F.avg_pool2d(x, 4)),
        "features": EncoderSimilarity(bank(), 0.95, MEANS),
    }


@pytest.mark.parametrize("name", ["pixels", "latents", "features"])
def test_filters_find_what_they_know(name: str) -> None:
    verdicts = filters()[name].judge(solid(GREEN, BLUE, RED))
    assert [v.triggered for v in verdicts] == [True, False, True]
    assert [verdicts[i].nearest for i in (0, 2)] == ["green", "red"]
    assert [verdicts[i].index for i in (0, 2)] == [1, 0]
    assert all(v.filter == name for v in verdicts)


def test_scores_are_in_the_stated_units() -> None:
    half = solid(RED) * 0.5
    pixels, latents, features = (filters()[n].judge(half)[0] for n in filters())
    expected = (0.25 / 3) ** 0.5  # a third of the numbers differ by a half
    assert pixels.score == pytest.approx(expected, abs=1e-6)
    assert latents.score == pytest.approx(expected, abs=1e-6)
    assert features.score == pytest.approx(1.0)


def test_a_perceptual_hash_sees_through_a_change_of_brightness() -> None:
    pytest.importorskip("imagehash", reason='the extra "nudge" is not installed')
    random = np.random.default_rng(0)
    pictures = [
        np.kron(random.integers(0, 200, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        for _ in range(3)
    ]
    hashes = PerceptualHash(ReferenceBank.build(pictures[:2], size=64), 8)
    images = torch.stack([torch.from_numpy(p) for p in (pictures[1] + 40, pictures[2])])
    seen = hashes.judge(images.permute(0, 3, 1, 2).float() / 255)
    assert [v.triggered for v in seen] == [True, False]
    assert seen[0].nearest == "1" and seen[0].score <= 4 and float(seen[0].score).is_integer()


@pytest.mark.parametrize("above", [True, False])
def test_a_callable_triggers_at_its_threshold_and_on_nan(above: bool) -> None:
    scores = torch.tensor([0.4, 0.5, 0.6, torch.nan])
    seen = CallableFilter(lambda images: scores, 0.5, above=above).judge(torch.zeros(4, 3, 8, 8))
    assert [v.triggered for v in seen] == [not above, True, above, True]


def test_filters_run_in_order_and_stop_at_the_first_that_triggers() -> None:
    shown: dict[str, int] = {}

    def counting(name: str, scores: list[float]) -> CallableFilter:
        def score(images: Tensor) -> list[float]:
            shown[name] = len(images)
            return scores[: len(images)]

        return CallableFilter(score, 0.5, name)

    chain = [counting("first", [0.0, 1.0, 0.0]), counting("second", [1.0, 0.0])]
    rows = judge(chain, torch.zeros(3, 3, 8, 8))
    assert shown == {"first": 3, "second": 2}
    assert [[v.filter for v in row] for row in rows] == [
        ["first", "second"],
        ["first"],
        ["first", "second"],
    ]
    assert [row[-1].triggered for row in rows] == [True, True, False]


def test_bad_filters_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        PixelDistance(bank(), 2)
    with pytest.raises(ValueError, match="between -1 and 1"):
        EncoderSimilarity(bank(), float("nan"), MEANS)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) in \[0, 1\], got \(3, 8, 8\)"):
        PixelDistance(bank(), 0.5).judge(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="for each of 2 images, it returned 1"):
        CallableFilter(lambda images: [1.0], 0.5).judge(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must return \(B, C\)"):
        EncoderSimilarity(bank(), 0.5, ImageEncoder("wrong", lambda images: images))
