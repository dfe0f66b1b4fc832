"""Let a layer update copies of its statistics, and decide afterwards what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

Then = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]
"""Given a layer's buffers and the copies of them that it has updated."""


class UpdatingCopies:
    """From now on the layer's training passes update copies of its buffers; `then` is called after each of them.

    Copies, because autograd keeps what the layer updated for the backward pass, and forbids to write to it after.
    """

    def __init__(self, layer: _BatchNorm, then: Then) -> None:
        self._layer, self._then = layer, then
        self._own: dict[str, Tensor] = {}
        self._handles = [
            layer.register_forward_pre_hook(self._before),
            # The last to begin ends first: the copies of one are the buffers of the next.
            layer.register_forward_hook(self._after, always_call=True, prepend=True),
        ]

    def remove(self) -> None:
        """No more."""
        for handle in self._handles:
            handle.remove()
        self._put_back(self._layer)

    def _before(self, layer: _BatchNorm, _: Any) -> None:
        self._put_back(layer)
        if layer.training and layer.track_running_stats:
            self._own.update({key: b for key, b in layer._buffers.items() if b is not None})
            layer._buffers.update({key: b.clone() for key, b in self._own.items()})

    def _after(self, layer: _BatchNorm, _: Any, y: Any) -> None:
        if not self._own:
            return
        own, copies = dict(self._own), {key: layer._buffers[key] for key in self._own}
        self._put_back(layer)
        self._then(own, copies)  # pyright: ignore[reportArgumentType] - a buffer that was there still is

    def _put_back(self, layer: _BatchNorm) -> None:
        """Also what a pass that was interrupted has left: hooks see exceptions, but no Ctrl-C."""
        layer._buffers.update(self._own)
        self._own.clear()
