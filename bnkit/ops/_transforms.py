"""Tensors whose memory does not hold their value, and what `torch.func` transforms cannot do with statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _has_storage
from torch.autograd import forward_ad

from .._checks import UserError


def transforms_active() -> bool:
    """Whether tensors may stand for something else: a batch under `vmap`, a dual number."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def are_transformed(tensors: Sequence[object]) -> bool:
    """Whether a transform that is active has made one of the tensors what it is.

    All of them may be as they were outside: so they are where activation checkpointing repeats a forward pass, in the
    backward pass of a batch of cotangents. A compiler cannot tell.
    """
    if torch.compiler.is_compiling():
        return True
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return any(isinstance(t, Tensor) and (is_wrapped(t) or _is_dual(t)) for t in tensors)


def _is_dual(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_stored(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds its value, where no transform is active.

    Not that of a batch in `autograd.grad(is_grads_batched=True)`, whose `vmap` is not `torch.func`'s, nor of a negated
    view (`z.conj().imag`), nor of forward mode's zeros.
    """
    return _has_storage(tensor) and not tensor.is_neg() and not tensor._is_zerotensor()


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
