"""Guidance in hand-written loops of plain torch: window, groups, filters, statistics."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from negtome_fast import config
from negtome_fast.config import NegToMeConfig
from negtome_fast.functional import match_tokens, negtome
from negtome_fast.guidance import Guidance, ReferenceSettings
from negtome_fast.statistics import Statistics


class TinyDiT(nn.Module):
    """Two attention blocks on a grid of 4 x 6 tokens, with the three calls of `Guidance`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2)
        )
        self.time = nn.Linear(1, 16)

    def forward(self, x: Tensor, t: float, guidance: Guidance | None) -> Tensor:
        x = x + self.time(torch.full((len(x), 1, 1), t / 1000))
        for number, attention in enumerate(self.attention):
            attended = attention(x, x, x, need_weights=False)[0]
            if guidance is not None:
                attended = guidance.apply(attended, block=f"blocks.{number}")
            x = x + attended
        return x


@torch.no_grad()
def sample(guidance: Guidance | None, steps: int = 5, images: int = 3) -> Tensor:
    model = TinyDiT()
    x = torch.randn(images, 24, 16, generator=torch.Generator().manual_seed(1))
    for i in range(steps):
        t = 1000 * (1 - i / steps)
        if guidance is not None:
            guidance.begin_step(t, step=i, num_steps=steps, grid=(4, 6))
        x = x - model(x, t, guidance) / steps
        if guidance is not None:
            guidance.end_step()
    return x


def tokens(images: int = 4) -> Tensor:
    return torch.randn(images, 24, 16, generator=torch.Generator().manual_seed(2))


def applied(settings: NegToMeConfig, x: Tensor, **step: Any) -> Tensor:
    guidance = Guidance(settings)
    guidance.begin_step(1000.0, **step)
    return guidance.apply(x)


def test_a_default_device_of_the_caller_changes_nothing() -> None:
    def avoided() -> Tensor:
        mask = torch.ones(4, 6, dtype=torch.bool, device="cpu")
        settings = NegToMeConfig(threshold=0.0, t_end=0, dropout=0.2)
        guidance = Guidance(settings, [ReferenceSettings(mask=mask), ReferenceSettings(alpha=2.0)])
        guidance.begin_run()
        guidance.begin_step(900.0, grid=(4, 6))
        with guidance.record():
            guidance.apply(references)
        return guidance.apply(x)

    x, references = tokens(), tokens(2) + 0.5
    expected = avoided()
    with torch.device("meta"):
        assert torch.equal(avoided(), expected)
    assert not torch.equal(expected, x)


def test_a_hand_written_loop_is_guided_and_its_reference_is_not() -> None:
    guidance = Guidance(NegToMeConfig(threshold=0.2, t_end=500))
    plain, guided = sample(None), sample(guidance)
    assert torch.equal(plain[0], guided[0])
    assert not torch.equal(plain[1], guided[1])
    summary = guidance.summary()
    assert (summary.forwards, summary.guided, summary.groups) == (5, 3, 1)
    assert [row.block for row in summary.rows] == ["blocks.0", "blocks.1"]
    assert [row.tokens for row in summary.rows] == [3 * 2 * 24] * 2


@pytest.mark.parametrize(
    "settings", [{"alpha": 0}, {"t_start": 5, "t_end": 1}, {"threshold": 1.0}], ids=str
)
def test_a_loop_without_a_push_is_bit_identical(settings: dict[str, Any]) -> None:
    assert torch.equal(sample(None), sample(Guidance(NegToMeConfig(**settings))))


def test_alpha_zero_still_measures() -> None:
    guidance = Guidance(NegToMeConfig(alpha=0, threshold=0.2))
    sample(guidance)
    assert guidance.summary().total.matched > 0


@pytest.mark.parametrize("reference", ["first", "others"])
@pytest.mark.parametrize("matching", ["paper", "official"])
@pytest.mark.parametrize("groups", [1, 2])
def test_apply_is_the_operator(reference: Any, matching: Any, groups: int) -> None:
    settings = NegToMeConfig(threshold=0.1, reference=reference, matching=matching)
    expected = negtome(
        tokens(), reference, threshold=0.1, matching=matching, groups=groups, alpha=0.9
    )
    torch.testing.assert_close(applied(settings, tokens(), groups=groups), expected)


