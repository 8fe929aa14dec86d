"""`negtome-fast eval own` with pipelines of other families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra 'eval' is not installed")
pytest.importorskip("dicebear", reason="the extra 'eval' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'eval' is not installed")

from helpers.eval_own import CONDITIONS
from helpers.families import FAMILIES
from helpers.pipelines_fixtures import sdxl_pipeline
from negtome_fast import generation
from negtome_fast.cli import main
from negtome_fast.models import model_folder
from negtome_fast.studies.external import METRICS, Batch, Metric
from negtome_fast.studies.studies import own


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole SDXL pipeline with random weights, as `from_pretrained` expects it."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel
    from transformers import CLIPTextModelWithProjection as Projected

    words = AutoTokenizer.from_pretrained(Path(str(model_folder())) / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=16,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    parts = sdxl_pipeline()
    path = tmp_path_factory.mktemp("sdxl")
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(config), text_encoder_2=Projected(config),
        tokenizer=words, tokenizer_2=words, unet=parts.unet, scheduler=parts.scheduler,
    ).save_pretrained(path)  # fmt: skip
    return path


def test_a_tiny_sdxl(sdxl: Path, tmp_path: Path, picture: Path, capsys: Any) -> None:
    command = ["eval", "own", "--model", str(sdxl), "--prompt", "a person", "-n", "4"]
    command += ["--group", "2", "--steps", "2", "--height", "64", "--width", "64"]
    command += ["--threshold", "-1", "--t-end", "0", "--device", "cpu", "--threads", "1"]
    command += ["--avoid", str(picture), "--negative-prompt", "captain red"]
    command += ["--out", str(tmp_path), "--store", str(tmp_path / "store")]
    assert main(command) == 0
    result = json.loads((tmp_path / "own.json").read_text(encoding="utf-8"))
    (part,) = result["scales"]
    assert result["pipeline"] == "StableDiffusionXLPipeline"
    assert list(part["conditions"]) == CONDITIONS and part["guidance_scale"] is None
    found = [one["groups"][0]["measures"] for one in part["conditions"].values()]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    assert part["conditions"]["NegToMe"]["config"]["min_grid"] == [32, 32]  # the family's
    # At this scale the pipeline leaves the negative prompt out, which is seen by what it draws.
    assert main([*command, "--guidance-scale", "1"]) == 2
    assert " has no effect without classifier-free guidance" in capsys.readouterr().err


def test_a_tiny_qwen_image_differs_in_the_negative_prompt_alone(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text encoder is replaced: words become random numbers of their own."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline

    def embeds(self: Any, prompt: Any, device: Any = None, dtype: Any = None) -> Any:
        texts = [prompt] if isinstance(prompt, str) else prompt
        seeds = [torch.Generator().manual_seed(len(text)) for text in texts]
        rows = torch.stack([torch.randn(5, 16, generator=seed) for seed in seeds])
        return rows, torch.ones(len(texts), 5, dtype=torch.long)

    monkeypatch.setattr(QwenImagePipeline, "_get_qwen_prompt_embeds", embeds)
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    parts = FAMILIES["qwen"].build()
    pipe = QwenImagePipeline(parts.scheduler, vae, None, None, parts.transformer)
    monkeypatch.setattr(generation, "load_pipeline", lambda settings: pipe)

    def distance(batch: Batch) -> float:
        assert batch.target is not None and batch.target.shape == (1, 3, 32, 32)
        return float((batch.images - batch.target).abs().mean())

    likeness = [Metric("LPIPS to target", "higher", distance, ("target",))]
    monkeypatch.setitem(METRICS, "lpips", lambda device: likeness)
    calls: list[dict[str, Any]] = []
    real = generation.draw
    monkeypatch.setattr(generation, "draw", lambda *a, **b: calls.append(a[1]) or real(*a, **b))
    request = own.request(
        {
            "model": "owner/qwen", "prompts": ["a person"], "images": 4, "group": 2, "steps": 2,
            "height": 32, "width": 32, "threshold": [-1.0], "t_end": [0.0],
            "negative_prompt": "captain red",
            "references": (generation.ReferenceFile(str(picture)),),
            "metrics": ["lpips"],
        }
    )  # fmt: skip
    result = own.perform(request, tmp_path, tmp_path / "store", progress=False)
    (part,) = result["scales"]
    assert part["conditions"]["NegToMe"]["pushed"] > 0.9
    assert result["better"] == {"LPIPS to target": "higher"}
    # Without any negative prompt this pipeline would have no classifier-free guidance.
    assert {call["negative_prompt"] for call in calls} == {"", "captain red"}
    assert all("true_cfg_scale" not in call for call in calls)
