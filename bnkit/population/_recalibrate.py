"""Measure the statistics of the population again, with the weights as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._checks import require, unknown
from ..graph import Forward
from ._estimate import Estimator, MeanOfBatches, Moving, Pooled
from ._layers import tracked
from ._passes import Job, check_start, conclude, measure
from ._progress import Progress
from ._ranks import Ranks
from ._result import Recalibration

METHODS: dict[str, Callable[[Mapping[str, _BatchNorm]], Estimator]] = {
    "pooled": Pooled,
    "batch": MeanOfBatches,
    "layerwise": Pooled,
    "moving": Moving,
}


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    method: str = "pooled",
    *,
    forward: Forward | None = None,
    num_batches: int | None = None,
    skip_nonfinite: bool = False,
    distributed: bool | None = None,
    group: dist.ProcessGroup | None = None,
    progress: bool | Progress = False,
) -> Recalibration:
    """Measure the running statistics of a model's batch norms anew, in place; nothing else of the model changes.

    During the passes the model is in eval mode (dropout off, other layers as in inference), except that a batch norm
    being measured normalizes each batch with that batch's own statistics. Methods:

    - `"pooled"`: mean and unbiased variance of all values that enter the layer, merged by count. How the data are cut
      into batches does not matter, but for the batch statistics that earlier layers normalize with. One pass.
    - `"layerwise"`: as pooled, but each layer is measured with all layers before it using their new statistics, so on
      exactly what it will see in inference, whatever the batches. Before means earlier in order of (first) execution.
      L layers take L passes, each of which ends at its layer: about L/2 times the cost of one pass.
      A layer that runs several times depends on itself: all its calls are pooled, normalized by the batch.
    - `"batch"`: Precise BN, the mean over batches of each batch's mean and unbiased variance. One pass.
    - `"moving"`: what training would do: from the statistics there are, by the layer's momentum. One pass.

    A batch norm is left alone if it is a `FrozenBatchNorm`, keeps no statistics, or is in eval mode while the model or
    another batch norm is in training mode. One that never runs keeps its statistics, and is reported. If anything
    fails, the loader included, or on interruption, all statistics are as before. `num_batches_tracked` becomes the
    number of calls measured (for `"moving"`, grows by it).

    A backward pass that is still to come is not affected, where the layers are this package's. torch.nn's keep their
    running statistics for it, so that autograd refuses it ("modified by an inplace operation"): finish it before.

    With `torch.distributed` every rank gives its share of the data, of any size, and gets the statistics of all.

    References:
        Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576, section 3.

    Args:
        model: any model; its batch norms are all subclasses of torch.nn's.
        data: batches: tensors, (input, label) pairs, or dicts of arguments. A single tensor or dict is one batch.
        method: see above.
        forward: `forward(model, batch)`, how to call the model on a batch that is none of these.
        num_batches: how many batches to use; None for all. If there are fewer, the report says so.
        skip_nonfinite: leave out batches in which a layer meets NaN or infinity, instead of refusing them.
        distributed: merge over the ranks; None for whether `torch.distributed` runs with more than one.
        group: ranks to merge over; the default group if None.
        progress: True for a bar, or a function of the batches done and all there are to do (None if unknown).

    Raises:
        UserError: unknown method, statistics of less than 32 bits, data that are not finite, or `"moving"` from
            statistics that are not finite, or over several ranks, where the order of batches is not defined.
        RuntimeError: another rank failed.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    job = Job(model, data, forward, num_batches, skip_nonfinite, Ranks(distributed, group), progress)
    require(
        method != "moving" or not job.ranks.several,
        "method 'moving' depends on the order of batches, which several ranks do not have: use pooled, batch or "
        "layerwise, or distributed=False.",
    )
    if method == "moving":
        check_start(job, "take another method, which does not start from them")
    found = measure(job, METHODS[method], method == "layerwise")
    start = {n: tracked(layer, job.domains[n]) if method == "moving" else 0 for n, layer in job.layers.items()}
    return conclude(job, method, found, {name: start[name] + layer.batches for name, layer in found.items()})
