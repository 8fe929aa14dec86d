"""Metrics of images through one interface: embedded, from your encoder, or from other libraries.

DreamSim and torchmetrics' FID, inception score, CLIPScore and LPIPS need the extra `metrics` and
download their weights on first use. All images are `(N, 3, H, W)` in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.features import FeatureEncoder, FeatureExtractor, encode, require_images
from . import measures

#: Inputs that a metric may need beside the images.
Need = Literal["prompts", "real", "target"]

#: Side of DreamSim's square inputs, in pixels.
DREAMSIM_SIZE = 224

_BATCH = 32


@dataclass(frozen=True)
class Batch:
    """The inputs of a metric.

    Attributes:
        images: `(N, 3, H, W)` in [0, 1].
        prompts: prompt of each image; only images of one prompt form pairs.
        real: real images, whose distribution is compared, `(M, 3, H', W')`.
        target: images that the outputs should not resemble, `(M, 3, H', W')` or `(3, H', W')`.

    Raises:
        ValueError: other shapes or counts, or values outside [0, 1].
    """

    images: Tensor
    prompts: Sequence[str] | None = None
    real: Tensor | None = None
    target: Tensor | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self.target.dim() == 3:
            object.__setattr__(self, "target", self.target[None])
        for name in ("images", "real", "target"):
            images = getattr(self, name)
            if images is None:
                continue
            require_images(images)
            if not len(images) or not bool(((images >= 0) & (images <= 1)).all()):
                raise ValueError(f"{name} must be one or more images with values in [0, 1]")
        if self.prompts is not None and len(self.prompts) != len(self.images):
            raise ValueError(f"{len(self.images)} images need as many prompts")

    def within_prompts(self) -> Iterator[Tensor]:
        """Yield the indices of each prompt's images, or of all images if there are no prompts."""
        prompts = self.prompts if self.prompts is not None else [""] * len(self.images)
        for prompt in dict.fromkeys(prompts):
            yield torch.tensor([item for item, other in enumerate(prompts) if other == prompt])


@dataclass(frozen=True)
class Metric:
    """A measure of a batch, with a name.

    Attributes:
        name: name in tables.
        better: the direction that is an improvement: more diverse, closer to the real images,
            truer to the prompt, or less like the target.
        measure: function from a batch to its value.
        needs: parts of the batch that the measure needs beside the images.
    """

    name: str
    better: Literal["lower", "higher"]
    measure: Callable[[Batch], float]
    needs: tuple[Need, ...] = ()

    def __call__(self, batch: Batch) -> float:
        """Return the measure of `batch`.

        Raises:
            ValueError: the batch lacks a part, or has too few images.
        """
        missing = [need for need in self.needs if getattr(batch, need) is None]
        if missing:
            raise ValueError(f"{self.name} needs {' and '.join(missing)} in the batch")
        return self.measure(batch)


# From an encoder


def encoder_metrics(encoder: FeatureEncoder, name: str = "") -> list[Metric]:
    """Return metrics on the features of any encoder, see `encode`.

    They are pairwise cosine and Vendi score (means over prompts), Frechet distance, precision and
    recall against real images, and the mean cosine to the closest target.

    Args:
        encoder: `(b, 3, H, W)` in [0, 1] -> `(b, C)`.
        name: prefix of the metrics' names.
    """
    prefix = f"{name} " if name else ""

    def of(images: Tensor | None) -> Tensor:
        assert images is not None  # checked by `needs`
        return encode(encoder, images)

    def mean_in_prompts(statistic: Callable[[Tensor], float]) -> Callable[[Batch], float]:
        def measure(batch: Batch) -> float:
            features = of(batch.images)
            values = [statistic(features[items]) for items in batch.within_prompts()]
            return sum(values) / len(values)

        return measure

    def precision(batch: Batch) -> float:
        return float(measures.inside_manifold(of(batch.real), of(batch.images)).double().mean())

    def recall(batch: Batch) -> float:
        return float(measures.inside_manifold(of(batch.images), of(batch.real)).double().mean())

    def frechet(batch: Batch) -> float:
        return measures.frechet_distance(of(batch.images), of(batch.real))

    def likeness(batch: Batch) -> float:
        return float(measures.feature_cosine(of(batch.images), of(batch.target)).mean())

    return [
        Metric(f"{prefix}pairwise cosine", "lower", mean_in_prompts(measures.mean_pairwise_cosine)),
        Metric(f"{prefix}Vendi score", "higher", mean_in_prompts(measures.vendi_score)),
        Metric(f"{prefix}Frechet distance", "lower", frechet, ("real",)),
        Metric(f"{prefix}precision", "higher", precision, ("real",)),
        Metric(f"{prefix}recall", "higher", recall, ("real",)),
        Metric(f"{prefix}cosine to target", "lower", likeness, ("target",)),
    ]


