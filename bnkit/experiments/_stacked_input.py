"""The first matrix of a stack of networks, for dense inputs and for lists of lit pixels.

Notation and the sign of gradients are those of `_stacked_mlp.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._lit_pixels import Lists, LitPixels


@dataclass(frozen=True)
class Inputs:
    """How the stack's inputs come.

    Args:
        scale: what every input is multiplied by, such as 1/255 for pixels that come as they are stored.
        used: the columns of the networks' inputs that training examples are given in, all others being zero in every
            one of them; None for all columns.
        lit: they are 0 or 1 before the scale and come as lists, `LitPixels` to train on and `Lists` to evaluate.
    """

    scale: float = 1.0
    used: Tensor | None = None
    lit: bool = False

    def layer(self, nets: Sequence[Sequence[nn.Linear]]) -> Input:
        """The layer that takes them."""
        return LitInput(nets, self) if self.lit else DenseInput(nets, self)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T for matrices."""
    # MKL keeps to AVX2 on AMD processors; oneDNN uses AVX-512 there and is 1.2 to 1.7 times as fast at these sizes.
    if _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Input:
    """The first matrix, one product a seed because each seed has its own batch."""

    weights: Sequence[Tensor]

    def __init__(self, nets: Sequence[Sequence[nn.Linear]], inputs: Inputs) -> None:
        self.configurations, self.seeds, self.width = len(nets), len(nets[0]), nets[0][0].out_features
        self.scale = inputs.scale

    def bind(self, batch: int) -> Tensor:
        """Allocate and return the output, (B, R·H)."""
        out = self.weights[0].new_empty(batch, self.configurations, self.seeds, self.width)
        self.outs = out.unbind(2)
        return out.flatten(1)

    def bind_delta(self, delta: Tensor) -> None:
        """Take where the gradient of the output will be, (B, R·H)."""
        self.deltas = delta.view(len(delta), self.configurations, self.seeds, -1).unbind(2)

    def forward(self, x: Sequence) -> None:
        """The seeds' inputs → the output."""
        for out, rows, weight in zip(self.outs, x, self.weights, strict=True):
            torch.mul(self._product(rows, weight).view_as(out), self.scale, out=out)

    def update(self, x: Sequence) -> None:
        """Add the gradient step."""
        for delta, rows, weight in zip(self.deltas, x, self.weights, strict=True):
            weight.add_(self._gradient(delta.flatten(1), rows), alpha=self.scale)

    def _product(self, rows, weight: Tensor) -> Tensor:
        """One seed's inputs → (B, K·H)."""
        raise NotImplementedError

    def _gradient(self, delta: Tensor, rows) -> Tensor:
        """One seed's gradient (B, K·H) → that of the weight."""
        raise NotImplementedError

    def _by_net(self, out: Tensor) -> Tensor:
        """(N, S·K·H), as the weights of all seeds give it, → (N, R·H)."""
        return out.view(len(out), self.seeds, self.configurations, -1).transpose(1, 2).flatten(1)

    def weights_of_nets(self) -> Tensor:
        """(K, S, H, F), as `nn.Linear` keeps them."""
        raise NotImplementedError

    def frozen(self) -> Callable:
        """The layer as it is now: inputs that are the same for every network → (N, R·H)."""
        raise NotImplementedError


class DenseInput(Input):
    """On (B, F) inputs, with weights (K·H, F).

    Inputs that are zero in every training example have no part in training; their weights are kept aside.
    """

    def __init__(self, nets: Sequence[Sequence[nn.Linear]], inputs: Inputs) -> None:
        super().__init__(nets, inputs)
        self.all_weights = _by_seed(nets)
        self.used = slice(None) if inputs.used is None else inputs.used
        self.weights = self.all_weights[:, :, self.used].clone().unbind()

    def _product(self, rows: Tensor, weight: Tensor) -> Tensor:
        return linear(rows, weight)

    def _gradient(self, delta: Tensor, rows: Tensor) -> Tensor:
        return linear(delta.T, rows.T)

    def _full_weights(self) -> Tensor:
        full = self.all_weights.clone()
        full[:, :, self.used] = torch.stack(list(self.weights))
        return full

    def weights_of_nets(self) -> Tensor:
        return self._full_weights().unflatten(1, (self.configurations, -1)).transpose(0, 1)

    def frozen(self) -> Callable[[Tensor], Tensor]:
        weight = self._full_weights().flatten(0, 1)
        return lambda x: self._by_net(linear(x.to(weight.dtype), weight).mul_(self.scale))


class LitInput(Input):
    """On lists of lit pixels, with weights (F, K·H) so that a pixel's lie in one row."""

    def __init__(self, nets: Sequence[Sequence[nn.Linear]], inputs: Inputs) -> None:
        super().__init__(nets, inputs)
        self.weights = _by_seed(nets).mT.contiguous().unbind()

    def _product(self, rows: LitPixels, weight: Tensor) -> Tensor:
        return rows.by_image.sums(weight)

    def _gradient(self, delta: Tensor, rows: LitPixels) -> Tensor:
        return rows.by_pixel.sums(delta)

    def weights_of_nets(self) -> Tensor:
        return torch.stack(list(self.weights)).mT.unflatten(1, (self.configurations, -1)).transpose(0, 1)

    def frozen(self) -> Callable[[Lists], Tensor]:
        weight = torch.cat(list(self.weights), 1)
        return lambda x: self._by_net(x.sums(weight).mul_(self.scale))


def _by_seed(nets: Sequence[Sequence[nn.Linear]]) -> Tensor:
    """(S, K·H, F)."""
    by_seed = zip(*nets, strict=True)
    return torch.stack([torch.cat([layer.weight.detach() for layer in row]) for row in by_seed])
