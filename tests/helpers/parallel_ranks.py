"""Runs functions on several gloo processes; and the functions that tests run there."""

from __future__ import annotations

import functools
import inspect
import io
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxPipeline, FluxTransformer2DModel
from diffusers.hooks import context_parallel
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import (
    ContextParallelInput,
    ContextParallelOutput,
    ParallelConfig,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from helpers.cases import lazily_negated
from helpers.pipelines_fixtures import flux_pipeline
from negtome_fast.functional import guide_tokens
from negtome_fast.pipelines import (
    ImageTokens,
    Layout,
    apply_negtome,
    layouts,
    negtome_guidance,
)
from negtome_fast.pipelines.parallel import TokenShards

TIMEOUT = 300.0
_SLOW = [
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
]


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Returns `function(*arguments)` of each rank of a gloo group of `ranks` processes.

    Raises:
        RuntimeError: a rank raised (the message has its traceback) or the time ran out.
    """
    context = multiprocessing.get_context("forkserver")
    # Slow imports are made once, in the process that the ranks are forked from.
    context.set_forkserver_preload(["torch.distributed.fsdp", "negtome_fast.pipelines", *_SLOW])
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(
                target=_run, args=(rank, ranks, folder, pipe[1], function, arguments), daemon=True
            )
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes])
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(receivers: list[Any]) -> list[Any]:
    deadline, results = time.monotonic() + TIMEOUT, {}
    while len(results) < len(receivers):
        for rank, receiver in enumerate(receivers):
            if rank not in results and receiver.poll(0.02):
                try:
                    problem, results[rank] = receiver.recv()
                except EOFError:
                    problem = "it ended without an answer"
                if problem:
                    raise RuntimeError(f"rank {rank}: {problem}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"only ranks {sorted(results)} answered in {TIMEOUT:g} s")
    ordered = (io.BytesIO(results[rank]) for rank in range(len(receivers)))
    return [torch.load(result, weights_only=False) for result in ordered]


def _run(
    rank: int,
    ranks: int,
    folder: str,
    sender: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(folder) / 'store'}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=TIMEOUT / 2),
        )
        result = function(*arguments)
        dist.barrier()
        # As bytes: tensors would be fetched from this process, which ends.
        buffer = io.BytesIO()
        torch.save(result, buffer)
        sender.send((None, buffer.getvalue()))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    finally:
        sender.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def every(cases: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Runs all cases in one start of the processes, because that takes longer than the cases."""
    return {name: _outcome(case) for name, case in cases.items()}


def _outcome(case: Callable[[], Any]) -> Any:
    try:
        return case()
    except Exception:
        return Failure(traceback.format_exc())


class Failure(str):
    """The traceback of a case that raised."""


def guide_part(
    x: Tensor,
    *,
    stream: int | None = None,
    weight: Tensor | None = None,
    negated: bool = False,
    **arguments: Any,
) -> tuple[Tensor, ...]:
    """`TokenShards.guide_tokens` on this rank's part of the tokens, `negated` as a lazy view.

    With `weight`, the gradient of its product with the result takes the place of the similarity.
    """
    assert dist.group.WORLD is not None
    shards = TokenShards(dist.group.WORLD, ImageTokens(stream or x.shape[1], x.shape[1]))
    own = x[:, shards.own].clone()
    if negated:
        own = lazily_negated(own)
    if "seed" in arguments:
        arguments["generator"] = torch.Generator().manual_seed(arguments.pop("seed"))
    if weight is None:
        return shards.guide_tokens(own, **arguments)
    own.requires_grad_()
    guided, _, pushed = shards.guide_tokens(own, **arguments)
    (guided * weight[:, shards.own]).sum().backward()
    return guided.detach(), own.grad, pushed


def guide_alone(
    x: Tensor,
    *,
    stream: int | None = None,
    weight: Tensor | None = None,
    negated: bool = False,
    **arguments: Any,
) -> tuple[Tensor, ...]:
    """The same in one process, without a lazy view."""
    if "seed" in arguments:
        arguments["generator"] = torch.Generator().manual_seed(arguments.pop("seed"))
    x = x.clone()
    if weight is None:
        return guide_tokens(x, **arguments)
    x.requires_grad_()
    guided, _, pushed = guide_tokens(x, **arguments)
    (guided * weight).sum().backward()
    return guided.detach(), x.grad, pushed


def flux(text: int = 8, heads: int = 4) -> tuple[FluxPipeline, Callable[..., Tensor]]:
    """A tiny FLUX whose heads divide by four, and what generates three images with it."""
    pipe = flux_pipeline()
    torch.manual_seed(0)
    settings = {**pipe.transformer.config, "num_attention_heads": heads}
    pipe.transformer = FluxTransformer2DModel.from_config(settings).eval()
    random = torch.Generator().manual_seed(3)
    embeds = torch.randn(1, text, 16, generator=random)
    pooled = torch.randn(1, 16, generator=random)

    def generate(images: int = 4, size: tuple[int, int] = (64, 96), cfg: bool = False) -> Tensor:
        negative = {
            "negative_prompt_embeds": -embeds.repeat(images, 1, 1),
            "negative_pooled_prompt_embeds": -pooled.repeat(images, 1),
            "true_cfg_scale": 3.0,
        }
        with torch.no_grad():
            latents: Tensor = pipe(
                prompt_embeds=embeds.repeat(images, 1, 1),
                pooled_prompt_embeds=pooled.repeat(images, 1),
                height=size[0],
                width=size[1],
                num_inference_steps=2,
                guidance_scale=1.0,
                generator=[torch.Generator().manual_seed(image) for image in range(images)],
                output_type="latent",
                **(negative if cfg else {}),
            ).images
        return latents

    return pipe, generate


def enable_context_parallel(model: Any, plan: Any = None, **settings: Any) -> None:
    """diffusers' own context parallelism on this group, and what it lacks on the CPU with gloo."""
    names = ("ring", "ulysses")
    shape = tuple(settings.get(f"{name}_degree", 1) for name in names)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    _make_it_run_on_the_cpu()
    config = ContextParallelConfig(mesh=mesh, **settings)
    model.enable_parallelism(config=config, cp_plan=plan)


@functools.cache
def _make_it_run_on_the_cpu() -> None:
    # It divides by the number of accelerators.
    torch.accelerator.device_count = lambda: 1
    # Its native attention has no log-sum-exp, by which a ring combines the parts.
    attention_dispatch._native_attention_forward_op = _with_log_sum_exp(
        attention_dispatch._native_attention_forward_op
    )
    # Gloo gathers tensors of one size only.
    context_parallel._all_gather_anything = _gather_of_any_size


def _with_log_sum_exp(attention: Callable[..., Tensor]) -> Callable[..., Any]:
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
    ) -> Any:
        arguments = inspect.signature(attention).bind(ctx, query, key, value, *rest, **options)
        wanted = arguments.arguments.pop("return_lse", False)
        output = attention(**arguments.arguments)
        if not wanted:
            return output
        scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * query.shape[-1] ** -0.5
        return output, scores.logsumexp(dim=-1)

    return forward


