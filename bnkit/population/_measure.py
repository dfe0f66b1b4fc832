"""One pass over data that reads the moments of what enters each batch norm."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

from .._checks import UserError
from .._modes import evaluating
from ..graph import Forward, feed
from ..moments import Moments
from ..nn import DomainBatchNorm, MaskedBatchNorm
from ._kernel import does_as_known, moments_of, normalized
from ._layers import Domain, domain_of, statistics_of

Statistics = tuple[Tensor, Tensor]
"""Mean and variance, each (C,)."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What entered one call of one layer."""

    layer: str
    moments: Moments
    samples: int


Policy = Callable[[Reading], Statistics | None]
"""What a layer normalizes with in a call, by what enters it; None for its running statistics."""


class _AllMeasured(BaseException):
    """Ends a forward pass that has nothing more to tell. Not an Exception, so that no model takes it for an error."""


def batch_statistics(reading: Reading) -> Statistics | None:
    """The policy of training: each batch is normalized with its own mean and biased variance.

    One value a channel can't be: it is normalized with the running statistics.
    """
    moments = reading.moments
    return (moments.mean, moments.variance()) if moments.count > 1 else None


class Probe:
    """Reads what enters the layers during forward passes, and lets them normalize as a policy says.

    All modules are in eval mode meanwhile: dropout is off, and no layer updates anything by itself. The layers' buffers
    are never written to: copies stand in their place while a layer normalizes with other statistics.

    Args:
        model: the model.
        layers: batch norms of the model to read, by name.
        forward: how to call the model on a batch.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, _BatchNorm], forward: Forward | None) -> None:
        self._model, self._layers, self._forward = model, layers, forward
        self._domains = {name: domain_of(layer) for name, layer in layers.items()}
        self._known = {name for name, layer in layers.items() if does_as_known(layer)}
        self._readings: list[Reading] = []
        self._policy: Policy = batch_statistics
        self._last: str | None = None
        self._calls: dict[str, int] = {}
        self._form: Any = None
        self._each_once: dict[Any, bool] = {None: False}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The layers are read from, gradients and compiled code are off; everything comes back in the end."""
        before = [(layer, vars(layer).get("forward"), dict(layer._buffers)) for layer in self._layers.values()]
        with evaluating(self._model), torch.no_grad():
            try:
                for name, layer in self._layers.items():
                    # Instead of hooks: whatever hooks the layer has run as ever, and it costs a third of the time.
                    vars(layer)["forward"] = functools.partial(self._call, name, layer.forward)
                with torch.compiler.set_stance("force_eager"):  # compiled code would go on calling what it knows
                    yield
            finally:
                for layer, forward, own in before:
                    layer._buffers.update(own)
                    vars(layer).pop("forward", None)
                    if forward is not None:
                        vars(layer)["forward"] = forward

    def read(self, batch: Any, policy: Policy, until: str | None = None) -> list[Reading]:
        """The readings of one forward pass, in the order of execution.

        It ends at the last layer, which is known once passes over batches of the same form have run each layer once.

        Args:
            batch: what the loader gave.
            policy: what the layers normalize with.
            until: end at the last call of this layer already.
        """
        self._readings, self._policy, self._last = [], policy, until
        self._form = _form(batch)
        try:
            feed(self._model, batch, self._forward)
            counts = collections.Counter(reading.layer for reading in self._readings)
            self._calls = {name: max(counts[name], self._calls.get(name, 0)) for name in self._layers}
            once = all(counts[name] == 1 for name in self._layers)
            self._each_once[self._form] = once and self._each_once.get(self._form, True)
        except _AllMeasured:
            pass
        return self._readings

    def _call(self, name: str, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """In the place of a layer's forward pass."""
        layer = self._layers[name]
        if domain_of_call(layer, kwargs) != self._domains[name]:
            return forward(*args, **kwargs)
        x, samples = entering(layer, args, kwargs)
        at_once = self._policy is batch_statistics and name in self._known
        y, moments = (at_once and normalized(layer, *args, **kwargs)) or (None, moments_of(x))
        reading = Reading(name, moments, samples)
        self._readings.append(reading)
        if self._nothing_left():
            raise _AllMeasured
        if y is not None:
            return y
        with _using(layer, self._domains[name], self._policy(reading)):
            return forward(*args, **kwargs)

    def _nothing_left(self) -> bool:
        if self._last is not None:
            calls = self._calls.get(self._last, 0)
            seen = [reading.layer for reading in self._readings]
            return seen[-1] == self._last and seen.count(self._last) >= calls > 0
        if not self._each_once.get(self._form) or len(self._readings) < len(self._layers):
            return False
        return len({reading.layer for reading in self._readings}) == len(self._layers)


def _form(batch: Any) -> Any:
    """What of a batch decides how often layers run: a sequence of another length may go through one more often.

    None for a batch of anything but tensors, which may say so in another way.
    """
    leaves, spec = tree_flatten(batch)
    return (spec, *(leaf.shape for leaf in leaves)) if all(isinstance(leaf, Tensor) for leaf in leaves) else None


@contextlib.contextmanager
def _using(layer: _BatchNorm, domain: Domain, statistics: Statistics | None) -> Iterator[None]:
    """The layer normalizes with these statistics, or copies of its own, whatever it does to them."""
    own = dict(layer._buffers)
    try:
        layer._buffers.update({key: None if b is None else b.clone() for key, b in own.items()})
        if statistics is not None:
            for buffer, values in zip(statistics_of(layer, domain), statistics, strict=True):
                buffer.copy_(values)
        yield
    finally:
        layer._buffers.update(own)


def domain_of_call(layer: _BatchNorm, kwargs: Mapping[str, Any]) -> Domain:
    """Whose statistics a call of the layer uses."""
    domain = kwargs.get("domain") if isinstance(layer, DomainBatchNorm) else None
    return domain_of(layer) if domain is None else domain


def entering(layer: _BatchNorm, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, int]:
    """The values that count in a call of the layer, (N, C) or (N, C, *), and how many samples have some."""
    first = next(iter((*args, *kwargs.values())))  # timm calls it x
    input = kwargs.get("input", first)
    if isinstance(layer, MaskedBatchNorm):
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        if mask is not None:
            mask = mask.squeeze(1) if mask.dim() == input.dim() else mask
            mask = mask.expand(input.shape[0], *input.shape[2:])
            return input.movedim(1, -1)[mask], int(mask.unsqueeze(1).flatten(1).any(1).sum())
    return input, input.shape[0] if input.numel() else 0


def finite(moments: Moments) -> bool:
    """Whether all of them are finite; waits for the device."""
    return bool((moments.mean + moments.m2).isfinite().all())


def check_finite(readings: Iterable[Reading], skip: bool) -> bool:
    """Whether the moments of a forward pass are all finite.

    Raises:
        UserError: one is not, and it is not to be skipped.
    """
    readings = list(readings)
    if not readings:
        return True
    device = readings[0].moments.mean.device
    values = [values.to(device) for r in readings for values in (r.moments.mean, r.moments.m2)]
    if torch.cat(values).isfinite().all():
        return True
    if skip:
        return False
    culprit = next(r.layer for r in readings if not finite(r.moments))
    raise UserError(
        f"the input of {culprit or 'the model'} must be finite, got NaN or infinity, and nothing was changed: "
        "look at the data, or leave such batches out with skip_nonfinite=True."
    )
