"""Changes to a pipeline before, during and after guidance; tiny FLUX and SDXL."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from helpers.pipelines_fixtures import flux_pipeline, generate, sdxl_pipeline
from negtome_fast.config import NegToMeConfig
from negtome_fast.pipelines import apply_negtome, negtome_guidance, remove_negtome

ALWAYS = NegToMeConfig(threshold=0.1, t_end=0)
PLACEMENTS = ("output", "pre_projection")
Change = Callable[[Any], Any]


def run(pipe: Any, images: int = 3, **arguments: Any) -> Tensor:
    return generate(pipe, images, **{"size": (32, 48), **arguments})


@functools.cache
def plain() -> Tensor:
    return run(flux_pipeline())


@functools.cache
def guided(placement: Any = "output") -> Tensor:
    pipe = flux_pipeline()
    with negtome_guidance(pipe, ALWAYS, placement=placement):
        return run(pipe)


def traces(model: nn.Module) -> list[str]:
    """Traces of an applied guidance: hooks, and modules with an instance attribute `forward`."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return [
        f"{name}: {kind}"
        for name, module in model.named_modules()
        for kind in (*kinds, "forward")
        if module.__dict__.get(kind)
    ]


def assert_guided(images: Tensor, before: Tensor) -> None:
    """The first image is the reference and as it was; the others are not."""
    assert torch.equal(images[0], before[0])
    assert all(
        not torch.equal(one, other) for one, other in zip(images[1:], before[1:], strict=True)
    )


LORA_TARGETS = ("to_q", "to_v", "to_out.0")


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(LORA_TARGETS):
            down = torch.randn(4, module.in_features, generator=random) / 4
            up = torch.randn(module.out_features, 4, generator=random) / 4
            weights |= {
                f"transformer.{name}.lora_{k}.weight": w for k, w in (("A", down), ("B", up))
            }
    return weights


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_lora_may_be_loaded_fused_and_unloaded_before_and_after(placement: Any) -> None:
    pytest.importorskip("peft", reason='the extra "dev" is not installed')
    weights = lora_weights(flux_pipeline().transformer)
    before = flux_pipeline()
    before.load_lora_weights(dict(weights))
    with_lora = run(before)
    assert not torch.equal(with_lora, plain())
    with negtome_guidance(before, ALWAYS, placement=placement):
        expected = run(before)
    assert_guided(expected, with_lora)
    assert torch.equal(run(before), with_lora)
    before.fuse_lora()
    with negtome_guidance(before, ALWAYS, placement=placement):
        torch.testing.assert_close(run(before), expected)

    after = flux_pipeline()
    handle = apply_negtome(after, ALWAYS, placement=placement)
    assert torch.equal(run(after), guided(placement))
    after.load_lora_weights(dict(weights))
    assert torch.equal(run(after), expected)
    after.fuse_lora()
    torch.testing.assert_close(run(after), expected)
    after.unfuse_lora()
    torch.testing.assert_close(run(after), expected)
    after.unload_lora_weights()
    torch.testing.assert_close(run(after), guided(placement))
    assert {row.calls for row in handle.summary().rows} == {2 * 5}
    remove_negtome(after)
    assert traces(after.transformer) == []
    torch.testing.assert_close(run(after), plain())


def with_default_processors(pipe: Any) -> None:
    attention = pipe.transformer.transformer_blocks[0].attn
    pipe.transformer.set_attn_processor(type(attention.processor)())


def offloaded_by_accelerate(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason='the extra "diffusers" is not installed')
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))


def offloaded_in_groups(pipe: Any, kind: str) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
    )