def _gather_of_any_size(tensor: Tensor, dim: int, group: Any) -> Tensor:
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, tensor, group=group)
    return torch.cat(parts, dim=dim)


def guided_flux(
    parallel: dict[str, Any] | None,
    text: int = 8,
    call: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Latents of a context-parallel FLUX without, with and again without guidance, and summary.

    Args:
        parallel: of `ContextParallelConfig`; None runs in one process.
        text: tokens of the caption.
        call: arguments of `generate`.
        settings: of the guidance.
    """
    pipe, generate = flux(text)
    if parallel:
        enable_context_parallel(pipe.transformer, **parallel)
    run = functools.partial(generate, **(call or {}))
    before = run()
    with negtome_guidance(pipe, threshold=0.2, t_end=0, **settings) as handle:
        guided = run()
    summary = handle.summary().to_dict()
    return {"before": before, "guided": guided, "after": run(), "summary": summary}


def edited_flux(parallel: dict[str, Any] | None) -> Tensor:
    """Returns the prediction of a FLUX for 24 generated tokens and 24 of an input image."""
    model = flux()[0].transformer
    if parallel:
        enable_context_parallel(model, **parallel)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    own = torch.stack([torch.zeros(24), rows.flatten(), columns.flatten()], dim=1)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad(), negtome_guidance(model, threshold=0.2, t_end=0) as handle:
        predicted: Tensor = model(
            hidden_states=torch.randn(3, 48, 16, generator=random),
            timestep=torch.ones(3),
            encoder_hidden_states=torch.randn(1, 8, 16, generator=random).expand(3, -1, -1),
            pooled_projections=torch.zeros(3, 16),
            img_ids=torch.cat([own, own + torch.tensor([1.0, 0.0, 0.0])]),
            txt_ids=torch.zeros(8, 3),
            return_dict=False,
        )[0]
    assert [row.tokens for row in handle.summary().rows] == [48] * 4
    return predicted


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_out = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.to_out[0](hidden_states)
        return output


class Gathering(nn.Module):
    """Each of its attention modules splits the tokens and gathers them again."""

    _parallel_config: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return hidden_states


def gathering(parallel: bool, placement: str) -> Tensor:
    """Returns the output of `Gathering` for three items of 10 tokens."""
    count = ImageTokens(10, 10)
    layout = Layout(image_tokens=lambda model, arguments: count)
    torch.manual_seed(0)
    model, x = Gathering(), torch.randn(3, 10, 8)
    if parallel:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
        config = ContextParallelConfig(ulysses_degree=2, mesh=mesh)
        model._parallel_config = ParallelConfig(context_parallel_config=config)
        model._parallel_config.setup(dist.get_rank(), 2, torch.device("cpu"), mesh=mesh)
        plan = {
            "blocks.*": {"hidden_states": ContextParallelInput(split_dim=1)},
            "blocks.0": ContextParallelOutput(gather_dim=1),
            "blocks.1": ContextParallelOutput(gather_dim=1),
        }
        context_parallel.apply_context_parallel(model, config, plan)
    settings = {"threshold": 0.1, "t_end": 0, "placement": placement}
    # One process of the tests runs this too, and must know no more families afterwards.
    known = mock.patch.dict(layouts._LAYOUTS, {"Gathering": layout})
    with known, torch.no_grad(), negtome_guidance(model, **settings) as handle:
        guided: Tensor = model(x, timestep=torch.tensor(1000.0))
    assert [row.tokens for row in handle.summary().rows] == [20, 20]
    return guided


def unknown_places() -> str:
    """The error of a FLUX whose image is split and whose text is not."""
    pipe, generate = flux()
    plan = {key: value for key, value in pipe.transformer._cp_plan.items() if key}
    plan[""] = {
        name: split
        for name, split in pipe.transformer._cp_plan[""].items()
        if name in ("hidden_states", "img_ids")
    }
    enable_context_parallel(pipe.transformer, plan, ulysses_degree=2)
    return error_of(lambda: _guided(pipe, generate))


def tensor_parallel() -> tuple[str, int]:
    """The error of a FLUX with a projection whose channels are sharded, and the hooks it leaves."""
    pipe, _ = flux()
    mesh = init_device_mesh("cpu", (2,))
    styles = {"transformer_blocks.0.attn.to_q": ColwiseParallel()}
    parallelize_module(pipe.transformer, mesh, styles)

    def hooks() -> int:
        modules = list(pipe.transformer.modules())
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before = hooks()
    error = error_of(lambda: apply_negtome(pipe))
    return error, hooks() - before


def fully_sharded() -> Tensor:
    """Guided latents of a FLUX whose parameters are distributed, and gathered where needed."""
    pipe, generate = flux()
    mesh = init_device_mesh("cpu", (2,))
    model = pipe.transformer
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _guided(pipe, generate)


def _guided(pipe: Any, generate: Callable[..., Tensor]) -> Tensor:
    with negtome_guidance(pipe, threshold=0.2, t_end=0):
        return generate()


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


def family(name: str, parallel: dict[str, Any] | None) -> dict[str, Any]:
    """As `guided_flux`, for an entry of the table of families."""
    from helpers.families import FAMILIES

    entry = FAMILIES[name]
    pipe = entry.build()
    if parallel:
        enable_context_parallel(pipe.transformer, **parallel)

    def run() -> Tensor:
        with torch.no_grad():
            return entry.generate(pipe, 3, seed=0)

    before = run()
    with negtome_guidance(pipe, threshold=0.1, t_end=0) as handle:
        guided = run()
    summary = handle.summary().to_dict()
    return {"before": before, "guided": guided, "after": run(), "summary": summary}
