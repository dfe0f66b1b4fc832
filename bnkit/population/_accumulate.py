"""One update of the running statistics for several micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._modes import hooked
from ..nn import SyncBatchNorm
from ._estimate import Pooled
from ._kernel import moments_of
from ._layers import measurable, refuse_compiled, statistics_of, tracked, unwrapped
from ._measure import Reading, Statistics, entering, finite
from ._preserve import preserve_statistics
from ._result import write


@contextlib.contextmanager
def accumulation(model: nn.Module) -> Iterator[None]:
    """The forward passes inside update the running statistics once, at the end, as one batch of all of them would.

        running = (1 - momentum) · running + momentum · (mean and unbiased variance of all micro-batches together)

    With gradient accumulation over k micro-batches, plain batch norms update k times, each with the noise of a
    micro-batch, so that `momentum` means another thing than without. Here the moments of the micro-batches are merged
    exactly, whatever their sizes. (What each micro-batch is normalized with in training remains its own statistics: the
    others are not there yet.) `num_batches_tracked` grows by one.

        with bnkit.population.accumulation(model):
            for x, y in micro_batches:
                (loss(model(x), y) / len(micro_batches)).backward()
        optimizer.step()

    Layers in eval mode and frozen ones are left alone; recomputation by activation checkpointing counts once. If an
    exception ends it, no statistics change. Each process measures its own share.

    `SyncBatchNorm` merges over its ranks, at the end; other layers measure what their own process sees.

    Args:
        model: any model that is not compiled.

    Raises:
        UserError: the model is compiled, or has statistics of less than 32 bits.
    """
    refuse_compiled(model, "accumulation")
    inner = unwrapped(model)
    layers = {name: layer for name, layer in measurable(inner)[0].items() if layer.training}
    pools = {name: Pooled({name: layer}) for name, layer in layers.items()}
    with preserve_statistics(inner), hooked(_hooks(layers, pools)):
        yield
    updates = {layer: _updated(name, layer, pools[name]) for name, layer in layers.items()}
    write({layer: update for layer, update in updates.items() if update is not None})


def _hooks(layers: Mapping[str, _BatchNorm], pools: Mapping[str, Pooled]) -> Iterator[Any]:
    for name, layer in layers.items():

        def take_in(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            recomputed = torch._C._current_graph_task_id() != -1  # by activation checkpointing, in the backward pass
            if not layer.training or recomputed:
                return
            x = entering(layer, args, kwargs)
            if x is None:
                return
            with torch.no_grad():
                moments = moments_of(x)
            if not getattr(layer, "skip_nonfinite", False) or finite(moments):
                pools[name].add([Reading(name, moments, x.shape[0])])

        yield layer.register_forward_pre_hook(take_in, with_kwargs=True)


def _updated(name: str, layer: _BatchNorm, pool: Pooled) -> tuple[Statistics, int] | None:
    """The layer's running statistics and count after one update with the pool; None if that holds no variance."""
    if isinstance(layer, (nn.SyncBatchNorm, SyncBatchNorm)) and dist.is_initialized():
        pool.all_reduce(layer.process_group)
    new = pool.found()[name].after
    if new is None:
        return None
    count = tracked(layer) + 1
    momentum = 1 / count if layer.momentum is None else layer.momentum
    mean, var = (old.to(batch).lerp(batch, momentum) for old, batch in zip(statistics_of(layer), new, strict=True))
    return (mean, var), count
