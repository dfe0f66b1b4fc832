"""Insert: put batch normalization into a trained network without changing what it computes."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as bnkit_nn
from .._checks import UserError, require, unknown
from .._modes import evaluating
from ..graph import Forward, apart, apply, feed, record
from ..moments import Moments, statistics_dtype
from ._calibration import Witness, measure
from ._insert_sites import Site, is_layer, returning_no_tensor, site_of
from ._normed import Normed, NormedLast, normed_like
from ._operation import Operation, check_unwrapped
from ._result import Surgery
from ._verify import check, check_has_values, relative_error, run_changed, tolerance_for
from ._verify_training import difference_in_training, twin_of
from ._weighted import Refused
from ._where import Where, selected

Norm = str | Callable[[int], nn.Module]

_PER_DIMENSION = {"batch": "BatchNorm", "frozen": "FrozenBatchNorm"}
_ANY_DIMENSION = {"ghost": "GhostBatchNorm", "sync": "SyncBatchNorm", "renorm": "BatchRenorm"}


@torch.inference_mode(False)
@torch.random.fork_rng()
def insert(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    example: Any = None,
    where: Where | None = None,
    norm: Norm = "batch",
    tolerance: float | None = None,
    inplace: bool = False,
    forward: Forward | None = None,
) -> Surgery:
    """Put a batch norm behind each convolution and linear layer of a trained network, leaving its outputs as they are.

    The original network runs once over `data` in eval mode; that gives the mean μ and variance σ² of each layer's
    outputs, a channel, over all values, merged exactly from batch to batch. The batch norm behind the layer gets

        running_mean = μ,  running_var = σ²,  weight = √(σ² + eps),  bias = μ,

    so that it is the identity in eval mode, and close to it in training, where each batch has a mean and variance of
    its own. (A batch norm as constructed is not: it would divide by √(1 + eps).)

    The layer becomes a subclass of its class with the batch norm as a child: of `features.0`, `features.0.weight`
    stays and `features.0.bn.weight` is new. Its bias b, which training with batch norm would cancel, is taken up:
    running_mean = μ - b, and `features.0.bias` stays as a buffer of zeros. A `state_dict` of the original network
    still loads, and makes the new one compute what the original did.

    A layer shared by several places gets one batch norm, with the statistics of all. Left alone, with the reason in
    `skipped`: layers that have a norm behind them, that return something else than a tensor, and unless `where` names
    them those that make the output. torch's random generators are left as they were.

    Args:
        model: Any network.
        data: Calibration batches: tensors, (input, label) pairs or dicts; a `DataLoader`; one tensor is one batch. None
            makes the batch norms exact identities with running statistics 0 and 1, and warns that in training the
            network will differ.
        example: An input, where there is no `data`.
        where: Behind which layers: names, shell patterns, types, or a predicate `(name, module) -> bool`.
        norm: `"batch"`, `"ghost"`, `"sync"`, `"frozen"` or `"renorm"`, or a function from the number of channels to a
            layer with running statistics, weight and bias, which moves to the device and type of the statistics.
        tolerance: Largest relative difference of outputs on the first batches, those that fit into 256 MiB; see
            `fold`.
        inplace: Change `model` itself instead of a copy.
        forward: `forward(model, batch)` runs the model in another way.

    Returns:
        The new model in `.model`, in the mode of the one given; the layers changed in `.changed`; in
        `.training_error` how far it is from the original in training mode on the first batch.

    Raises:
        UserError: outputs differ by more than the tolerance, no batches, activations that are not finite, an unknown
            norm or name, or a model that can't be copied. Then nothing was changed.
    """
    batches, first = _first_of(data, example)
    run = forward or (apply if data is None else feed)
    check_unwrapped(model)
    check_has_values(model)
    with Operation(model, inplace=inplace) as operation:
        sites, skipped, output = _look(operation.model, first, run, where)
        original = twin_of(operation.model)
        witness = Witness()
        with torch.random.fork_rng():  # the comparison is to draw the random numbers that the first run drew
            moments = measure(operation.model, sites, batches, run, witness) if batches is not None else {}
            changed = {site.name: _insert_behind(operation, site, norm, moments.get(site.module)) for site in sites}
        error = relative_error(run_changed(operation.model, first, run, "insert"), output)
        error = max(error, witness.largest_error(operation.model, run, "insert"))
        check(error, tolerance_for(output, tolerance), "insert")
        if batches is None and sites:
            warnings.warn(
                "inserted without calibration data: the outputs are the same in eval mode, but will differ in training "
                "mode, where batches have other means and variances than 0 and 1; pass data=.",
                stacklevel=4,  # behind the decorators
            )
        training_error = difference_in_training(twin_of(operation.model), original, first, run)
        return operation.result(changed, skipped, error, training_error)


def _first_of(data: Iterable[Any] | None, example: Any) -> tuple[Iterator[Any] | None, Any]:
    """The batches, and the one to look at."""
    if data is None:
        require(example is not None, "insert needs to run the model: pass calibration batches, or an example=.")
        return None, example
    batches = iter([data] if isinstance(data, (Tensor, Mapping)) else data)
    try:
        first = next(batches)
    except StopIteration:
        raise UserError("insert needs at least one calibration batch, got none: check the loader.") from None
    return itertools.chain([first], batches), apart(first)  # a loader may fill the same tensors again


def _look(
    model: nn.Module, example: Any, forward: Forward, where: Where | None
) -> tuple[list[Site], dict[str, str], Any]:
    """Where norms go, why none goes behind other layers, and the model's output, in eval mode."""
    with evaluating(model), returning_no_tensor(model) as others:
        facts = record(model, example, forward)
    sites, skipped = [], {}
    for module, name in selected(where, facts.names, is_layer).items():
        try:
            if module in others:
                raise Refused("its output is not a tensor")
            sites.append(site_of(module, name, facts, last_too=where is not None))
        except Refused as refusal:
            skipped[name] = str(refusal)
    return sites, skipped, facts.output


