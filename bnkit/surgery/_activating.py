"""Group and instance normalization that add a residual and activate, as the batch norms they are made of do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ._remainder import add_and_activate


class Activating(nn.Module):
    """What goes before a norm's class: forward(x, residual) = activation(norm(x) + residual).

    Attributes:
        activation: a name that `bnkit.nn.BatchNorm2d` takes, or None.
    """

    activation: str | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual), of the input's shape."""
        if isinstance(input, fx.Proxy):
            return self._recorded_by_fx(input, residual)
        return add_and_activate(super().forward(input), residual, self.activation)

    def _recorded_by_fx(self, input: Any, residual: Any) -> Any:
        """One call, as torch.fx records the classes of torch.nn."""
        arguments = (input,) if residual is None else (input, residual)
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), arguments, {})

    def extra_repr(self) -> str:
        """torch.nn's, and the activation."""
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"


class GroupNorm(Activating, nn.GroupNorm):
    """`torch.nn.GroupNorm` with an addition and an activation."""


class InstanceNorm1d(Activating, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` with an addition and an activation."""


class InstanceNorm2d(Activating, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` with an addition and an activation."""


class InstanceNorm3d(Activating, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` with an addition and an activation."""
