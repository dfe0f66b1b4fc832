"""A stack's layers behind the first: forward, closed-form backward and gradient step, on memory bound once.

Notation and the sign of gradients are those of `_stacked_mlp.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Without the lookups through torch.ops, which cost as much as some of these kernels.
native_batch_norm = torch.ops.aten.native_batch_norm.out
native_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
softmax = torch.ops.aten._softmax.out

NORM_STATE = ("weight", "bias", "running_mean", "running_var")


class Dense:
    """A matrix for each network, (R, H', H)."""

    def __init__(self, nets: Sequence[Sequence[nn.Linear]]) -> None:
        self.shape = (len(nets), len(nets[0]))
        self.weight = torch.stack([linear.weight.detach() for row in nets for linear in row])
        self.weight_t = self.weight.mT

    def bind(self, h: Tensor) -> Tensor:
        """Take the input, (B, R·H); allocate its gradient, (R, B, H); allocate and return the output, (B, R·H')."""
        out = h.new_empty(len(h), len(self.weight) * self.weight.shape[1])
        self.h, self.out = self.by_net(h), self.by_net(out)
        self.dh = torch.empty_like(self.h, memory_format=torch.contiguous_format)
        return out

    def bind_delta(self, delta: Tensor) -> None:
        """Take where the gradient of the output will be, (B, R·H')."""
        self.delta = self.by_net(delta)
        self.delta_t = self.delta.mT

    def by_net(self, tensor: Tensor) -> Tensor:
        """(B, R·H) → (R, B, H), a view."""
        return tensor.view(len(tensor), len(self.weight), -1).transpose(0, 1)

    def forward(self) -> None:
        """The input → the output."""
        # Into a view, bmm would take twice what this copy does.
        self.out.copy_(torch.bmm(self.h, self.weight_t))

    def backward(self) -> None:
        """The gradient of the output → that of the input, and the gradient step."""
        torch.bmm(self.delta, self.weight, out=self.dh)
        self.weight.baddbmm_(self.delta_t, self.h)

    def frozen(self) -> Callable[[Tensor], Tensor]:
        """The layer as it is now: (N, R·H) → (N, R·H')."""
        weight_t = self.weight.clone().mT
        return lambda h: torch.bmm(self.by_net(h), weight_t).transpose(0, 1).flatten(1)

    def weights_of_nets(self) -> Tensor:
        """(K, S, H', H), as `nn.Linear` keeps them."""
        return self.weight.unflatten(0, self.shape)


class Output(Dense):
    """The last matrix, its bias and the softmax.

    Logits lie as (R, classes, B): along rows of ten, a softmax takes five times as long.
    """

    def __init__(self, nets: Sequence[Sequence[nn.Linear]], learning_rates: Sequence[float]) -> None:
        super().__init__(nets)
        self.bias = torch.stack([linear.bias.detach() for row in nets for linear in row])
        self.rates = self.bias.new_tensor(learning_rates).view(-1, 1, 1, 1)

    def bind(self, h: Tensor) -> Tensor:
        """Take the input, (B, R·H); allocate its gradient, (R, B, H); allocate and return the logits."""
        self.h = self.by_net(h)
        self.dh = torch.empty_like(self.h, memory_format=torch.contiguous_format)
        self.h_t = self.h.mT
        self.logits = h.new_empty(*self.bias.shape, len(h))
        self.delta_t = torch.empty_like(self.logits)
        self.delta = self.delta_t.mT
        self.delta_of_nets = self.delta_t.unflatten(0, self.shape)
        self.bias_column = self.bias.unsqueeze(-1)
        self.minus_rates = -self.rates / len(h)
        return self.logits

    def forward(self) -> None:
        """The input → the logits."""
        torch.bmm(self.weight, self.h_t, out=self.logits).add_(self.bias_column)

    def differentiate(self, target: Tensor) -> None:
        """The gradient of the mean cross-entropy with the one-hot `target`, (S, B, classes), times minus the rates."""
        softmax(self.logits, 1, False, out=self.delta_t)
        self.delta_of_nets.sub_(target.mT).mul_(self.minus_rates)
        self.bias_column.add_(self.delta_t.sum(2, keepdim=True))

    def frozen(self) -> Callable[[Tensor], Tensor]:
        """The layer as it is now: (N, R·H) → (N, K, S, classes)."""
        product, bias = super().frozen(), self.bias.clone().unflatten(0, self.shape)
        return lambda h: product(h).view(len(h), *self.shape, -1).add_(bias)


class Hidden:
    """sigmoid(a + β) in the first `plain` columns, sigmoid(batch_norm(a)) in the others.

    The kernels run over all columns, because a slice would cost them more than the columns that are overwritten; so
    the gradient of a plain column's bias comes with that of β, and its γ and running statistics mean nothing.
    """

    def __init__(self, linears: Sequence[nn.Linear], norms: Sequence[_BatchNorm | None]) -> None:
        self.plain = sum(linear.out_features for linear, norm in zip(linears, norms, strict=True) if norm is None)
        columns = zip(*(_columns(linear, norm) for linear, norm in zip(linears, norms, strict=True)), strict=True)
        self.gamma, self.beta, self.mean, self.var = map(torch.cat, columns)
        norm = norms[-1]
        self.momentum, self.eps = (0.0, 1.0) if norm is None else (norm.momentum, norm.eps)
        self.normalized = self.plain < len(self.beta)

    def bind(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Take the input, (B, R·H); allocate and return the output and the gradient of the input."""
        self.a = a
        self.h, self.dz, self.da = (torch.empty_like(a) for _ in range(3))
        self.a_plain, self.h_plain, self.da_plain, self.dz_plain = (
            tensor[:, : self.plain] for tensor in (a, self.h, self.da, self.dz)
        )
        self.beta_plain = self.beta[: self.plain]
        batch = {"save_mean": torch.empty_like(self.mean), "save_invstd": torch.empty_like(self.mean)}
        self.forward_state = (self.gamma, self.beta, self.mean, self.var, True, self.momentum, self.eps)
        self.forward_out = {"out": self.h, **batch}
        self.backward_state = (self.gamma, self.mean, self.var, *batch.values(), True, self.eps, (True, True, True))
        return self.h, self.da

    def bind_gradient(self, above: Dense) -> None:
        """Take the layer that gives the gradient of the output, (R, B, H)."""
        self.dh, self.h_by_net = above.dh, above.h
        self.dz_by_net = above.by_net(self.dz if self.normalized else self.da)

    def forward(self) -> None:
        """The input → the output."""
        if self.normalized:
            native_batch_norm(self.a, *self.forward_state, **self.forward_out)
        if self.plain:
            torch.add(self.a_plain, self.beta_plain, out=self.h_plain)
        self.h.sigmoid_()

    def backward(self) -> None:
        """The gradient of the output → that of the input, and the gradient step of bias, γ and β."""
        sigmoid_backward(self.dh, self.h_by_net, grad_input=self.dz_by_net)
        if not self.normalized:
            self.beta.add_(self.da.sum(0))
            return
        da, dgamma, dbeta = native_batch_norm_backward(self.dz, self.a, *self.backward_state)
        self.gamma.add_(dgamma)
        self.beta.add_(dbeta)
        self.da.copy_(da)
        if self.plain:
            self.da_plain.copy_(self.dz_plain)

    def store(self, run: int, linear: nn.Linear, norm: _BatchNorm | None) -> None:
        """Copy the columns of network number `run` into its modules."""
        columns = slice(run * linear.out_features, (run + 1) * linear.out_features)
        if norm is None:
            linear.bias.copy_(self.beta[columns])
        else:
            for name, values in zip(NORM_STATE, (self.gamma, self.beta, self.mean, self.var), strict=True):
                getattr(norm, name).copy_(values[columns])

    def frozen(self) -> Callable[[Tensor], Tensor]:
        """The layer as it is now: its input, which is overwritten, → the sigmoid's under population statistics."""
        scale = self.gamma * (self.var + self.eps).rsqrt()
        scale[: self.plain] = 1
        offset = self.beta - self.mean * scale
        offset[: self.plain] = self.beta[: self.plain]
        return lambda a: a.mul_(scale).add_(offset)


def _columns(linear: nn.Linear, norm: _BatchNorm | None) -> tuple[Tensor, ...]:
    """γ, β, running mean and variance of one network's layer; without a norm β is the bias."""
    if norm is not None:
        return tuple(getattr(norm, name).detach() for name in NORM_STATE)
    bias = linear.bias.detach()
    return torch.ones_like(bias), bias, torch.zeros_like(bias), torch.ones_like(bias)