def test_the_configured_groups_go_first() -> None:
    x = tokens()
    result = applied(NegToMeConfig(threshold=0.1, groups=2), x, groups=1)
    assert torch.equal(result[2], x[2])


def test_in_place_writes_into_the_argument_and_otherwise_not() -> None:
    guidance = Guidance(NegToMeConfig(threshold=0.1))
    guidance.begin_step(1000)
    x = tokens()
    fresh = guidance.apply(x)
    assert torch.equal(x, tokens())
    assert guidance.apply(x, inplace=True) is x
    torch.testing.assert_close(x, fresh)


def test_statistics_are_those_of_the_matches() -> None:
    guidance = Guidance(NegToMeConfig(threshold=0.4))
    guidance.begin_step(1000, grid=(4, 6))
    guidance.apply(tokens(), block="here")
    similarity, _ = match_tokens(tokens())
    best = similarity[1:]
    (row,) = guidance.summary().rows
    assert (row.block, row.grid, row.calls, row.tokens) == ("here", (4, 6), 1, 72)
    assert row.matched == row.pushed == pytest.approx((best > 0.4).float().mean().item())
    assert row.similarity == pytest.approx(best.mean().item(), abs=1e-5)


def test_a_summary_prints_a_table_and_turns_into_plain_values() -> None:
    guidance = Guidance(NegToMeConfig(threshold=0.2))
    sample(guidance)
    summary = guidance.summary()
    text = str(summary)
    assert "guided 1 of 5 model forwards" in text
    assert "blocks.1" in text and "4 x 6" in text and "all blocks" in text
    assert summary.to_dict()["rows"][0]["block"] == "blocks.0"
    assert summary.to_dict()["total"]["tokens"] == summary.total.tokens == 96
    guidance.reset()
    assert guidance.summary().rows == ()
    assert "the model was not called" in str(guidance.summary())


def test_dropout_spares_tokens_and_repeats_in_every_run() -> None:
    guidance = Guidance(NegToMeConfig(threshold=-1, dropout=0.5, t_end=0))
    results = []
    for _ in range(2):
        guidance.begin_run()
        results.append(sample(guidance))
    assert torch.equal(*results)
    total = guidance.summary().total
    assert total.matched == 1 and 0.3 < total.pushed < 0.7


def test_dropout_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    applied(NegToMeConfig(threshold=-1, dropout=0.5), tokens())
    assert torch.equal(torch.rand(1), expected)


def test_a_filtered_block_is_left_alone() -> None:
    guidance = Guidance(NegToMeConfig(threshold=-1, blocks="blocks.1", min_grid=(4, 4)))
    guidance.begin_step(1000, grid=(4, 6))
    x = tokens()
    assert guidance.apply(x, block="blocks.0") is x
    assert guidance.apply(x, block="blocks.1", grid=(2, 12)) is x
    assert guidance.apply(x, block="blocks.1") is not x


def test_a_step_in_which_nothing_was_guided_is_reported_once() -> None:
    guidance = Guidance(NegToMeConfig(blocks="elsewhere"))
    with pytest.warns(UserWarning, match="no block was guided"):
        sample(guidance)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(guidance)


@pytest.mark.parametrize("groups", [1, 2])
def test_only_reference_items_are_reported_once_and_returned(groups: int) -> None:
    guidance = Guidance(NegToMeConfig(threshold=-1))
    guidance.begin_step(1000, groups=groups)
    x = tokens(groups)
    with pytest.warns(UserWarning, match="only reference items"):
        assert guidance.apply(x) is x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guidance.apply(x) is x
        guidance.end_step()


@pytest.mark.parametrize("inference_first", [True, False])
def test_inference_mode_may_change_between_runs(inference_first: bool) -> None:
    guidance = Guidance(NegToMeConfig(threshold=0.1, dropout=0.5))
    for inference in (inference_first, not inference_first):
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            guidance.begin_step(1000)
            guidance.apply(tokens())
            guidance.end_step()
    assert guidance.summary().total.tokens == 2 * 72


def test_counts_survive_a_move_to_another_device() -> None:
    statistics = Statistics()
    for device in ("cpu", "meta"):
        counts = torch.ones(1, 3, dtype=torch.int64, device=device)
        statistics.add(("block",), counts, torch.ones(1, device=device))
    (sums,) = statistics._sums.values()
    assert [part.device.type for part in sums] == ["meta", "meta"]


