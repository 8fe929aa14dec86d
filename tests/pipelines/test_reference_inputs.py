"""Inputs of a reference: pictures, masks and latents; and the arguments of its forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from PIL import Image

from helpers.pipelines_fixtures import ALWAYS, denoiser, generate, reference_latents
from negtome_fast import Reference
from negtome_fast.pipelines import apply_negtome, negtome_guidance
from negtome_fast.pipelines.reference_forward import refuse_stateful, select_items, with_latents


def test_items_are_selected_wherever_the_batch_is() -> None:
    items = torch.tensor([0, 2])
    batch, other = torch.arange(8.0).view(4, 2), torch.zeros(3, 4)
    chosen = batch[[0, 2]]

    def select(value: Any, name: str = "", lists: bool = False) -> Any:
        return select_items(value, 4, items, name, lists)

    assert torch.equal(select(batch), chosen)
    for kept in (other, torch.tensor(4.0), 4, None, "text", (1, 2, 3, 4)):
        assert select(kept) is kept or select(kept) == kept
    nested = select({"controls": (batch, other), "scale": 0.5, "more": {"ids": [batch]}})
    assert torch.equal(nested["controls"][0], chosen) and nested["controls"][1] is other
    assert torch.equal(nested["more"]["ids"][0], chosen) and nested["scale"] == 0.5
    assert select([[(1, 2, 2)], [(1, 3, 3)], [(1, 4, 4)], [(1, 5, 5)]]) == [
        [(1, 2, 2)],
        [(1, 4, 4)],
    ]
    # Four residuals of four items; but a list of four items where the latents are one.
    residuals = [batch, batch + 1, batch + 2, batch + 3]
    assert [entry.shape for entry in select(residuals)] == [(2, 2)] * 4
    assert [entry is residuals[2 * i] for i, entry in enumerate(select(residuals, lists=True))] == [
        True,
        True,
    ]
    # Ids and rotary embeddings have as many tokens as there are items, by chance.
    ids = torch.zeros(4, 3)
    assert select(ids, "txt_ids") is ids
    assert select((batch, batch), "image_rotary_emb")[0] is batch
    assert select(torch.zeros(4, 5, 3), "img_ids").shape == (2, 5, 3)


def test_what_an_edit_pipeline_appended_stays() -> None:
    run = torch.zeros(2, 9, 4, 4)
    given = with_latents(run, [torch.ones(1, 4, 4, 4), torch.full((1, 4, 4, 4), 2.0)])
    assert given[0, :4].unique().tolist() == [1] and given[1, :4].unique().tolist() == [2]
    assert not given[:, 4:].any() and not run.any()
    tokens = with_latents(torch.zeros(1, 10, 8), [torch.ones(1, 6, 8)])
    assert tokens[0, :, 0].tolist() == [1] * 6 + [0] * 4
    (listed,) = with_latents([torch.zeros(3, 1, 2, 2)], [torch.ones(1, 3, 1, 2, 2)])
    assert listed.all()


def test_a_cache_of_keys_is_refused(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward of a model whose attention remembers, as FLUX.2 Klein's can."""
    with pytest.raises(ValueError, match=r"kv_cache.*without it"):
        refuse_stateful({"hidden_states": 1, "options": {"kv_cache": object()}}, "Model")
    refuse_stateful({"kv_cache": None}, "Model")


