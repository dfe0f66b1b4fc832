"""What `torch.func` transforms cannot do with running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import UserError


def check_vmap(inputs: Sequence[Tensor | None], statistics: Sequence[Tensor | None], training: bool) -> None:
    """Refuse to update running statistics of which there is one for many batches.

    Raises:
        UserError: under `vmap`, some input is batched and the statistics are not.
    """
    if not training or statistics[0] is None or torch.compiler.is_compiling():
        return
    batched = set().union(*map(_vmap_levels, inputs))
    if any(not batched <= _vmap_levels(statistic) for statistic in statistics):
        raise UserError(
            "vmap gives each sample or model its own batch, but there is only one running_mean and running_var to "
            "update: map over the statistics too (torch.func.stack_module_state), or keep none "
            "(track_running_stats=False, or torch.func.replace_all_batch_norm_modules_), or call eval()."
        )


def _vmap_levels(tensor: Tensor | None) -> set[int]:
    """The nested `vmap`s, by level, over which the tensor is batched."""
    functorch, levels = torch._C._functorch, set()  # pyright: ignore[reportAttributeAccessIssue]
    while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            levels.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return levels
