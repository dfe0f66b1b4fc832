"""What the layers of this folder that take (N, C, *) of any dimension share."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from ._batch_norm import BatchNorm


class Options(TypedDict, total=False):
    """The keyword-only arguments of every layer; `BatchNorm2d` documents them."""

    bias: bool
    activation: str | None
    skip_nonfinite: bool


class AnyDimension(BatchNorm):
    """A `BatchNorm` of (N, C) or (N, C, *)."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Nothing: `bnkit.functional.batch_norm` checks the shape."""
