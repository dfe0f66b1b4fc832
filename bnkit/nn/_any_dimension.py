"""What the layers of this folder that take (N, C, *) of any dimension share."""

from __future__ import annotations

from typing import Any, TypedDict

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

    def _recorded(self, input: Any, *arguments: Any, **keywords: Any) -> Any:
        """The call as torch.fx records it, `input` being its proxy."""
        tracer = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *arguments), keywords)