def _insert_behind(operation: Operation, site: Site, norm: Norm, moments: Moments | None) -> str:
    layer: Any = site.module
    with evaluating(layer):  # in training mode, spectral norm moves on each time that its weight is looked at
        weight = layer.weight
    bn = _make(norm, site, weight)
    mean, var = _statistics(site, moments, weight)
    bias = layer.bias.detach().double() if site.absorbs else torch.zeros_like(mean)
    with torch.no_grad():
        bn.running_mean.copy_(mean - bias if moments is not None else mean)
        bn.running_var.copy_(var)
        bn.weight.copy_((bn.running_var.double() + bn.eps).sqrt())
        bn.bias.copy_(mean if moments is not None else bias)
    operation.touch(layer)
    if site.absorbs:
        zeros = torch.zeros_like(layer.bias.detach())
        del layer._parameters["bias"]
        layer.register_buffer("bias", zeros)
    layer.bn = bn.train(layer.training)
    layer.__class__ = normed_like(NormedLast if site.linear else Normed, layer)
    taken = ", its bias taken up" if site.absorbs else ""
    return f"{type(bn).__name__}({site.channels}) behind it{taken}"


def _statistics(site: Site, moments: Moments | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    if moments is None:
        zeros = torch.zeros(site.channels, dtype=torch.float64, device=weight.device)
        return zeros, torch.ones_like(zeros)
    require(
        int(moments.count) > 0, f"calibration batches must not be empty, but {site.name} got none: check the loader."
    )
    mean = moments.mean.double() + moments.mean_error.double()
    var = moments.m2.double() / max(int(moments.count) - 1, 1)
    require(
        bool(mean.isfinite().all() and var.isfinite().all()),
        f"activations must be finite to be measured, but those of {site.name} are not: check the calibration batches.",
    )
    return mean, var


def _make(norm: Norm, site: Site, weight: Tensor) -> Any:
    bn: Any = (norm if callable(norm) else _class_of(norm, site))(site.channels)
    require(
        all(isinstance(getattr(bn, key, None), Tensor) for key in ("running_mean", "running_var", "weight", "bias")),
        f"norm must give a layer with running statistics, weight and bias, got {type(bn).__name__}: "
        "pass a function like torch.nn.BatchNorm2d.",
    )
    for parameter in bn.parameters():
        parameter.requires_grad_(parameter.requires_grad and weight.requires_grad)
    return bn.to(weight.device, statistics_dtype(weight.dtype))


def _class_of(norm: str, site: Site) -> Callable[[int], nn.Module]:
    if norm not in _PER_DIMENSION | _ANY_DIMENSION:
        raise unknown("norm", norm, _PER_DIMENSION | _ANY_DIMENSION)
    return getattr(bnkit_nn, _ANY_DIMENSION.get(norm) or f"{_PER_DIMENSION[norm]}{max(site.dims, 1)}d")