def test_a_step_is_counted_together_and_the_count_is_that_of_every_block() -> None:
    torch.manual_seed(0)
    tokens = [torch.randn(2, 6, 8), torch.randn(2, 10, 8), torch.randn(2, 6, 8)]
    guidance = Guidance(NegToMeConfig(threshold=0.2, reference="others"))
    for repeat in range(2):
        guidance.begin_step(1000)
        for number, block in enumerate(tokens):
            guidance.apply(block + repeat, block=f"blocks.{number}", grid=(2, block.shape[1] // 2))
        if repeat:  # one step is closed by the next or by reading the summary, not by its owner
            break
    rows = guidance.summary().rows
    assert [(row.block, row.calls, row.tokens) for row in rows] == [
        ("blocks.0", 2, 24),
        ("blocks.1", 2, 40),
        ("blocks.2", 2, 24),
    ]
    for row, block in zip(rows, tokens, strict=True):
        similarity = torch.cat([match_tokens(block + i, "others")[0] for i in range(2)])
        assert row.similarity == pytest.approx(similarity.mean().item(), abs=1e-6)
        assert row.matched == pytest.approx((similarity > 0.2).float().mean().item())


def test_a_guided_step_that_no_block_took_part_in_is_reported_once_per_run() -> None:
    guidance = Guidance()
    for _ in range(2):
        guidance.begin_run()
        with pytest.warns(UserWarning, match=r"no block handed.*torch\.compiler\.reset"):
            guidance.begin_step(1000)
            guidance.end_step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            guidance.begin_step(1000)
            guidance.end_step()
            guidance.begin_step(100)
            guidance.end_step()
            guidance.begin_step(1000)
            guidance.end_step(completed=False)


def test_apply_outside_of_a_step_says_what_to_call() -> None:
    guidance = Guidance()
    with pytest.raises(RuntimeError, match="begin_step"):
        guidance.apply(tokens())
    guidance.begin_step(1000)
    guidance.end_step(completed=False)
    with pytest.raises(RuntimeError, match="begin_step"):
        guidance.apply(tokens())


@pytest.mark.parametrize(
    ("timestep", "active"),
    [
        (torch.tensor([950, 950]), True),
        (torch.tensor(899.0), False),
        (torch.tensor(0.9, dtype=torch.bfloat16) * 1000, True),
        (898.4, False),
    ],
)
def test_a_tensor_is_read_with_the_rounding_of_its_dtype(timestep: Any, active: bool) -> None:
    guidance = Guidance()
    assert guidance.begin_step(timestep) is active
    assert guidance.active is active


def test_gradients_flow_through_guided_tokens() -> None:
    x = tokens().requires_grad_()
    applied(NegToMeConfig(threshold=-1, alpha=0.5), x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[1], torch.full((24, 16), 1.5))


def test_a_wrong_configuration_is_refused() -> None:
    with pytest.raises(TypeError, match="NegToMeConfig, not dict"):
        Guidance({"alpha": 0.9})  # type: ignore[arg-type]


def test_no_file_of_the_guidance_imports_diffusers() -> None:
    package = Path(config.__file__).parent
    files = [package / "config.py", package / "guidance.py", *package.glob("pipelines/*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("diffusers") for name in names), file.name


@torch.no_grad()
def sample_with_references(guidance: Guidance, references: Tensor, images: int = 3) -> Tensor:
    """Does what `sample` does, with a forward of the references before each guided forward."""
    model = TinyDiT()
    x = torch.randn(images, 24, 16, generator=torch.Generator().manual_seed(1))
    for i in range(5):
        t = 1000 * (1 - i / 5)
        if guidance.begin_step(t, step=i, num_steps=5, grid=(4, 6)):
            with guidance.record():
                model(references, t, guidance)
        x = x - model(x, t, guidance) / 5
        guidance.end_step()
    return x


def test_a_hand_written_loop_takes_references_from_outside() -> None:
    """The first image of a batch, given as the reference of the others."""
    config = NegToMeConfig(threshold=0.2, t_end=900)
    inside = sample(Guidance(config))
    start = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(1))
    guidance = Guidance(config, [ReferenceSettings()])
    outside = sample_with_references(guidance, start[:1])
    torch.testing.assert_close(outside[1:], inside[1:], atol=1e-5, rtol=1e-5)
    assert not torch.equal(outside[1], sample(None)[1])
    assert guidance.summary().forwards == 5 and guidance.summary().guided == 1


def recorded(guidance: Guidance, x: Tensor, references: Tensor, **step: Any) -> Tensor:
    guidance.begin_step(1000, **step)
    with guidance.record():
        assert guidance.recording and guidance.apply(references) is references
    assert not guidance.recording
    return guidance.apply(x)


@pytest.mark.parametrize("combine", ["nearest", "sum"])
@pytest.mark.parametrize("groups", [1, 2])
def test_each_group_has_the_references_in_its_own_conditioning(combine: Any, groups: int) -> None:
    x, references = tokens(4), torch.randn(2 * groups, 24, 16, generator=generator())
    settings = [ReferenceSettings(alpha=2.0, threshold=0.6), ReferenceSettings(alpha=-0.5)]
    guidance = Guidance(NegToMeConfig(threshold=0.5, combine=combine), settings)
    expected = [
        negtome(
            part,
            references[2 * g : 2 * g + 2],
            alpha=torch.tensor([2.0, -0.5]),
            threshold=torch.tensor([0.6, 0.5]),
            combine=combine,
        )
        for g, part in enumerate(x.chunk(groups))
    ]
    torch.testing.assert_close(
        recorded(guidance, x, references, groups=groups), torch.cat(expected)
    )
    moved = (torch.cat(expected) != x).any(dim=2).float().mean().item()
    (row,) = guidance.summary().rows
    assert row.pushed == row.matched == pytest.approx(moved) and 0 < moved < 1


def test_matches_are_counted_by_the_threshold_of_their_reference_also_with_dropout() -> None:
    settings = [ReferenceSettings(threshold=0.5), ReferenceSettings(threshold=0.2)]
    shares = []
    for dropout in (0.0, 0.5):
        guidance = Guidance(NegToMeConfig(dropout=dropout), settings)
        recorded(guidance, tokens(), torch.randn(2, 24, 16, generator=generator()))
        total = guidance.summary().total
        shares.append((total.matched, total.pushed))
    assert shares[0][0] == shares[0][1] == shares[1][0] > shares[1][1] > 0


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def test_a_mask_follows_the_grid_of_the_block() -> None:
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[:20, :30] = True
    guidance = Guidance(NegToMeConfig(threshold=-1, alpha=-1), [ReferenceSettings(mask=mask)])
    for height, width in ((4, 6), (2, 3)):
        references = torch.randn(1, height * width, 16, generator=generator())
        with torch.no_grad():
            pulled = recorded(guidance, references.flip(1) * 2, references, grid=(height, width))
        allowed = references.unflatten(1, (height, width))[:, : height // 2, : width // 2]
        places = allowed.flatten(1, 2) if width % 2 == 0 else references[:, :2]
        distance = (pulled[0][:, None] - places[0]).norm(dim=2).min(dim=1).values
        assert distance.max() < 1e-5
    with pytest.raises(ValueError, match="token grid of block is not known"):
        recorded(guidance, tokens(), tokens(1))


def test_references_that_were_not_recorded_are_reported() -> None:
    guidance = Guidance(NegToMeConfig(), [ReferenceSettings(), ReferenceSettings()])
    with pytest.raises(RuntimeError, match="begin_step returned True"), guidance.record():
        pass
    guidance.begin_step(1000)
    with guidance.record(0, 1):
        guidance.apply(tokens(1))
    with pytest.raises(RuntimeError, match=r"guidance\.record"):
        guidance.apply(tokens())
    with pytest.raises(ValueError, match="batch of 1"), guidance.record(1, 1):
        guidance.apply(tokens(2))
    with pytest.raises(RuntimeError, match=r"references=\["), Guidance().record():
        pass


@pytest.mark.parametrize("mask", [torch.zeros(3, 3, dtype=torch.bool), torch.ones(3, 3), "m"])
def test_a_mask_that_cannot_be_one_is_refused(mask: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="mask of a reference"):
        ReferenceSettings(mask=mask)
