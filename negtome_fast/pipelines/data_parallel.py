"""Data parallelism: each process generates its share of the images, and the same reference."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

from .parallel import even_sizes

Item = TypeVar("Item")

_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"))
"""Variables of the environment with the rank and the number of processes, and their defaults."""


def split_with_reference(
    items: Sequence[Item], rank: int | None = None, num_processes: int | None = None
) -> list[Item]:
    """Returns the reference, `items[0]`, and this process's share of the other items.

    Every process generates the same reference as item 0 of its batch, from the same seed and
    prompt. Guidance never modifies it, so all images are pushed away from the same reference
    without any communication. Keep the first image of process 0 only.

    ```python
    seeds = split_with_reference(range(9))       # of 2 processes: 0, 1, 2, 3, 4 and 0, 5, 6, 7, 8
    ```

    Args:
        items: one for each image, such as its seed, or a pair of prompt and seed.
        rank, num_processes: rank of this process and number of processes. None takes them from
            `torch.distributed` if it is initialized, else from the variables RANK and WORLD_SIZE
            that `torchrun` and `accelerate launch` set, else there is one process.

    Returns:
        `items[0]` and a contiguous part of `items[1:]`, as even as possible, longer parts first.

    Raises:
        ValueError: there are no items, or the rank is not in [0, num_processes).
    """
    if rank is None or num_processes is None:
        if dist.is_available() and dist.is_initialized():
            own, processes = dist.get_rank(), dist.get_world_size()
        else:
            own, processes = (int(os.environ.get(name, d)) for name, d in _ENVIRONMENT)
        rank = own if rank is None else rank
        num_processes = processes if num_processes is None else num_processes
    if not 0 <= rank < num_processes:
        raise ValueError(f"rank {rank} is not one of {num_processes} processes")
    if not items:
        raise ValueError("there must be at least one item, the reference")
    sizes = even_sizes(len(items) - 1, num_processes)
    start = 1 + sum(sizes[:rank])
    return [items[0], *items[start : start + sizes[rank]]]