CHANGES: dict[str, Change] = {
    "fused projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "attention processors": with_default_processors,
    "attention backend": lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "accelerate offload": offloaded_by_accelerate,
    "leaf offload": lambda pipe: offloaded_in_groups(pipe, "leaf_level"),
    "block offload": lambda pipe: offloaded_in_groups(pipe, "block_level"),
    "layerwise casting": lambda pipe: pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    ),
    "gradient checkpointing": lambda pipe: pipe.transformer.enable_gradient_checkpointing(),
    "channels last": lambda pipe: pipe.transformer.to(memory_format=torch.channels_last),
}
EXACT = ("attention processors", "offload", "gradient", "channels")
"""Changes that leave every bit of the computation as it was."""


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_before_or_after_is_the_same(
    change: str, placement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Switching the attention of one model switches it for all that say nothing.
    registry = _AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", AttentionBackendName.NATIVE)
    before, after = flux_pipeline(), flux_pipeline()
    CHANGES[change](before)
    unguided = run(before)
    if any(word in change for word in EXACT):
        assert torch.equal(unguided, plain())
    with negtome_guidance(before, ALWAYS, placement=placement):
        expected = run(before)
    assert_guided(expected, unguided)
    assert torch.equal(run(before), unguided)

    handle = apply_negtome(after, ALWAYS, placement=placement)
    CHANGES[change](after)
    assert torch.equal(run(after), expected)
    handle.remove()
    assert torch.equal(run(after), unguided)
    if change == "fused projections":
        after.transformer.unfuse_qkv_projections()
        with negtome_guidance(after, ALWAYS, placement=placement):
            assert torch.equal(run(after), guided(placement))


def quantized_by_torch(model: nn.Module) -> nn.Module:
    """A copy, whose linear layers are replaced by modules that take their hooks over."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def quantized_by_torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("quantized", [quantized_by_torch, quantized_by_torchao])
def test_quantized_layers_are_guided(
    quantized: Callable[[nn.Module], nn.Module], placement: Any
) -> None:
    before, after = flux_pipeline(), flux_pipeline()
    before.transformer = quantized(before.transformer)
    unguided = run(before)
    assert not torch.equal(unguided, plain())
    with negtome_guidance(before, ALWAYS, placement=placement):
        expected = run(before)
    # Torch scales the activations of a whole batch alike, so its reference moves with the others.
    reference_stays = quantized is quantized_by_torchao
    assert torch.equal(expected[0], unguided[0]) == reference_stays
    assert all(not torch.equal(expected[i], unguided[i]) for i in (1, 2))
    assert torch.equal(run(before), unguided)

    apply_negtome(after, ALWAYS, placement=placement)
    assert torch.equal(run(after), guided(placement))
    after.transformer = quantized(after.transformer)
    assert torch.equal(run(after), expected)
    remove_negtome(after)
    assert traces(after.transformer) == []
    assert torch.equal(run(after), unguided)


def test_gradient_checkpointing_is_refused_where_it_would_compute_without_guidance() -> None:
    """The backward pass computes the blocks again when the step is long over."""
    pipe = flux_pipeline()
    pipe.transformer.enable_gradient_checkpointing()
    latents = torch.randn(2, 6, 16, requires_grad=True)
    rows, columns = torch.meshgrid(torch.arange(2.0), torch.arange(3.0), indexing="ij")
    arguments = {
        "hidden_states": latents,
        "encoder_hidden_states": torch.ones(2, 5, 16),
        "pooled_projections": torch.zeros(2, 16),
        "img_ids": torch.stack([torch.zeros(6), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(5, 3),
    }
    with negtome_guidance(pipe, threshold=0.1, t_end=500):
        with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
            pipe.transformer(timestep=torch.ones(2), **arguments)
        pipe.transformer(timestep=torch.zeros(2), **arguments).sample.sum().backward()
        assert latents.grad is not None
        pipe.transformer.disable_gradient_checkpointing()
        pipe.transformer(timestep=torch.ones(2), **arguments).sample.sum().backward()
        with torch.no_grad():
            pipe.transformer.enable_gradient_checkpointing()
            pipe.transformer(timestep=torch.ones(2), **arguments)


def test_inference_mode_may_be_entered_and_left() -> None:
    pipe = flux_pipeline()
    with negtome_guidance(pipe, ALWAYS, dropout=0.5):
        expected = run(pipe)
        with torch.inference_mode():
            assert torch.equal(run(pipe), expected)
        assert torch.equal(run(pipe), expected)


def test_a_callback_may_change_the_latents() -> None:
    def halve(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        return {"latents": tensors["latents"] / 2}

    pipe = flux_pipeline()
    unguided = run(pipe, callback_on_step_end=halve)
    with negtome_guidance(pipe, ALWAYS) as handle:
        assert_guided(run(pipe, callback_on_step_end=halve), unguided)
    assert handle.summary().guided == 2


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_the_scheduler_may_be_exchanged_between_calls(scheduler: Any) -> None:
    """Heun's calls the model twice in most steps, with the same timestep."""
    pipe, other = sdxl_pipeline(), sdxl_pipeline()
    other.scheduler = scheduler.from_config(other.scheduler.config)
    unguided = run(other, steps=4, cfg=True)
    window = {"t_end": 500, "dropout": 0.5, "blocks": "up_blocks"}
    with negtome_guidance(other, ALWAYS, **window):
        expected = run(other, steps=4, cfg=True)
    assert_guided(expected, unguided)
    with negtome_guidance(pipe, ALWAYS, **window) as handle:
        run(pipe, steps=4, cfg=True)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        handle.reset()
        assert torch.equal(run(pipe, steps=4, cfg=True), expected)
    inside = sum(t >= 500 for t in pipe.scheduler.timesteps.tolist())
    assert (handle.summary().guided, handle.summary().groups) == (inside, 2)


def test_batch_and_size_may_change_between_calls() -> None:
    pipe = flux_pipeline()
    calls = [(3, (32, 48)), (2, (64, 32)), (4, (64, 32)), (2, (48, 32)), (3, (32, 48))]
    with negtome_guidance(pipe, ALWAYS):
        together = [run(pipe, images, size=size) for images, size in calls]
    for (images, size), result in zip(calls, together, strict=True):
        with negtome_guidance(pipe, ALWAYS):
            assert torch.equal(run(pipe, images, size=size), result)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["callback", "block"])
