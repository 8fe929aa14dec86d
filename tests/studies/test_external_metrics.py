"""Measures of other libraries: torchmetrics with small networks, doubles where weights are needed.

A double has the signatures of what it stands for; where torchmetrics is installed they are compared
with its own.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from negtome_fast.studies import external, measures
from negtome_fast.studies.external import Batch, Metric

needs_torchmetrics = pytest.mark.skipif(
    importlib.util.find_spec("torchmetrics") is None, reason="torchmetrics is not installed"
)
without_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed"
)


def images(count: int = 12, seed: int = 0, size: int = 16) -> Tensor:
    """Images whose values are multiples of 1/255, as stored ones are."""
    values = torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)
    )
    return values / 255


class Patches(nn.Module):
    """A small encoder of bytes, that notes what it was given."""

    def __init__(self, channels: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(torch.randn(3 * 16, channels, generator=generator))
        self.num_features = channels
        self.seen: list[Tensor] = []

    def forward(self, batch: Tensor) -> Tensor:
        self.seen.append(batch)
        pooled = nn.functional.adaptive_avg_pool2d(batch.float() / 255, 4).flatten(1)
        return pooled @ self.weights


# The interface


def test_a_metric_says_what_the_batch_lacks() -> None:
    metric = Metric("likeness", "lower", lambda batch: 1.0, ("real", "target"))
    with pytest.raises(ValueError, match="likeness needs target in the batch"):
        metric(Batch(images(), real=images()))
    assert metric(Batch(images(), real=images(), target=images(1))) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": images()[0]}, r"\(B, 3, H, W\)"),
        ({"images": images() * 255}, r"images must .* in \[0, 1\]"),
        ({"images": images() * torch.nan}, r"images must .* in \[0, 1\]"),
        ({"images": images()[:0]}, "one or more images"),
        ({"images": images(), "target": images(1) - 1}, r"target must .* in \[0, 1\]"),
        ({"images": images(), "prompts": ["one"]}, "12 images need as many prompts"),
    ],
    ids=["shape", "bytes", "nan", "none", "target", "prompts"],
)
def test_a_batch_of_something_else_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(**arguments)


def test_an_encoder_of_yours_is_enough() -> None:
    encoder, batch = (
        Patches(),
        Batch(images(), prompts=["a", "b"] * 6, real=images(seed=1), target=images(1, seed=2)[0]),
    )
    rows, real, target = (
        encoder(part * 255).detach() for part in (batch.images, batch.real, batch.target)
    )
    found = {m.name: m(batch) for m in external.encoder_metrics(lambda x: encoder(x * 255), "own")}
    expected = {
        "own pairwise cosine": sum(measures.mean_pairwise_cosine(rows[i::2]) for i in (0, 1)) / 2,
        "own Vendi score": sum(measures.vendi_score(rows[i::2]) for i in (0, 1)) / 2,
        "own Frechet distance": measures.frechet_distance(rows, real),
        "own precision": measures.precision_recall(real, rows)[0],
        "own recall": measures.precision_recall(real, rows)[1],
        "own cosine to target": float(measures.feature_cosine(rows, target).mean()),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(not inner.requires_grad for inner in (rows, real))


def test_embedded_metrics_need_no_other_library() -> None:
    batch = Batch(images(7), real=images(7, seed=1), target=images(1))
    found = {metric.name: metric(batch) for metric in external.embedded_metrics()}
    assert found["cosine to target"] > found["pairwise cosine"] - 0.1
    assert 1 <= found["inception-style score"] <= 7 and 1 <= found["Vendi score"] <= 7


# torchmetrics with small networks


@needs_torchmetrics
def test_fid_gets_bytes_and_is_the_frechet_distance_of_its_features() -> None:
    encoder = Patches()
    batch = Batch(images(40) ** 2, real=images(40, seed=1))
    assert batch.real is not None
    metric = external.fid(feature=encoder)
    rows, real = (encoder((part * 255).round()).detach() for part in (batch.images, batch.real))
    encoder.seen.clear()
    found = metric(batch)
    assert found == pytest.approx(measures.frechet_distance(rows, real), rel=1e-3)
    assert metric(batch) == found, "a second call must not add to the first"
    seen = torch.cat(encoder.seen[:2])
    assert seen.dtype == torch.uint8 and torch.equal(seen, (batch.real * 255).round().byte())
    with pytest.raises(ValueError, match="got 40 and 12 real ones"):
        metric(Batch(batch.images, real=images()))


@needs_torchmetrics
@pytest.mark.filterwarnings("ignore:.*will save all extracted features")
@pytest.mark.filterwarnings("ignore:std")
def test_inception_score_is_ours_of_its_logits() -> None:
    encoder = Patches(6)
    metric = external.inception_score(feature=encoder)
    logits = encoder((images(40) * 255).byte()).detach()
    assert metric(Batch(images(40))) == pytest.approx(measures.inception_score(logits), rel=1e-4)
    assert metric(Batch(images(40))) == pytest.approx(measures.inception_score(logits), rel=1e-4)


@needs_torchmetrics
def test_clip_score_of_a_small_clip() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "projection_dim": 8}
    text = {**size, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 49}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text,
        vision_config={**size, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    seen: list[Tensor] = []

    def processor(**inputs: Any) -> dict[str, Tensor]:
        assert inputs["return_tensors"] == "pt" and inputs["padding"] is True
        if "text" in inputs:
            ids = torch.tensor([[0, *(ord(c) % 48 + 1 for c in t), 49] for t in inputs["text"]])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        seen.extend(inputs["images"])
        return {"pixel_values": torch.stack(inputs["images"]).float() / 255}

    metric = external.clip_score(model=lambda: (model, processor))
    prompts = [f"person {i:02d}" for i in range(40)]
    found = metric(Batch(images(40), prompts=prompts))
    assert {image.dtype for image in seen} == {torch.uint8}

    inputs = processor(text=prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(pixel_values=images(40), **inputs)
    cosines = (output.image_embeds * output.text_embeds).sum(-1)
    assert abs(float(cosines.mean())) > 0.01
    assert found == pytest.approx(max(0.0, 100 * float(cosines.mean())), rel=1e-4, abs=1e-4)


# Doubles


class LPIPSDouble(nn.Module):
    """LPIPS whose distance is the mean absolute difference."""

    def __init__(
        self,
        net_type: Any = "alex",
        reduction: Any = "mean",
        normalize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert normalize, "without it, images must be in [-1, 1]"
        self.all_scores: list[Tensor] = []

    def update(self, img1: Tensor, img2: Tensor) -> None:
        self.all_scores.append((img1 - img2).abs().mean(dim=(1, 2, 3)))

    def compute(self) -> Tensor:
        return torch.cat(self.all_scores).mean()

    def reset(self) -> None:
        self.all_scores.clear()


@needs_torchmetrics
def test_lpips_takes_every_pair_of_a_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.image import lpip

    real = lpip.LearnedPerceptualImagePatchSimilarity
    for method in ("__init__", "update", "compute", "reset"):
        ours, theirs = (
            list(inspect.signature(getattr(c, method)).parameters) for c in (LPIPSDouble, real)
        )
        assert ours == theirs, method
    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", LPIPSDouble)

    levels = torch.tensor([0.0, 0.9, 0.1, 0.5, 0.3, 0.6])
    batch = Batch(levels[:, None, None, None].expand(-1, 3, 8, 8), prompts=["a", "b"] * 3)
    metric = external.lpips()
    # Pairs of 0, 0.1, 0.3 and of 0.9, 0.5, 0.6.
    expected = ((0.1 + 0.3 + 0.2) / 3 + (0.4 + 0.3 + 0.1) / 3) / 2
    assert metric(batch) == pytest.approx(expected)
    assert metric(batch) == pytest.approx(expected)
    with pytest.raises(ValueError, match="2 images of each prompt"):
        metric(Batch(batch.images, prompts=["a"] * 5 + ["b"]))

    between, to_target = external.lpips_metrics()
    assert between(batch) == pytest.approx(expected)
    targets = torch.tensor([0.2, 0.8])[:, None, None, None].expand(-1, 3, 4, 6)
    near = (0.2 + 0.1 + 0.1 + 0.3 + 0.1 + 0.2) / 6
    assert to_target(Batch(batch.images, target=targets)) == pytest.approx(near)
    assert between.better == to_target.better == "higher" and to_target.needs == ("target",)


class DreamSimDouble:
    """DreamSim 0.2.1's model, whose embedding is the mean colour."""

    def embed(self, img: Tensor) -> Tensor:
        assert img.shape[1:] == (3, 224, 224) and img.min() >= 0 and img.max() <= 1
        return img.mean(dim=(2, 3))


