"""Make the running statistics of all ranks those of their data together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._checks import require
from ..moments import merged
from ..nn import DomainBatchNorm
from ._layers import batch_norms, unwrapped
from ._ranks import gathered


@torch.no_grad()
def reduce_statistics(model: nn.Module, group: dist.ProcessGroup | None = None, *, weight: float | None = None) -> None:
    """Merge the running statistics of `model`'s batch norms over the ranks, in place, before evaluating or saving it.

    With plain batch norm under DistributedDataParallel, each rank keeps statistics of its own shard, and after the
    last step they differ. With wᵣ the weight of rank r,

        mean = Σ wᵣ meanᵣ / Σ wᵣ        var = Σ wᵣ (varᵣ + (meanᵣ - mean)²) / Σ wᵣ

    which are those of the ranks' data together: where shards differ, it shows in the variance. (timm's `distribute_bn`
    takes the mean of the variances.) Every rank has the same bits afterwards; a layer on which all ranks weigh nothing
    stays as it is, and `num_batches_tracked` becomes the largest of the ranks'.

    One collective for the whole model, whatever its size, on any backend. Buffers are written once it is complete: if a
    rank dies in it, the others have theirs unchanged. Without `torch.distributed` this does nothing. Every rank has to
    call it, with the same model.

    Args:
        model: also inside DistributedDataParallel.
        group: the ranks that take part; None for all.
        weight: this rank's, such as the number of samples it has seen, alike for all layers; None for each layer's
            `num_batches_tracked`, or 1 if it doesn't count.

    Raises:
        ValueError: a negative weight.
        RuntimeError: what `torch.distributed` raises if a rank is gone.
    """
    require(weight is None or weight >= 0, f"weight must not be negative, got {weight}: pass the samples seen, say.")
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    statistics = [found for layer in batch_norms(unwrapped(model)).values() if (found := _statistics(layer))]
    if not statistics:
        return
    mine = [_rows(*found, weight).flatten() for found in statistics]
    device = mine[0].device
    everyone = gathered(torch.cat([part.to(device) for part in mine]), group)
    for found, parts in zip(statistics, everyone.split([len(part) for part in mine], dim=1), strict=True):
        _write(*found, parts.to(found[0].device))


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """A layer's means and variances, (K, C), and counts, (K,): views. K is 1, unless the layer keeps several sets."""
    if isinstance(layer, DomainBatchNorm):
        means, variances, counts = (
            getattr(layer, name, None) for name in ("running_means", "running_vars", "batches_tracked")
        )
    else:
        means, variances, counts = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if means is None or variances is None:
        return None
    channels = means.shape[-1]
    return means.view(-1, channels), variances.view(-1, channels), None if counts is None else counts.view(-1)


def _rows(means: Tensor, variances: Tensor, counts: Tensor | None, weight: float | None) -> Tensor:
    """What a rank sends of a layer: for each set its count, and its moments as `merged` takes them."""
    tracked = means.new_ones(len(means)) if counts is None else counts
    shares = (tracked if weight is None else torch.full_like(means[:, 0], weight)).double()[:, None]
    return torch.cat([tracked.double()[:, None], shares, means.double(), shares * variances.double()], dim=1)


def _write(means: Tensor, variances: Tensor, counts: Tensor | None, parts: Tensor) -> None:
    """Merge what the ranks sent of a layer, (R, K · (2 + 2 C)), into its statistics."""
    for k, part in enumerate(parts.view(len(parts), len(means), -1).unbind(1)):
        total, mean, m2 = merged(part[:, 1:])
        for old, new in ((means[k], mean), (variances[k], m2 / total)):
            old.copy_(torch.where(total > 0, new, old))
        if counts is not None:
            counts[k] = part[:, 0].max()
