"""Keep batches that overflowed out of the running statistics of any batch norm."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from ._copies import UpdatingCopies
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
        layers = batch_norms(unwrapped(model)).values()
        self._handles = [UpdatingCopies(layer, _take_over_if_finite) for layer in layers]

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


@torch.no_grad()
def _take_over_if_finite(own: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> None:
    finite = torch.stack([copy.isfinite().all() for copy in copies.values()]).all()
    for key, old in own.items():
        old.copy_(torch.where(finite, copies[key], old))