def embedded_metrics() -> list[Metric]:
    """Return `encoder_metrics` of EfficientNet-lite0, and the inception-style score of its logits.

    Raises:
        ImportError: a package is missing; names the extra to install.
    """
    extractor = FeatureExtractor()

    def inception_style(batch: Batch) -> float:
        return measures.inception_score(extractor.logits(encode(extractor, batch.images)))

    return [
        *encoder_metrics(extractor),
        Metric("inception-style score", "higher", inception_style),
    ]


# From other libraries


def _missing(what: str, error: ImportError) -> ImportError:
    return ImportError(
        f"{what} needs the extra 'metrics': pip install 'negtome-fast[metrics]' ({error})"
    )


def _as_bytes(images: Tensor, device: torch.device | str) -> Tensor:
    # torchmetrics truncates instead of rounding, which darkens stored images by up to 1/255.
    return (images * 255).round().to(device, torch.uint8)


def dreamsim_encoder(device: torch.device | str = "cpu", **options: Any) -> FeatureEncoder:
    """Return DreamSim's encoder, `(B, 3, H, W)` in [0, 1] -> `(B, C)` (arXiv 2306.09344).

    Args:
        device: device of the model; images are moved there.
        options: options of `dreamsim.dreamsim`, such as `dreamsim_type`. `cache_dir` defaults to a
            folder inside torch.hub's.

    Raises:
        ImportError: a package is missing; names the extra to install.
    """
    try:
        from dreamsim import dreamsim
    except ImportError as error:
        raise _missing("DreamSim", error) from error
    folder = Path(options.setdefault("cache_dir", str(Path(torch.hub.get_dir()) / "dreamsim")))
    folder.parent.mkdir(parents=True, exist_ok=True)  # dreamsim creates the last folder only
    # The second value prepares PIL images; `embed` resizes tensors in the same way.
    model, _ = dreamsim(pretrained=True, device=str(device), **options)
    size = (DREAMSIM_SIZE, DREAMSIM_SIZE)

    def embed(images: Tensor) -> Tensor:
        images = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        return model.embed(images.to(device))

    return embed


def dreamsim_metrics(device: torch.device | str = "cpu", **options: Any) -> list[Metric]:
    """Return the mean DreamSim similarity of pairs within a prompt, and to the closest target.

    The similarity is 1 less DreamSim's distance, the cosine of its embeddings. These are the
    paper's measures of diversity and of likeness to a protected image; lower is better for both.
    """
    of_encoder = {m.name: m for m in encoder_metrics(dreamsim_encoder(device, **options))}
    pairs, target = of_encoder["pairwise cosine"], of_encoder["cosine to target"]
    return [
        Metric("DreamSim between outputs", "lower", pairs.measure),
        Metric("DreamSim to target", "lower", target.measure, ("target",)),
    ]


