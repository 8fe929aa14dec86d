"""Several prompts in one call: groups by prompt, the option for one group, references by prompt."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.families import FAMILIES
from helpers.families.core import embeddings, noise_generators
from negtome_fast import Reference
from negtome_fast.config import NegToMeConfig
from negtome_fast.pipelines import negtome_guidance

SIZE = {"height": 64, "width": 96}
EVERY_TOKEN = NegToMeConfig(threshold=-1, t_end=0)

CALLS: dict[str, dict[str, Any]] = {
    "flux": {"true_cfg_scale": 3.0},
    "sdxl": {"guidance_scale": 3.0},
    "z-image": {"guidance_scale": 3.0},
    "wan": {"guidance_scale": 3.0, "num_frames": 9},
}
"""Family -> arguments of a call with classifier-free guidance."""


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """In fp64 a batch of another size rounds too little to decide between two equal tokens."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def generate(
    name: str,
    pipe: Any,
    prompts: list[int],
    each: int = 1,
    seeds: list[int] | None = None,
    cfg: bool = True,
) -> Tensor:
    """Return the latents of a call with these prompts, by their embeddings."""
    seeds = list(range(len(prompts) * each)) if seeds is None else seeds
    if name in ("flux", "wan"):  # their pipelines do not repeat given embeddings
        prompts, each = [prompt for prompt in prompts for _ in range(each)], 1
    embeds: Any = [embeddings(5, 16, seed=20 + prompt) for prompt in prompts]
    call = dict(CALLS[name]) if cfg else {scale: 1.0 for scale in CALLS[name] if "scale" in scale}
    if name == "wan":
        call.update(num_frames=9, num_videos_per_prompt=each)
    else:
        call["num_images_per_prompt"] = each
    negatives: Any = [embeddings(5, 16, seed=30)] * len(prompts)
    if name != "z-image":
        embeds, negatives = torch.stack(embeds), torch.stack(negatives)
    call |= {"prompt_embeds": embeds, **({"negative_prompt_embeds": negatives} if cfg else {})}
    if name in ("flux", "sdxl"):
        pooled = torch.stack([embeddings(16, seed=40 + prompt) for prompt in prompts])
        call |= {"pooled_prompt_embeds": pooled}
        call |= {"negative_pooled_prompt_embeds": -pooled} if cfg else {}
    generators = [noise_generators(1, 7 + seed)[0] for seed in seeds]
    with torch.no_grad():
        return pipe(
            **{"prompt": None, **SIZE, "num_inference_steps": 2, "generator": generators},
            output_type="latent",
            return_dict=False,
            **call,
        )[0]


@pytest.mark.parametrize("name", CALLS)
def test_images_per_prompt_are_one_group_for_each_prompt(name: str) -> None:
    pipe = FAMILIES[name].build()
    alone = [generate(name, pipe, [0], 2, [0, 1]), generate(name, pipe, [1], 2, [2, 3])]
    plain = generate(name, pipe, [0, 1], 2)
    torch.testing.assert_close(plain, torch.cat(alone), rtol=1e-6, atol=1e-6)
    with negtome_guidance(pipe, EVERY_TOKEN) as handle:
        together = generate(name, pipe, [0, 1], 2)
        summary = handle.summary()
        alone = [generate(name, pipe, [0], 2, [0, 1]), generate(name, pipe, [1], 2, [2, 3])]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)
    assert (together - plain)[[1, 3]].abs().max() > 1e-2
    assert torch.equal(together[[0, 2]], plain[[0, 2]])
    assert summary.groups == 2 * summary.parts
    if summary.parts == 2:
        assert "2 guidance parts, 2 groups in each" in str(summary)


def test_one_group_over_all_prompts_and_other_numbers_are_options() -> None:
    pipe = FAMILIES["sdxl"].build()
    plain = generate("sdxl", pipe, [0, 1], 2)
    for groups, still in ((1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3])):
        with warnings.catch_warnings(), negtome_guidance(pipe, EVERY_TOKEN, groups=groups) as one:
            warnings.simplefilter("ignore")
            guided = generate("sdxl", pipe, [0, 1], 2)
        assert [i for i in range(4) if torch.equal(guided[i], plain[i])] == still
        assert (one.summary().groups, one.summary().parts) == (2 * groups, 2)
    with negtome_guidance(pipe, EVERY_TOKEN, groups=3):
        message = "the batch of 8 items in 2 guidance part(s) does not divide into 3 equal groups"
        with pytest.raises(ValueError, match=re.escape(message)):
            generate("sdxl", pipe, [0, 1], 2)


