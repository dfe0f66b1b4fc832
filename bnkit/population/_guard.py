"""Keep batches that overflowed out of the running statistics of any batch norm."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ._layers import batch_norms, refuse_compiled, unwrapped


class guard_statistics:
    """From now on, a batch with NaN or infinite statistics leaves the running statistics of `model` as they were.

    For batch norms of torch.nn, timm and others; this package's have `skip_nonfinite=True` for it, which needs no hook.
    Such a batch comes from an overflow in mixed precision, where the gradient scaler skips the step but the running
    statistics are spoilt for good. Mean, variance and count of a layer are updated together or not at all, decided on
    the device without waiting for it. Statistics that are not finite already stay so.

        guard_statistics(model)                 # until the end, or
        with guard_statistics(model): ...       # for a while

    Args:
        model: any model; if compiled, then after this call.

    Raises:
        UserError: the model is compiled already.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_compiled(model, "guard_statistics")
        self._handles: list[RemovableHandle] = []
        for layer in batch_norms(unwrapped(model)).values():
            kept: dict[str, Tensor] = {}
            self._handles.append(layer.register_forward_pre_hook(_Before(kept)))
            self._handles.append(layer.register_forward_hook(_After(kept), always_call=True))

    def remove(self) -> None:
        """Guard no longer."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


class _Before:
    """Let the layer update copies of its statistics.

    Copies, because autograd keeps what the layer updated for the backward pass, and forbids to write to it after.
    """

    def __init__(self, kept: dict[str, Tensor]) -> None:
        self._kept = kept

    def __call__(self, layer: _BatchNorm, _: Any) -> None:
        if layer.training and layer.track_running_stats:
            self._kept.update({key: b for key, b in layer._buffers.items() if b is not None})
            layer._buffers.update({key: b.clone() for key, b in self._kept.items()})


class _After:
    """Take the updated statistics over if they are finite."""

    def __init__(self, kept: dict[str, Tensor]) -> None:
        self._kept = kept

    def __call__(self, layer: _BatchNorm, _: Any, y: Any) -> None:
        if not self._kept:
            return
        new = {key: layer._buffers[key] for key in self._kept}
        layer._buffers.update(self._kept)
        with torch.no_grad():
            finite = torch.stack([b.isfinite().all() for b in new.values() if b is not None]).all()
            for key, old in self._kept.items():
                updated = new[key]
                assert updated is not None
                old.copy_(torch.where(finite, updated, old))
        self._kept.clear()