def test_what_interrupts_a_run_does_not_reach_the_next(
    where: str, error: type[BaseException]
) -> None:
    def fail(*_: Any) -> None:
        raise error("stop")

    pipe = flux_pipeline()
    arguments = {"callback_on_step_end": fail} if where == "callback" else {}
    attention = pipe.transformer.transformer_blocks[1].attn
    hooks = [attention.to_q.register_forward_hook(fail)] if where == "block" else []
    with negtome_guidance(pipe, ALWAYS, dropout=0.5):
        expected = None if hooks else run(pipe)
        with pytest.raises(error, match="stop"):
            run(pipe, **arguments)
        for hook in hooks:
            hook.remove()
        again = run(pipe)
        assert_guided(again, plain())
        assert expected is None or torch.equal(again, expected)
    with pytest.raises(error, match="stop"), negtome_guidance(pipe, ALWAYS):
        run(pipe, callback_on_step_end=fail)
    assert traces(pipe.transformer) == []
    assert torch.equal(run(pipe), plain())


def test_a_copy_of_the_model_alone_is_guided_and_released_by_itself() -> None:
    pipe, other = flux_pipeline(), flux_pipeline()
    apply_negtome(pipe, ALWAYS, placement="pre_projection")
    run(pipe)
    other.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(run(other), guided("pre_projection"))
    remove_negtome(other)
    assert traces(other.transformer) == []
    assert torch.equal(run(other), plain())
    assert torch.equal(run(pipe), guided("pre_projection"))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_guided_pipeline_is_saved_as_an_unguided_one(tmp_path: Path, placement: Any) -> None:
    pipe = flux_pipeline()
    apply_negtome(pipe, ALWAYS, placement=placement)
    run(pipe)
    pipe.save_pretrained(tmp_path)
    absent = dict.fromkeys(name for name, part in pipe.components.items() if part is None)
    loaded = FluxPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    weights, own = loaded.transformer.state_dict(), flux_pipeline().transformer.state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[name], own[name]) for name in own)
    assert torch.equal(run(loaded), plain())
    assert torch.equal(run(pipe), guided(placement))


def sharing_pipeline(pipe: Any) -> Any:
    """Another pipeline with the same transformer and another scheduler."""
    other = flux_pipeline()
    other.transformer = pipe.transformer
    other.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return other


