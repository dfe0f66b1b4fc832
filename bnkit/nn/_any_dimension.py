"""What the layers of this folder that take (N, C, *) of any dimension share."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor

from .._checks import UserError
from ._batch_norm import BatchNorm


class Options(TypedDict, total=False):
    """The keyword-only arguments of every layer; `BatchNorm2d` documents them."""

    bias: bool
    activation: str | None
    skip_nonfinite: bool
    inplace: bool


class AnyDimension(BatchNorm):
    """A `BatchNorm` of (N, C) or (N, C, *)."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Refuse another number of channels. `bnkit.functional.batch_norm` checks the rest."""
        if input.dim() > 1 and input.shape[1] != self.num_features:
            c = self.num_features
            raise UserError(
                f"expected {c} channels, input of shape (N, {c}) or (N, {c}, *), got {tuple(input.shape)}: "
                f"construct the layer with num_features={input.shape[1]}, or move the channels to dimension 1."
            )

    def _recorded(self, input: Any, *arguments: Any, **keywords: Any) -> Any:
        """The call as torch.fx records it, `input` being its proxy."""
        tracer = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *arguments), keywords)
