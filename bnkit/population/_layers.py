"""Which batch norms of a model keep statistics that can be measured, and which don't and why."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer

from .._checks import UserError
from ..nn import DomainBatchNorm, FrozenBatchNorm, RecurrentBatchNorm, use_domain


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself inside `torch.compile`'s wrapper and those that spread it over devices.

    Their forward passes do more than the model's: DistributedDataParallel's synchronizes buffers, so a rank with more
    batches than another would wait for ever.
    """
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            return model


def refuse_compiled(model: nn.Module, what: str) -> None:
    """Raise unless every part of the model runs as Python, where hooks added now have an effect."""
    compiled = [
        name or "the model"
        for name, module in model.named_modules()
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
    ]
    if compiled:
        raise UserError(
            f"{what} works through hooks, which compiled code does not see, and {compiled[0]} is compiled: "
            "call it on the model before compiling, or compile the parts without batch norm."
        )


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch norm of `model` by its (first) name, those of torch.nn, of this package and subclasses of them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


Domain = int | str | None
"""One of those that a layer keeps statistics for; None for a layer without, or for the current one."""


def domains_of(layer: _BatchNorm) -> tuple[Domain, ...]:
    """The domains of a layer, (None,) if it has none."""
    return layer.domains if isinstance(layer, DomainBatchNorm) else (None,)


def domain_of(layer: _BatchNorm) -> Domain:
    """The layer's current domain."""
    return layer.domain if isinstance(layer, DomainBatchNorm) else None


def buffers_of(layer: _BatchNorm, domain: Domain = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layer's running mean, variance and count of batches: its own tensors, or views of them."""
    with contextlib.nullcontext() if domain is None else use_domain(layer, domain):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        return layer.running_mean, layer.running_var, layer.num_batches_tracked


def statistics_of(layer: _BatchNorm, domain: Domain = None) -> tuple[Tensor, Tensor]:
    """The layer's running mean and variance."""
    return buffers_of(layer, domain)[:2]


def tracked(layer: _BatchNorm, domain: Domain = None) -> int:
    """How many batches went into the layer's statistics; 0 where it does not count."""
    count = buffers_of(layer, domain)[2]
    return 0 if count is None else int(count)


def measurable(model: nn.Module) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
    """The batch norms to measure, and the reason to leave each of the others alone.

    A batch norm in eval mode is frozen if the model is in training mode, or another batch norm is. In a model that is
    in eval mode throughout, none is frozen for that.

    Raises:
        UserError: statistics of less than 32 bits, or not made yet; a scripted or exported model.
    """
    layers = batch_norms(model)
    if not layers:
        _check_modules(model)
    some_train = model.training or any(layer.training for layer in layers.values())
    reasons = {name: _reason_to_leave(layer, some_train) for name, layer in layers.items()}
    chosen = {name: layer for name, layer in layers.items() if reasons[name] is None}
    _check_precision(chosen)
    return chosen, {name: reason for name, reason in reasons.items() if reason is not None}


def _check_modules(model: nn.Module) -> None:
    """Raise if batch norms are operators without a module, as in scripted and exported models."""
    nodes = model.graph.nodes if isinstance(model, torch.fx.GraphModule) else ()
    operators = [node for node in nodes if node.op == "call_function" and "batch_norm" in str(node.target)]
    if operators or isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            "statistics are measured in batch norm modules, and a scripted or exported model has none: measure in the "
            "model that it was made from, and make it again."
        )


def _reason_to_leave(layer: _BatchNorm, some_train: bool) -> str | None:
    if isinstance(layer, FrozenBatchNorm):
        return f"frozen: a {type(layer).__name__}"
    if layer.running_mean is None or layer.running_var is None:
        return "keeps no running statistics"
    if isinstance(layer, RecurrentBatchNorm):
        return "keeps statistics for each time step, which only training measures"
    if some_train and not layer.training:
        return "frozen: in eval mode while others train"
    return None


def refuse_lazy(layers: Mapping[str, _BatchNorm]) -> None:
    """Raise unless every layer has been through its first forward pass, which makes its statistics."""
    for name, layer in layers.items():
        if isinstance(layer.running_mean, UninitializedBuffer):
            raise UserError(f"{name or 'the model'} has no statistics yet: run the model once in eval mode first.")


def _check_precision(layers: Mapping[str, _BatchNorm]) -> None:
    refuse_lazy(layers)
    for name, layer in layers.items():
        for buffer in statistics_of(layer):
            if torch.finfo(buffer.dtype).bits < 32:
                raise UserError(
                    f"running statistics must be float32 or float64, those of {name or 'the model'} are "
                    f"{str(buffer.dtype).removeprefix('torch.')}: call .float() on the batch norms "
                    "(the model's other layers may stay as they are under autocast), or model.float()."
                )