def test_pipelines_that_share_a_transformer_share_its_guidance() -> None:
    pipe = flux_pipeline()
    other = sharing_pipeline(pipe)
    apply_negtome(pipe, ALWAYS)
    assert torch.equal(run(other), guided()) and torch.equal(run(pipe), guided())
    with pytest.raises(ValueError, match="already applied"):
        apply_negtome(other, ALWAYS)
    remove_negtome(other)
    assert traces(pipe.transformer) == []
    assert torch.equal(run(pipe), plain())


def run_at_once(*jobs: Callable[[], Tensor]) -> list[Tensor]:
    """Each in its thread; what one raises is raised here."""
    results: dict[int, Any] = {}

    def work(number: int, job: Callable[[], Tensor]) -> None:
        try:
            results[number] = job()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=item) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[number] for number in range(len(jobs))]


@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_threads_do_not_get_in_each_others_way(shared: bool, placement: Any) -> None:
    """They wait for each other inside of every forward, so that their steps do overlap."""
    calls: list[dict[str, Any]] = [{"size": (32, 48)}, {"size": (48, 64), "images": 2}]
    settings: dict[str, Any] = {"placement": placement, "dropout": 0.5}
    pipe = flux_pipeline()
    with negtome_guidance(pipe, ALWAYS, **settings):
        expected = [run(pipe, **arguments) for arguments in calls]

    other = sharing_pipeline(pipe) if shared else flux_pipeline()
    models = {id(one.transformer): one for one in (pipe, other)}
    handles = [apply_negtome(one, ALWAYS, **settings) for one in models.values()]
    barrier = threading.Barrier(2, timeout=50)

    def meet(*_: Any) -> None:
        barrier.wait()

    hooks = [
        block.register_forward_pre_hook(meet)
        for one in models.values()
        for block in one.transformer.transformer_blocks
    ]
    pipes = (pipe, other)
    jobs = [
        functools.partial(run, one, **arguments)
        for one, arguments in zip(pipes, calls, strict=True)
    ]
    results = run_at_once(*jobs)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    tokens = sum(handle.summary().rows[0].tokens for handle in handles)
    assert tokens == 2 * (2 * 2 * 3) + 2 * (1 * 3 * 4)
    for handle in handles:
        handle.remove()
    assert traces(pipe.transformer) == traces(other.transformer) == []


def test_settings_change_while_applied_and_between_the_steps_of_a_run() -> None:
    pipe = flux_pipeline()

    def fresh(**settings: Any) -> Tensor:
        with negtome_guidance(pipe, ALWAYS, **settings):
            return run(pipe)

    changes: list[dict[str, Any]] = [
        {"alpha": 0.3},
        {"alpha": 0.3, "threshold": 0.5},
        {"alpha": 0.3, "threshold": 0.5, "steps": (0.5, 1.0)},
        {"placement": "pre_projection", "reference": "others"},
        {"blocks": "single_transformer_blocks.1", "exclude_blocks": ()},
    ]
    expected = [fresh(**change) for change in changes]
    with negtome_guidance(pipe, ALWAYS) as handle:
        run(pipe)
        for change, result in zip(changes, expected, strict=True):
            handle.update(ALWAYS, **change)
            assert torch.equal(run(pipe), result)
        assert handle.blocks == ("single_transformer_blocks.1.attn",)
        assert handle.summary().forwards == 2 * 6
        for wrong in ({"strength": 1}, {"blocks": "nowhere"}, {"threshold": 3}):
            with pytest.raises(ValueError):
                handle.update(**wrong)
        assert torch.equal(run(pipe), expected[-1])

        def switch_off(*_: Any) -> Any:
            handle.update(alpha=0.0)
            return {}

        handle.update(ALWAYS)
        both = run(pipe, callback_on_step_end=switch_off)
    assert torch.equal(both, fresh(steps=(0.0, 0.5)))
    assert traces(pipe.transformer) == []
    with pytest.raises(RuntimeError, match="removed"):
        handle.update(alpha=0.5)
    with (
        negtome_guidance(pipe.transformer, ALWAYS) as bare,
        pytest.raises(ValueError, match="pass the pipeline"),
    ):
        bare.update(steps=(0.0, 0.5))
