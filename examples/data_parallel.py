"""Images on several processes, all pushed away from one reference, without communication.

    torchrun --nproc-per-node 2 examples/data_parallel.py --images 5
    torchrun --nproc-per-node 2 examples/data_parallel.py --images 5 --accelerate

Every process generates the reference, the image of the first seed, as item 0 of its batch, and its
share of the other images. `--model` takes any diffusers text-to-image pipeline; the default is the
embedded model.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

import negtome_fast as nf
from negtome_fast.pipelines import split_with_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a diffusers model; default: the embedded model")
    parser.add_argument("--prompt", default="a pixel art person")
    parser.add_argument("--images", type=int, default=5, help="number of images in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the reference")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    parser.add_argument("--accelerate", action="store_true", help="let accelerate split the seeds")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()

    seeds = list(range(arguments.seed, arguments.seed + arguments.images))
    if arguments.accelerate:
        from accelerate import PartialState

        state = PartialState(cpu=arguments.cpu)
        rank, device = state.process_index, state.device
        with state.split_between_processes(seeds[1:]) as share:
            own_seeds = [seeds[0], *share]
    else:
        rank = int(os.environ.get("RANK", "0"))
        on_gpu = torch.cuda.is_available() and not arguments.cpu
        local = os.environ.get("LOCAL_RANK", "0")
        device = torch.device(f"cuda:{local}" if on_gpu else "cpu")
        own_seeds = split_with_reference(seeds)

    images = generate(arguments.model, arguments.prompt, own_seeds, arguments.steps, device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    # The reference is the same on all processes; the first one writes it.
    for seed, image in list(zip(own_seeds, images, strict=True))[0 if rank == 0 else 1 :]:
        image.save(arguments.output / f"{seed}.png")


def generate(model: str | None, prompt: str, seeds: list[int], steps: int, device: torch.device):
    """Returns one PIL image per seed; the first is the reference of the others."""
    if model is None:
        from negtome_fast import models

        pipe = models.load_pipeline(device)
        with nf.negtome_guidance(pipe, t_end=0):
            return models.generate(pipe, prompt, seeds, steps=steps, output_type="pil")
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with nf.negtome_guidance(pipe):
        return pipe([prompt] * len(seeds), generator=generators, num_inference_steps=steps).images


if __name__ == "__main__":
    main()