def test_dreamsim_is_given_squares_and_its_distance_is_turned_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []

    def dreamsim(
        pretrained: bool = True,
        device: str = "cuda",
        cache_dir: str = "./models",
        normalize_embeds: bool = True,
        dreamsim_type: str = "ensemble",
        use_patch_model: bool = False,
    ) -> tuple[DreamSimDouble, None]:
        calls.append({"device": device, "cache_dir": cache_dir, "dreamsim_type": dreamsim_type})
        Path(cache_dir).mkdir(exist_ok=True)  # as it does
        return DreamSimDouble(), None

    module = ModuleType("dreamsim")
    module.dreamsim = dreamsim  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dreamsim", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    between, to_target = external.dreamsim_metrics(dreamsim_type="dino_vitb16")
    assert calls == [
        {
            "device": "cpu",
            "cache_dir": str(tmp_path / "hub" / "dreamsim"),
            "dreamsim_type": "dino_vitb16",
        }
    ]
    colours = torch.eye(3)[[0, 0, 1, 1]]
    batch = Batch(
        colours[:, :, None, None].expand(-1, -1, 32, 48),
        target=torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 8, 8),
    )
    assert between(batch) == pytest.approx(2 / 6, abs=1e-6)
    assert to_target(batch) == pytest.approx(0.5, abs=1e-6)
    assert between.better == to_target.better == "lower"


# What is missing


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dreamsim", "torchmetrics", "torchmetrics.image", "torchmetrics.multimodal"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("image.fid", "image.inception", "image.lpip", "multimodal.clip_score"):
        monkeypatch.setitem(sys.modules, f"torchmetrics.{name}", None)
    for name in ("dreamsim", "fid", "inception", "clip", "lpips"):
        with pytest.raises(ImportError, match=r"needs the extra 'metrics': pip install"):
            external.METRICS[name]()


@needs_torchmetrics
@without_torchvision
@pytest.mark.filterwarnings("ignore:.*will save all extracted features")
@pytest.mark.parametrize("name", ["fid", "inception", "lpips"])
def test_torchmetrics_without_its_own_extras_names_ours(name: str) -> None:
    with pytest.raises(ImportError, match=r"needs the extra 'metrics'.*(fidelity|torchvision)"):
        external.METRICS[name]()
