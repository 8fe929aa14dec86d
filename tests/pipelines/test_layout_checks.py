"""Layouts compare themselves with the ids that a model is given, and refuse where they disagree."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.families import FAMILIES
from negtome_fast.pipelines import ImageTokens, apply_negtome, known_layouts, negtome_guidance
from negtome_fast.pipelines.image_tokens import check_own_latents, grid_of_places
from negtome_fast.pipelines.parallel import TokenShards
from negtome_fast.pipelines.unknown import unknown_image_tokens

LATENTS = torch.zeros(2, 6, 8)
ROWS_AND_COLUMNS = torch.cartesian_prod(torch.arange(2), torch.arange(3))


def ids(image: int = 0, first_row: int = 0) -> Tensor:
    """Return (6, 3) of (image, row, column) of an image of 2 x 3 tokens."""
    places = ROWS_AND_COLUMNS + torch.tensor([first_row, 0])
    return nn.functional.pad(places, (1, 0), value=image).float()


def image_tokens(model_class: str, **arguments: Any) -> ImageTokens | None:
    config = SimpleNamespace(use_layer3d_rope=False, patch_size=(1, 2, 2))
    model: Any = SimpleNamespace(config=config)
    return known_layouts()[model_class].image_tokens(model, arguments)


FLUX = "FluxTransformer2DModel"


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (ids(), ImageTokens(6, 6, (2, 3))),
        (ids() * 0.5 + 7, ImageTokens(6, 6, (2, 3))),
        (torch.cat([ids(), ids(1)]), ImageTokens(12, 6, (2, 3))),
        (torch.cat([ids(2), ids(1)]), ImageTokens(12, 6, (2, 3), offset=6)),
    ],
    ids=["alone", "scaled", "given after", "given before"],
)
def test_ids_tell_the_image(places: Tensor, expected: ImageTokens) -> None:
    latents = torch.zeros(2, len(places), 8)
    assert image_tokens(FLUX, hidden_states=latents, img_ids=places) == expected
    assert image_tokens(FLUX, hidden_states=latents, img_ids=places.repeat(2, 1, 1)) == expected


@pytest.mark.parametrize(
    "places",
    [
        torch.cat([ids(), ids()]),
        torch.cat([ids(), ids()[:4]]),
        torch.cat([ids(1), ids(), ids(1)]),
        torch.cat([ids()[:3], ids(1), ids()[3:]]),
        ids().flip(0),
        ids()[[0, 3, 1, 4, 2, 5]],
    ],
    ids=["same places", "a smaller one", "in between", "around", "reversed", "by columns"],
)
def test_ids_that_do_not_tell_the_image_are_refused(places: Tensor) -> None:
    """Given images that are marked otherwise than by their first id were pushed."""
    latents = torch.zeros(2, len(places), 8)
    with pytest.raises(ValueError, match=r"img_ids do not place .*register_layout"):
        image_tokens(FLUX, hidden_states=latents, img_ids=places)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([[(1, 2, 3), (1, 1, 1)]] * 2, "img_shapes have 7 tokens, and its latents 6"),
        ([[(1, 3, 3)]] * 2, "img_shapes have 9 tokens, and its latents 6"),
    ],
)
def test_shapes_that_do_not_add_up_are_refused(shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_tokens("QwenImageTransformer2DModel", hidden_states=LATENTS, img_shapes=shapes)


def test_krea_2_reads_the_places_of_the_image() -> None:
    text = torch.zeros(4, 3)
    latents, own = LATENTS, ids()
    expected = ImageTokens(6, 6, (2, 3))
    places = torch.cat([text, own])
    assert image_tokens("Krea2Transformer2DModel", hidden_states=latents, position_ids=places) == (
        expected
    )
    for wrong in (torch.cat([own, text]), torch.cat([text, ids()[:3], ids(1)[3:]])):
        with pytest.raises(ValueError, match="position_ids do not place"):
            image_tokens("Krea2Transformer2DModel", hidden_states=latents, position_ids=wrong)


def ideogram(kinds: list[list[int]]) -> ImageTokens | None:
    places = nn.functional.pad(ids(), (0, 0, len(kinds[0]) - 6, 0)).repeat(len(kinds), 1, 1)
    return image_tokens(
        "Ideogram4Transformer2DModel", indicator=torch.tensor(kinds), position_ids=places
    )


def test_ideogram_4_reads_the_kinds_of_tokens() -> None:
    image = [2] * 6
    assert ideogram([[0, 3, *image], [3, 3, *image]]) == ImageTokens(8, 6, (2, 3), offset=2)
    assert ideogram([image]) == ImageTokens(6, 6, (2, 3))
    for wrong in ([[*image, 3, 3]], [[3, 3, *image], [3, *image, 3]], [[2, 3, *image]]):
        with pytest.raises(ValueError, match="its indicator does not put one image at the end"):
            ideogram(wrong)


@pytest.mark.parametrize("times", [[0, 9, 0], [9, 0, 9], [9, 9, 0]], ids=str)
@pytest.mark.parametrize("model", ["WanTransformer3DModel", "LTXVideoTransformer3DModel"])
def test_a_given_frame_between_generated_ones_is_refused(model: str, times: list[int]) -> None:
    arguments: dict[str, Any] = {"hidden_states": torch.zeros(2, 4, 3, 4, 4)}
    timestep = torch.tensor([times] * 2).float()
    if "LTX" in model:
        arguments = {"hidden_states": torch.zeros(2, 12, 4)}
        arguments |= {"num_frames": 3, "height": 2, "width": 2}
        timestep = timestep.repeat_interleave(4, dim=1)
    with pytest.raises(ValueError, match="frames between others are given"):
        image_tokens(model, **arguments, timestep=timestep)
    assert image_tokens(model, **arguments, timestep=timestep * 0) is not None
    assert image_tokens(model, **arguments, timestep=timestep * 0 + 5) is not None


def test_a_condition_mask_of_later_frames_is_refused() -> None:
    latents = torch.zeros(2, 4, 3, 4, 4)
    mask = torch.zeros(2, 1, 3, 4, 4)
    mask[:, :, 2] = 1
    with pytest.raises(ValueError, match="condition_mask says that frames between others"):
        image_tokens("CosmosTransformer3DModel", hidden_states=latents, condition_mask=mask)


def test_images_of_a_batch_of_several_sizes_are_refused() -> None:
    latents = torch.zeros(2, 9, 4, 1, 2, 2)
    shapes = [[(1, 2, 3), (1, 1, 3)], [(1, 3, 2), (1, 1, 3)]]
    with pytest.raises(ValueError, match=r"the images of a batch have the sizes"):
        image_tokens("JoyImageEditPlusTransformer3DModel", hidden_states=latents, shape_list=shapes)


def test_the_order_of_keywords_does_not_matter() -> None:
    """The first tensor of the call was taken for the latents."""
    arguments = {
        "timestep": torch.zeros(2),
        "encoder_hidden_states": torch.zeros(2, 4, 16, 16),
        "hidden_states": torch.zeros(2, 4, 4, 6),
    }
    assert image_tokens("SD3Transformer2DModel", **arguments) == ImageTokens(6, 6, (2, 3))


def test_places_are_a_grid_row_by_row_or_none() -> None:
    assert grid_of_places(ROWS_AND_COLUMNS) == (2, 3)
    assert grid_of_places(ROWS_AND_COLUMNS.flip(1)) is None
    assert grid_of_places(ROWS_AND_COLUMNS[:5]) is None


@pytest.mark.parametrize(
    ("own", "given", "refused"),
    [
        ((2, 6, 8), (2, 10, 8), True),
        ((2, 10, 8), (2, 10, 8), False),
        ((2, 6, 4), (2, 10, 8), False),  # packed or joined in channels: not comparable
        ((2, 4, 4, 4), (2, 4, 4, 8), True),
        ((2, 3, 4, 4), (2, 4, 4, 4), False),  # further channels
        ((2, 4, 2, 8, 8), (2, 4, 3, 8, 8), True),
    ],
)
def test_more_tokens_than_the_pipeline_generates_are_refused(
    own: tuple[int, ...], given: tuple[int, ...], refused: bool
) -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(in_channels=4))
    tokens = ImageTokens(10, 10)
    if not refused:
        check_own_latents(model, tokens, torch.zeros(given), torch.zeros(own))
        return
    with pytest.raises(ValueError, match=r"10 of its tokens were taken .*register_layout"):
        check_own_latents(model, tokens, torch.zeros(given), torch.zeros(own))


UNKNOWN: Any = SimpleNamespace(config=SimpleNamespace(in_channels=4))
PACKED = {"hidden_states": LATENTS, "timestep": torch.full((2,), 9.0)}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"encoder_hidden_states": torch.zeros(2, 5, 8)},
        {"img_ids": ids()},
        {"img_ids": ids().repeat(2, 1, 1)},
        {"img_shapes": [[(1, 2, 3)]] * 2},
        {"img_shapes": [(1, 2, 3)] * 2},
        {"mask": torch.ones(2, 6, dtype=torch.long)},
        {"timestep": torch.full((2, 6), 9.0)},
        {"pooled": torch.randn(2, 6)},
    ],
    ids=lambda more: str({k: getattr(v, "shape", v) for k, v in more.items()}),
)
def test_arguments_of_an_unknown_model_that_leave_no_doubt(more: dict[str, Any]) -> None:
    assert unknown_image_tokens(UNKNOWN, {**PACKED, **more}) == ImageTokens(6, 6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(2, 6, 9)}, "has 6 tokens, too, as for text"),
        ({"img_ids": torch.cat([ids()[:3], ids(1)[:3]])}, "does not place the tokens"),
        ({"position_ids": ids().flip(0).repeat(2, 1, 1)}, "does not place the tokens"),
        ({"img_shapes": [[(1, 1, 3), (1, 1, 3)]] * 2}, "tells of other images"),
        ({"img_shapes": [[(1, 1, 3)]] * 2}, "tells of other images"),
        ({"indicator": torch.tensor([[3, 3, 2, 2, 2, 2]] * 2)}, "tells kinds of tokens apart"),
        ({"mask": torch.tensor([True] * 5 + [False])[None]}, "tells kinds of tokens apart"),
        ({"timestep": torch.tensor([[0.0] + [9.0] * 5] * 2)}, "has several values"),
        ({"hidden_states": torch.zeros(2, 2, 4, 1, 4, 4)}, r"latents are float32 of the shape"),
        ({"hidden_states": torch.zeros(2, 6, dtype=torch.long)}, r"latents are int64"),
        ({"hidden_states": torch.zeros(2, 4, 4, 8, 8)}, "do not tell frames from channels"),
    ],
)
def test_arguments_of_an_unknown_model_that_leave_a_doubt(
    more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{message}.*register_layout"):
        unknown_image_tokens(UNKNOWN, {**PACKED, **more})


def test_a_mask_of_given_frames_is_a_doubt() -> None:
    video = torch.zeros(2, 4, 3, 8, 8)
    mask = torch.zeros(2, 1, 3, 8, 8)
    assert unknown_image_tokens(UNKNOWN, {"x": video, "mask": mask}) == (
        ImageTokens(192, 192, (8, 8), 3)
    )
    mask[:, :, 0] = 1
    with pytest.raises(ValueError, match="marks a part of the latents"):
        unknown_image_tokens(UNKNOWN, {"x": video, "mask": mask})


class Reference:
    """A pipeline with a further component that is a denoiser by its class."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self.unet, self.reference_unet = build(), build()
        self.scheduler = FAMILIES["sd15"].scheduler.build()


