"""The end-to-end benchmark: same places, paired differences, and a rehearsal with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.compared import baselines, denoisers
from bench.suites import end_to_end
from bench.timing import clock
from negtome_fast import NegToMeConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flux() -> denoisers.Workload:
    return denoisers.flux(CPU, torch.float32, tiny=True)


def test_timesteps_are_those_of_the_schedulers() -> None:
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    euler = EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    euler.set_timesteps(50)
    assert denoisers.leading_timesteps(50) == tuple(euler.timesteps.tolist())

    # FluxPipeline calls it so for 1024 x 1024 pixels: sigmas to 1/28, the shift exp(1.15).
    flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flow.set_timesteps(sigmas=[1 - i / 28 for i in range(28)], mu=1.15)
    assert denoisers.flow_timesteps(28, 3.158) == pytest.approx(flow.timesteps.tolist(), abs=0.05)


def test_guided_steps_are_those_in_the_window(flux: denoisers.Workload) -> None:
    assert flux.guided_steps == sum(900 <= t <= 1000 for t in flux.timesteps) == 8
    assert 900 <= flux.guided_timestep <= 1000


def test_authors_function_acts_where_ours_does(flux: denoisers.Workload) -> None:
    outputs, blocks = {}, {}
    for method in end_to_end.METHODS:
        with end_to_end.guided(flux, method) as handle, torch.no_grad():
            outputs[method] = flux.forward(flux.guided_timestep)
            blocks[method] = end_to_end.blocks_guided(handle) if handle else 0
    assert blocks == {"without": 0, "ours": 2, "authors": 2}
    # Our operator with the official matching computes the same in the same places.
    config = flux.config.with_overrides(matching="official", backend="reference")
    official = denoisers.Workload("", flux.model, flux.forward, config, flux.timesteps, flux.images)
    with end_to_end.guided(official, "ours"), torch.no_grad():
        expected = flux.forward(flux.guided_timestep)
    torch.testing.assert_close(outputs["authors"], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs["authors"], outputs["without"], rtol=1e-3, atol=1e-3)
    assert not torch.equal(outputs["ours"], outputs["without"])
    with torch.no_grad():
        assert torch.equal(flux.forward(flux.guided_timestep), outputs["without"])


def test_authors_function_respects_the_window_and_the_filter(flux: denoisers.Workload) -> None:
    config = flux.config.with_overrides(blocks=["transformer_blocks"])
    some = denoisers.Workload("", flux.model, flux.forward, config, flux.timesteps, flux.images)
    with end_to_end.guided(some, "authors") as handle, torch.no_grad():
        flux.forward(100.0)
        assert end_to_end.blocks_guided(handle) == 0
        flux.forward(950.0)
        assert end_to_end.blocks_guided(handle) == 1


def test_what_guides_nothing_is_not_timed(flux: denoisers.Workload) -> None:
    def nothing() -> None:
        pass

    with pytest.raises(RuntimeError, match="ours guided no block"):
        end_to_end._timed(flux, nothing, end_to_end.METHODS, 0.0, CPU)


def test_added_time_is_paired_by_round() -> None:
    drift = [1.0, 2.0, 4.0]
    figures = end_to_end.added({"without": drift, "ours": [1.5 * t for t in drift]})
    assert figures["ours"]["added_share"]["median"] == 0.5
    assert figures["ours"]["added_share"]["low"] == figures["ours"]["added_share"]["high"] == 0.5
    assert figures["ours"]["added_seconds"]["median"] == 1.0


def test_a_run_is_added_up_from_its_steps() -> None:
    step = end_to_end.added({"without": [2.0] * 6, "ours": [2.5] * 6})
    run = end_to_end.added_up(step, steps=10, guided_steps=4)
    assert run["without"]["seconds"]["median"] == 20.0 and run["measured"] is False
    assert run["ours"]["added_seconds"]["median"] == 2.0
    assert run["ours"]["added_share"]["median"] == pytest.approx(0.1)
    assert run["ours"]["added_share"]["confidence"] == step["ours"]["added_share"]["confidence"]


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (5, 1), (6, 1), (9, 2), (20, 6), (100, 40)])
def test_interval_of_a_median_has_the_ranks_of_the_sign_test(n: int, rank: int) -> None:
    found = clock.median_interval([float(i) for i in range(n, 0, -1)])
    assert (found["low"], found["high"]) == (rank, n + 1 - rank)
    assert (found["confidence"] >= 0.95) == (n >= 6)
    assert found["median"] == (n + 1) / 2


def test_rehearsal_of_all_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(end_to_end, "MIN_ROUNDS", 1)
    out = tmp_path / "e2e.json"
    options = ["--tiny", "--device", "cpu", "--seconds", "0.01", "--out", str(out)]
    assert end_to_end.main([*options, "--models", "flux", "sdxl", "wan", "embedded"]) == 0
    result = json.loads(out.read_text())
    names = {model["name"].split()[0] for model in result["models"]}
    assert {"FLUX.1-dev", "SDXL", "Wan", "tiny-flux-avatars,"} == names
    for model in result["models"]:
        assert model["step"]["blocks"] > 0 and 0 < model["guided_steps"] < model["steps"]
        assert model["step"]["ours"]["seconds"]["median"] > 0
        assert "added_share" in model["run"]["authors"]
    assert result["models"][-1]["run"]["measured"]
    assert "added to an image" in capsys.readouterr().out


def test_full_size_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_to_end.main(["--device", "cpu", "--models", "flux"]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_a_model_that_cannot_be_built_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **settings: object) -> denoisers.Workload:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setitem(denoisers.WORKLOADS, "flux", fails)
    out = tmp_path / "e2e.json"
    options = ["--tiny", "--device", "cpu", "--models", "flux", "--out", str(out)]
    assert end_to_end.main(options) == 1
    assert json.loads(out.read_text())["skipped"]["flux"].endswith("no memory")


def test_settings_are_the_authors() -> None:
    flux_settings = NegToMeConfig.preset("flux")
    assert (flux_settings.alpha, flux_settings.threshold) == (
        baselines.ALPHA,
        baselines.THRESHOLD,
    )
