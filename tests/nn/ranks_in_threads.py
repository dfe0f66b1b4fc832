"""Ranks as threads of this process: torch's own stand-in for a process group, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.testing._internal.common_distributed import spawn_threads_and_init_comms


def on_ranks(world: int, function: Callable[[int], Any]) -> list[Any]:
    """What `function(rank)` returned on each of `world` ranks; raises what any of them raises."""
    results: list[Any] = [None] * world

    def call(_: None) -> None:
        rank = dist.get_rank()
        results[rank] = function(rank)

    spawn_threads_and_init_comms(call, world_size=world)(None)
    return results