def test_a_further_denoiser_is_named() -> None:
    pipe = Reference(FAMILIES["sd15"].denoiser.build)
    expected = r"Reference.reference_unet is a UNet2DConditionModel too and is not guided"
    with pytest.warns(UserWarning, match=expected):
        apply_negtome(pipe).remove()


def test_a_pipeline_without_the_usual_names_is_told_what_to_give() -> None:
    pipe = SimpleNamespace(image_unet=FAMILIES["sd15"].denoiser.build())
    with pytest.raises(TypeError, match="not SimpleNamespace; give its image_unet"):
        apply_negtome(pipe)


def test_two_unets_are_guided_as_one() -> None:
    build = FAMILIES["sd15"].denoiser.build
    pipe = Reference(build)
    pipe.unet_2 = pipe.__dict__.pop("reference_unet")
    with negtome_guidance(pipe):
        assert all(model._forward_pre_hooks for model in (pipe.unet, pipe.unet_2))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (ImageTokens(10, 7), [(4, 4, 0), (3, 3, 0), (3, 0, 0)]),
        (ImageTokens(10, 5, offset=5), [(4, 0, 0), (3, 2, 1), (3, 3, 0)]),
        (ImageTokens(10, 8, offset=2), [(4, 2, 2), (3, 3, 0), (3, 3, 0)]),
        (ImageTokens(10, 2, offset=5), [(4, 0, 0), (3, 2, 1), (3, 0, 0)]),
    ],
    ids=["given after", "given before", "given before on the first", "given around"],
)
def test_ranks_hold_the_generated_tokens_alone(
    image: ImageTokens, expected: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The given tokens before the generated ones were taken for generated."""
    group: Any = None
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        shards = TokenShards(group, image)
        own = shards.image
        found.append((own.num_tokens, own.generated, own.offset))
        assert shards.sizes == tuple(generated for _, generated, _ in expected)
        assert shards.own.stop - shards.own.start == own.generated
    assert found == expected
