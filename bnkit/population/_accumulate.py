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
from ._copies import UpdatingCopies
from ._estimate import Pooled
from ._kernel import moments_of
from ._layers import Domain, buffers_of, domains_of, measurable, refuse_compiled, tracked, unwrapped
from ._measure import Reading, domain_of_call, entering, finite
from ._result import Update, write


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

    Layers in eval mode and frozen ones are left alone, and passes inside `preserve_statistics` do not count;
    recomputation by activation checkpointing counts once. A `DomainBatchNorm` updates each domain that it saw; a
    `RecurrentBatchNorm`, which has statistics for each time step, is left to update with each micro-batch. If an
    exception ends it, no statistics change. Each process measures its own share.

    `SyncBatchNorm` merges over its ranks, at the end; other layers measure what their own process sees.

    Args:
        model: any model that is not compiled.

    Raises:
        UserError: the model is compiled, or has statistics of less than 32 bits.
    """
    refuse_compiled(model, "accumulation")
    layers = {name: layer for name, layer in measurable(unwrapped(model))[0].items() if layer.training}
    pools = {(name, domain): Pooled({name: layers[name]}) for name in layers for domain in domains_of(layers[name])}
    with hooked(_hooks(layers, pools)):
        yield
    updates = [_updated(name, layers[name], domain, pool) for (name, domain), pool in pools.items()]
    write([update for update in updates if update is not None])


def _hooks(layers: Mapping[str, _BatchNorm], pools: Mapping[tuple[str, Domain], Pooled]) -> Iterator[Any]:
    for name, layer in layers.items():

        def take_in(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            recomputed = torch._C._current_graph_task_id() != -1  # by activation checkpointing, in the backward pass
            if recomputed or not (layer.training and layer.track_running_stats):
                return
            x, samples = entering(layer, args, kwargs)
            with torch.no_grad():
                moments = moments_of(x)
            if not getattr(layer, "skip_nonfinite", False) or finite(moments):
                pools[name, domain_of_call(layer, kwargs)].add([Reading(name, moments, samples)])

        yield layer.register_forward_pre_hook(take_in, with_kwargs=True)
        yield UpdatingCopies(layer, lambda own, copies: None)


def _updated(name: str, layer: _BatchNorm, domain: Domain, pool: Pooled) -> Update | None:
    """What the layer's statistics and count are after one update with the pool; None if that holds no variance."""
    if isinstance(layer, (nn.SyncBatchNorm, SyncBatchNorm)) and dist.is_initialized():
        pool.all_reduce(layer.process_group)
    new = pool.found()[name].after
    if new is None:
        return None
    buffers = buffers_of(layer, domain)
    count = tracked(layer, domain) + 1
    momentum = 1 / count if layer.momentum is None else layer.momentum
    mean, var = (old.to(batch).lerp(batch, momentum) for old, batch in zip(buffers[:2], new, strict=True))
    return buffers, (mean, var), count
