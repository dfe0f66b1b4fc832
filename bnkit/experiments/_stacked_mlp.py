"""Many small sigmoid networks trained in lockstep, as one stack of matrices.

A network of 100 units a layer is bound by the overhead of its operators, not by arithmetic. Stacking R networks of
the same widths pays that overhead once for all of them, and a closed-form gradient needs no autograd graph.

Notation: K configurations (norm, learning rate, initialization) times S seeds make R = K·S networks, the ones without
a norm first. Networks of one seed see the same batches. B is the batch size, F the input width, H a layer's width.
Activations lie in memory as (B, K, S, H), so those that are normalized form one block of columns.

Every gradient is multiplied by minus the network's learning rate where it enters, at the logits; backpropagation is
linear in it, so all that follows is added to the parameters as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._stacked_input import Inputs
from ._stacked_layers import Dense, Hidden, Output


class StackedMLP:
    """The networks `nets[configuration][seed]`, trained together by plain stochastic gradient descent.

    Args:
        nets: modules made of `nn.Linear` layers with a batch normalization behind each hidden one or none at all,
            the sigmoid after it and a linear output. Same widths, same `eps` and `momentum`; those without a norm
            first. They are left alone until `store()`.
        learning_rates: one a configuration.
        inputs: how they come; by default all of them, as they are.
    """

    def __init__(
        self, nets: Sequence[Sequence[nn.Module]], learning_rates: Sequence[float], inputs: Inputs | None = None
    ) -> None:
        linears = [[[m for m in net.modules() if isinstance(m, nn.Linear)] for net in row] for row in nets]
        norms = [[[m for m in net.modules() if isinstance(m, _BatchNorm)] for net in row] for row in nets]
        has_norm = [bool(row[0]) for row in norms]
        assert has_norm == sorted(has_norm), "networks without a norm come first"
        depth = len(linears[0][0])

        def layer(i: int) -> list[list[nn.Linear]]:
            return [[net[i] for net in row] for row in linears]

        self.nets = nets
        self.shape = (len(nets), len(nets[0]))
        self.input = (inputs or Inputs()).layer(layer(0))
        self.output = Output(layer(depth - 1), learning_rates)
        self.dense: list[Dense] = [*(Dense(layer(i)) for i in range(1, depth - 1)), self.output]
        self.hidden = [
            Hidden([net for row in layer(i) for net in row], [net[i] if net else None for row in norms for net in row])
            for i in range(depth - 1)
        ]
        self.batch = 0

    @property
    def bias(self) -> Tensor:
        """The output's bias, (R, classes); a loss that is not finite leaves its mark there."""
        return self.output.bias

    def _bind(self, batch: int) -> None:
        """Allocate all that a step of `batch` rows writes, so that every step runs on the same memory and views."""
        a = self.input.bind(batch)
        gradients = []
        for hidden, dense in zip(self.hidden, self.dense, strict=True):
            h, da = hidden.bind(a)
            gradients.append(da)
            a = dense.bind(h)
            hidden.bind_gradient(dense)
        for layer, delta in zip((self.input, *self.dense[:-1]), gradients, strict=True):
            layer.bind_delta(delta)
        self.batch = batch

    @torch.no_grad()
    def step(self, x: Sequence, target: Tensor) -> None:
        """One step of gradient descent on the mean cross-entropy.

        Args:
            x: the used inputs of each seed, each (B, F) or what stands for it, see `Inputs`.
            target: one-hot classes of each seed, (S, B, classes).
        """
        if target.shape[1] != self.batch:
            self._bind(target.shape[1])
        self.input.forward(x)
        for hidden, dense in zip(self.hidden, self.dense, strict=True):
            hidden.forward()
            dense.forward()
        self.output.differentiate(target)
        for hidden, dense in zip(reversed(self.hidden), reversed(self.dense), strict=True):
            dense.backward()
            hidden.backward()
        self.input.update(x)

    @torch.no_grad()
    def frozen(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The networks as they are now, whatever steps follow.

        Returns:
            A function of all inputs, (N, F) or what stands for it, see `Inputs`, whose values are the logits
            (N, K, S, classes) and the inputs of the last sigmoid (N, K, S, H) under population statistics.
        """
        first, *dense, output = (layer.frozen() for layer in (self.input, *self.dense))
        *hidden, last = (layer.frozen() for layer in self.hidden)

        def evaluate(x) -> tuple[Tensor, Tensor]:
            a = first(x)
            for preactivation, product in zip(hidden, dense, strict=True):
                a = product(preactivation(a).sigmoid_())
            z = last(a)
            return output(z.sigmoid()), z.view(len(z), *self.shape, -1)

        return evaluate

    @torch.no_grad()
    def store(self) -> None:
        """Write parameters and running statistics back into the modules."""
        matrices = [layer.weights_of_nets().flatten(0, 1) for layer in (self.input, *self.dense)]
        for run, net in enumerate(net for row in self.nets for net in row):
            linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
            norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
            for linear, matrix in zip(linears, matrices, strict=True):
                linear.weight.copy_(matrix[run])
            linears[-1].bias.copy_(self.bias[run])
            for i, hidden in enumerate(self.hidden):
                hidden.store(run, linears[i], norms[i] if norms else None)
