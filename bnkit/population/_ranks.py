"""The processes that measure together."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from .._checks import require


class Ranks:
    """The processes that measure together; one by itself where `torch.distributed` does not run."""

    def __init__(self, distributed: bool | None, group: dist.ProcessGroup | None) -> None:
        running = dist.is_available() and dist.is_initialized()
        require(running or not distributed, "distributed=True needs a process group: call init_process_group first.")
        self.group = group
        self.size = max(1, dist.get_world_size(group)) if running and distributed is not False else 1
        self.several = self.size > 1

    def agree(self, value: Any, error: BaseException | None = None) -> list[Any]:
        """Each rank's value, in their order.

        Raises:
            RuntimeError: a rank came here with an error, which it raises itself.
        """
        if not self.several:
            return [value]
        states: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(states, (value, None if error is None else repr(error)), group=self.group)
        failed = [f"rank {rank} with {text}" for rank, (_, text) in enumerate(states) if text is not None]
        if failed and error is None:
            raise RuntimeError(f"measuring statistics failed on {', '.join(failed)}; nothing was changed on any rank")
        return [value for value, _ in states]


def gathered(vector: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The vectors of all ranks, one a row, in their order."""
    rows = vector.new_empty(dist.get_world_size(group), len(vector))
    dist.all_gather(list(rows), vector, group=group)
    return rows