@pytest.mark.parametrize("given", [False, True], ids=["in the batch", "a reference"])
def test_the_groups_may_change_in_the_middle_of_a_run(given: bool) -> None:
    pipe = FAMILIES["sdxl"].build()
    reference = Reference(embeddings(1, 4, 8, 12, seed=5), noise=False) if given else None
    with negtome_guidance(pipe, EVERY_TOKEN, reference=reference) as handle:
        told = []

        def change(module: Any, args: Any, output: Any) -> None:
            told.append(handle.summary().groups)
            handle.update(groups=1)

        with pipe.unet.register_forward_hook(change):
            generate("sdxl", pipe, [0, 1], 2)
    assert told == [4, 2]


def test_one_image_for_each_prompt_is_reported_with_the_option() -> None:
    pipe = FAMILIES["flux"].build()
    plain = generate("flux", pipe, [0, 1])
    message = r"two images for each prompt.* groups=1"
    with (
        negtome_guidance(pipe, EVERY_TOKEN),
        pytest.warns(UserWarning, match=message),
    ):
        assert torch.equal(generate("flux", pipe, [0, 1]), plain)
    with (
        negtome_guidance(pipe, EVERY_TOKEN, reference="others"),
        pytest.raises(ValueError, match=message),  # as for a single image
    ):
        generate("flux", pipe, [0, 1])
    for reference in ("first", "others"):
        with negtome_guidance(pipe, EVERY_TOKEN, reference=reference, groups=1):
            assert not torch.equal(generate("flux", pipe, [0, 1])[1], plain[1])


@pytest.mark.parametrize(("prompts", "groups"), [([0, 0, 0, 0], 1), ([0, 1, 0, 1], 2)])
def test_equal_prompts_of_a_list_are_one_prompt(prompts: list[int], groups: int) -> None:
    pipe = FAMILIES["sdxl"].build()
    with negtome_guidance(pipe, EVERY_TOKEN) as handle:
        guided = generate("sdxl", pipe, prompts)
        assert handle.summary().groups == 2 * groups
        if groups == 2:
            by_prompt = generate("sdxl", pipe, sorted(prompts), seeds=[0, 2, 1, 3])
            torch.testing.assert_close(guided, by_prompt[[0, 2, 1, 3]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "each", "groups"), [(["a", "a"], 2, 1), (["a", "b"], 2, 2), (["a", "a", "b"], 2, 3)]
)
def test_prompts_in_words_are_counted(words: list[str], each: int, groups: int) -> None:
    """The last case: prompts that occur differently often are a group each."""
    pipe = FAMILIES["longcat"].build()
    with negtome_guidance(pipe, EVERY_TOKEN) as handle, torch.no_grad():
        pipe(
            words,
            negative_prompt=[""] * len(words),
            num_images_per_prompt=each,
            num_inference_steps=1,
            output_type="latent",
            enable_prompt_rewrite=False,
            **SIZE,
        )
    assert handle.summary().groups == groups


def test_embeddings_for_each_frame_are_those_of_the_videos() -> None:
    pipe = FAMILIES["animatediff"].build()
    with negtome_guidance(pipe, EVERY_TOKEN) as handle, torch.no_grad():
        pipe(
            prompt_embeds=embeddings(2, 5, 16).repeat_interleave(2, dim=0),
            negative_prompt_embeds=embeddings(1, 5, 16, seed=4).repeat(4, 1, 1),
            num_frames=4,
            num_inference_steps=1,
            guidance_scale=3.0,
            output_type="latent",
            **SIZE,
        )
    assert (handle.summary().parts, handle.summary().groups) == (2, 4)


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_a_reference_is_seen_in_the_conditioning_of_each_prompt(name: str) -> None:
    pipe = FAMILIES[name].build()
    shape = (1, 24, 16) if name == "flux" else (1, 4, 8, 12)
    reference = Reference(embeddings(*shape, seed=5), noise=False)
    with negtome_guidance(pipe, EVERY_TOKEN, reference=reference):
        together = generate(name, pipe, [0, 1], 2)
        alone = [generate(name, pipe, [0], 2, [0, 1]), generate(name, pipe, [1], 2, [2, 3])]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)