def fid(device: torch.device | str = "cpu", feature: int | nn.Module = 2048) -> Metric:
    """Return torchmetrics' FID to the real images; both sides need the same number of images.

    Args:
        device: device of the network.
        feature: layer of Inception v3, or a module `uint8 (B, 3, H, W) -> (B, C)`.

    Raises:
        ImportError: a package is missing; names the extra to install.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=feature).to(device)
    except ImportError as error:
        raise _missing("FID", error) from error

    def measure(batch: Batch) -> float:
        assert batch.real is not None  # checked by `needs`
        if len(batch.real) != len(batch.images):
            raise ValueError(
                f"FID needs the same number of images on both sides, got {len(batch.images)} "
                f"and {len(batch.real)} real ones; its bias depends on the number"
            )
        metric.reset()
        for images, real in ((batch.real, True), (batch.images, False)):
            for part in images.split(_BATCH):
                metric.update(_as_bytes(part, device), real=real)
        return float(metric.compute())

    return Metric("FID", "lower", measure, ("real",))


def inception_score(
    device: torch.device | str = "cpu", feature: str | nn.Module = "logits_unbiased"
) -> Metric:
    """Return torchmetrics' inception score over all images at once, without random splits.

    Args:
        device: device of the network.
        feature: layer of Inception v3, or a module `uint8 (B, 3, H, W) -> logits (B, classes)`.

    Raises:
        ImportError: a package is missing; names the extra to install.
    """
    try:
        from torchmetrics.image.inception import InceptionScore

        metric = InceptionScore(feature=feature, splits=1).to(device)
    except ImportError as error:
        raise _missing("the inception score", error) from error

    def measure(batch: Batch) -> float:
        metric.reset()
        for part in batch.images.split(_BATCH):
            metric.update(_as_bytes(part, device))
        return float(metric.compute()[0])

    return Metric("inception score", "higher", measure)


def clip_score(
    device: torch.device | str = "cpu", model: Any = "openai/clip-vit-large-patch14"
) -> Metric:
    """Return torchmetrics' CLIPScore of the images with their prompts, 0 to 100.

    Args:
        device: device of the model.
        model: name of a CLIP model, or another `model_name_or_path` of `CLIPScore`.

    Raises:
        ImportError: a package is missing; names the extra to install.
    """
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore

        metric = CLIPScore(model_name_or_path=model).to(device)
    except ImportError as error:
        raise _missing("CLIPScore", error) from error
    metric.model = _Projections(metric.model)

    def measure(batch: Batch) -> float:
        assert batch.prompts is not None  # checked by `needs`
        metric.reset()
        for start in range(0, len(batch.images), _BATCH):
            part = slice(start, start + _BATCH)
            # CLIP's processor divides by 255.
            metric.update(_as_bytes(batch.images[part], device), list(batch.prompts[part]))
        return float(metric.compute())

    return Metric("CLIPScore", "higher", measure, ("prompts",))


class _Projections(nn.Module):
    """A CLIP model for torchmetrics 1.9, which expects tensors; transformers 5 wraps them."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, *args: Any) -> Tensor:
        return self._tensor(self.model.get_image_features(*args))

    def get_text_features(self, *args: Any) -> Tensor:
        return self._tensor(self.model.get_text_features(*args))

    @staticmethod
    def _tensor(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output.pooler_output


def lpips(
    device: torch.device | str = "cpu", net_type: Literal["alex", "vgg", "squeeze"] = "alex"
) -> Metric:
    """Return LPIPS between the outputs of a prompt, the first of `lpips_metrics`."""
    return lpips_metrics(device, net_type)[0]


def lpips_metrics(
    device: torch.device | str = "cpu", net_type: Literal["alex", "vgg", "squeeze"] = "alex"
) -> list[Metric]:
    """Return torchmetrics' LPIPS over all pairs within a prompt, and to the closest target.

    Both are distances: higher is more diverse, or less like the target. Targets are resized to the
    size of the images.

    Args:
        device: device of the network.
        net_type: backbone of the network.

    Raises:
        ImportError: a package is missing; names the extra to install.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type=net_type, normalize=True)
    except ImportError as error:
        raise _missing("LPIPS", error) from error
    metric = metric.to(device)

    def distance(first: Tensor, second: Tensor) -> float:
        """Return the mean over pairs of images, `(B, 3, H, W)` on both sides."""
        metric.reset()
        for parts in zip(first.split(_BATCH), second.split(_BATCH), strict=True):
            metric.update(*(part.float().to(device) for part in parts))
        return float(metric.compute())

    def in_prompt(images: Tensor) -> float:
        if len(images) < 2:
            raise ValueError("LPIPS between outputs needs 2 images of each prompt")
        pairs = torch.combinations(torch.arange(len(images)))
        return distance(images[pairs[:, 0]], images[pairs[:, 1]])

    def between(batch: Batch) -> float:
        values = [in_prompt(batch.images[items]) for items in batch.within_prompts()]
        return sum(values) / len(values)

    def to_target(batch: Batch) -> float:
        assert batch.target is not None  # checked by `needs`
        size = batch.images.shape[-2:]
        targets = F.interpolate(batch.target.float(), size, mode="bilinear", antialias=True)
        values = [
            min(distance(image, target) for target in targets.clamp(0, 1).split(1))
            for image in batch.images.split(1)
        ]
        return sum(values) / len(values)

    return [
        Metric("LPIPS between outputs", "higher", between),
        Metric("LPIPS to target", "higher", to_target, ("target",)),
    ]


#: Constructor of each kind of metric; all but `embedded` take a device and need the extra.
METRICS: dict[str, Callable[..., Metric | list[Metric]]] = {
    "embedded": embedded_metrics,
    "dreamsim": dreamsim_metrics,
    "fid": fid,
    "inception": inception_score,
    "clip": clip_score,
    "lpips": lpips_metrics,
}
