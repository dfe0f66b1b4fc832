"""One pass over data that reads the moments of what enters each batch norm."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._checks import UserError
from .._modes import evaluating, hooked
from ..graph import Forward, feed
from ..moments import Moments
from ..nn import DomainBatchNorm, MaskedBatchNorm
from ._kernel import does_as_known, moments_of, normalized
from ._layers import statistics_of

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

    All modules are in eval mode meanwhile: dropout is off, and no layer updates anything by itself. Copies stand in the
    place of the layers' buffers, which are never written to.

    Args:
        model: the model.
        layers: batch norms of the model to read, by name.
        forward: how to call the model on a batch.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, _BatchNorm], forward: Forward | None) -> None:
        self._model, self._layers, self._forward = model, layers, forward
        self._own = {name: statistics_of(layer) for name, layer in layers.items()}
        self._readings: list[Reading] = []
        self._policy: Policy = batch_statistics
        self._last: str | None = None
        self._calls: dict[str, int] = {}
        self._outputs: dict[str, Tensor] = {}
        self._others: set[str] = set()  # layers that now use other statistics than their own

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on, gradients and compiled code off; everything comes back in the end."""
        buffers = [(layer, dict(layer._buffers)) for layer in self._layers.values()]
        replaced = [name for name, layer in self._layers.items() if does_as_known(layer)]
        with evaluating(self._model), hooked(self._hooks()), torch.no_grad():
            try:
                for layer, own in buffers:
                    layer._buffers.update({key: None if b is None else b.clone() for key, b in own.items()})
                for name in replaced:
                    self._layers[name].forward = functools.partial(self._known_or, name, self._layers[name].forward)
                with torch.compiler.set_stance("force_eager"):  # compiled code does not know of hooks added later
                    yield
            finally:
                for layer, own in buffers:
                    layer._buffers.update(own)
                for name in replaced:
                    vars(self._layers[name]).pop("forward", None)

    def read(self, batch: Any, policy: Policy, until: str | None = None) -> list[Reading]:
        """The readings of one forward pass, in the order of execution.

        It ends at the last layer, which is known once some pass has shown that no layer runs twice.

        Args:
            batch: what the loader gave.
            policy: what the layers normalize with.
            until: end at the last call of this layer already.
        """
        self._readings, self._policy, self._last = [], policy, until
        self._outputs.clear()
        counts: dict[str, int] = {}
        try:
            feed(self._model, batch, self._forward)
            for reading in self._readings:
                counts[reading.layer] = counts.get(reading.layer, 0) + 1
            self._calls = {name: max(counts.get(name, 0), self._calls.get(name, 0)) for name in self._layers}
        except _AllMeasured:
            pass
        return self._readings

    def _hooks(self) -> Iterator[Any]:
        for name, layer in self._layers.items():
            yield layer.register_forward_pre_hook(lambda _, a, k, name=name: self._before(name, a, k), with_kwargs=True)
            yield layer.register_forward_hook(lambda *_, name=name: self._after(name))

    def _before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = entering(self._layers[name], args, kwargs)
        if x is None:
            return
        y, moments = self._at_once(name, args, kwargs) or (None, moments_of(x))
        self._readings.append(Reading(name, moments, x.shape[0]))
        if self._nothing_left():
            raise _AllMeasured
        if y is not None:
            self._outputs[name] = y
            return
        statistics = self._policy(self._readings[-1])
        if statistics is not None:
            self._let_use(name, statistics)
            self._others.add(name)

    def _after(self, name: str) -> None:
        if name in self._others:
            self._let_use(name, self._own[name])
            self._others.remove(name)

    def _at_once(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Moments] | None:
        """The layer's output and the moments, where one reading of the input by the kernel gives both."""
        layer = self._layers[name]
        if self._policy is not batch_statistics or not isinstance(vars(layer).get("forward"), functools.partial):
            return None
        return normalized(layer, *args, **kwargs)

    def _known_or(self, name: str, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output if it is known already, else what its own forward pass gives."""
        y = self._outputs.pop(name, None)
        return forward(*args, **kwargs) if y is None else y

    def _nothing_left(self) -> bool:
        if not self._calls:
            return False
        seen = [reading.layer for reading in self._readings]
        if self._last is not None:
            return seen[-1] == self._last and seen.count(self._last) >= self._calls[self._last] > 0
        return all(calls == 1 for calls in self._calls.values()) and len(set(seen)) == len(self._layers)

    def _let_use(self, name: str, statistics: Statistics) -> None:
        for buffer, values in zip(statistics_of(self._layers[name]), statistics, strict=True):
            buffer.copy_(values)


def entering(layer: _BatchNorm, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The values that count in a call of the layer, (N, C) or (N, C, *); None if they are another domain's."""
    input, *others = (*args, *kwargs.values())  # the first is the input, also by keyword
    if isinstance(layer, DomainBatchNorm) and kwargs.get("domain") not in (None, layer.domain):
        return None
    if isinstance(layer, MaskedBatchNorm):
        mask = kwargs.get("mask", others[0] if len(args) > 1 else None)
        if mask is not None:
            mask = mask.squeeze(1) if mask.dim() == input.dim() else mask
            return input.movedim(1, -1)[mask.expand(input.shape[0], *input.shape[2:])]
    return input


def finite(moments: Moments) -> bool:
    """Whether all of them are finite; waits for the device."""
    return bool((moments.mean + moments.m2).isfinite().all())


def check_finite(readings: Iterable[Reading], skip: bool) -> bool:
    """Whether the moments of a forward pass are all finite.

    Raises:
        UserError: one is not, and it is not to be skipped.
    """
    readings = list(readings)
    if not readings or torch.cat([r.moments.mean + r.moments.m2 for r in readings]).isfinite().all():
        return True
    if skip:
        return False
    culprit = next(r.layer for r in readings if not finite(r.moments))
    raise UserError(
        f"the input of {culprit or 'the model'} must be finite, got NaN or infinity, and nothing was changed: "
        "look at the data, or leave such batches out with skip_nonfinite=True."
    )