PICTURE = Image.fromarray(np.full((10, 14, 3), 200, dtype=np.uint8))


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("no such.png", TypeError, r'Reference\("image.png"\)'),
        ([], ValueError, "empty"),
        (Reference("no such.png"), FileNotFoundError, r"no reference image at no such\.png"),
        (Reference(Path(__file__)), ValueError, r"test_reference_inputs\.py is not an image"),
        (Reference(Path(__file__).parent), ValueError, "holds no images"),
        (Reference(3), TypeError, "not int"),
        (Reference([]), TypeError, "without entries"),
        (Reference(np.zeros((8, 8, 3))), ValueError, r"uint8 .* float64 \(8, 8, 3\)"),
        (Reference(torch.zeros(8, 8, 3, dtype=torch.uint8)), TypeError, "numpy"),
        (Reference(PICTURE), ValueError, "FluxPipeline has no VAE"),
        (Reference(torch.zeros(24, 16), mask=PICTURE.point(lambda _: 0)), ValueError, "black"),
        (Reference(torch.zeros(24, 16), mask="no such.png"), FileNotFoundError, "no mask at"),
        (Reference(torch.zeros(24, 16), mask=np.zeros((2, 2), bool)), ValueError, "black"),
        (Reference(torch.zeros(24, 16), alpha=float("nan")), ValueError, "alpha"),
        (Reference(torch.zeros(24, 16), threshold=2), ValueError, "cosine"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_a_reference_is_refused_before_the_run(
    flux: Any, reference: Any, error: type[Exception], message: str
) -> None:
    if reference == "no such.png":
        reference = [reference]
    with pytest.raises(error, match=message):
        apply_negtome(flux, reference=reference)
    assert not denoiser(flux)._forward_pre_hooks


def test_a_bare_model_takes_clean_latents_only(flux: Any) -> None:
    with pytest.raises(ValueError, match="bare model has no VAE"):
        apply_negtome(flux.transformer, reference=Reference(PICTURE))
    latents = reference_latents(flux)
    with (
        negtome_guidance(flux.transformer, ALWAYS, reference=Reference(latents)),
        pytest.raises(ValueError, match=r"noise=False"),
    ):
        generate(flux, 1)
    with negtome_guidance(flux.transformer, ALWAYS, reference=Reference(latents, noise=False)):
        guided = generate(flux, 1)
    assert not torch.equal(guided, generate(flux, 1))


def test_pictures_are_read_from_wherever_they_are(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), (50 * i, 0, 0)) for i in range(5)]
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:], duration=40)
    (tmp_path / "folder").mkdir()
    for number in range(5):
        (tmp_path / f"{number}.png").rename(tmp_path / "folder" / f"{number}.png")
    array = np.stack([np.asarray(frame) for frame in frames])
    for source in (frames, array, tmp_path / "folder", str(tmp_path / "video.gif"), list(array)):
        pixels = Reference(source).load().pixels((3, 4, 6))
        assert pixels.shape == (3, 3, 4, 6)
        red = (pixels[:, 0].mean(dim=(1, 2)) + 1) * 127.5
        torch.testing.assert_close(red, torch.tensor([0.0, 100.0, 200.0]), atol=1.0, rtol=0)
    still = Reference(tmp_path / "folder" / "4.png").load().pixels((3, 8, 12))
    assert still.shape == (3, 3, 8, 12) and torch.equal(still[0], still[2])


def test_pictures_of_another_aspect_are_encoded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 64 x 32 and 32 x 64 pixels have equally many tokens."""
    from negtome_fast import models

    pipe = models.load_pipeline()
    sizes: list[tuple[int, ...]] = []
    encode = pipe.vae.encode

    def record(pixels: Tensor) -> Any:
        sizes.append(tuple(pixels.shape[-2:]))
        return encode(pixels)

    monkeypatch.setattr(pipe.vae, "encode", record)
    call: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent"}
    with negtome_guidance(pipe, ALWAYS, reference=Reference(PICTURE)):
        for height, width in ((64, 32), (64, 32), (32, 64)):
            pipe("a pixel art person", height=height, width=width, guidance_scale=1.0, **call)
    assert sizes == [(64, 32), (32, 64)]


def test_a_picture_is_avoided_or_approached_by_the_embedded_model(tmp_path: Path) -> None:
    """By its features, over four seeds: further away with alpha 0.9, nearer with -0.5."""
    from negtome_fast import models
    from negtome_fast.models.features import FeatureExtractor

    pipe, features = models.load_pipeline(), FeatureExtractor()
    prompt = "a pixel art person"
    (avoided,) = models.generate(pipe, prompt, [100], output_type="pil")
    avoided.save(tmp_path / "avoided.png")
    pixels = torch.from_numpy(np.array(avoided)).permute(2, 0, 1)[None] / 255

    def similarity(alpha: float) -> float:
        reference = Reference(tmp_path / "avoided.png", alpha=alpha)
        with negtome_guidance(pipe, t_end=750, reference=reference):
            images = models.generate(pipe, prompt, range(4), steps=10)
        return torch.cosine_similarity(features(images), features(pixels)).mean().item()

    away, neutral, toward = (similarity(alpha) for alpha in (0.9, 0.0, -0.5))
    assert away < neutral - 0.01 < neutral < toward - 0.01
