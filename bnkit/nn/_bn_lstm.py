"""BNLSTM: the batch-normalized LSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import require
from ..moments import statistics_dtype
from ._recurrent import RecurrentBatchNorm

State = tuple[Tensor, Tensor]


class BNLSTMLayer(nn.Module):
    """One layer of a `BNLSTM` in one direction: (N, T, input_size) to (N, T, hidden_size)."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        max_length: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gamma: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size, **place))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, **place))

        def norm(size: int, *, bias: bool, activation: str | None = None) -> RecurrentBatchNorm:
            options = {"bias": bias, "activation": activation, "max_length": max_length, "gamma": gamma}
            return RecurrentBatchNorm(size, eps, momentum, **place, **options)

        self.norm_ih = norm(4 * hidden_size, bias=bias)  # its bias is that of the gates
        self.norm_hh = norm(4 * hidden_size, bias=False)
        self.norm_c = norm(hidden_size, bias=True, activation="tanh")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal weights, gate by gate, and norms as after construction."""
        for weight in (self.weight_ih, self.weight_hh):
            for gate in weight.detach().chunk(4):  # whose QR decomposition has no type of 16 bits
                gate.copy_(nn.init.orthogonal_(torch.empty_like(gate, dtype=statistics_dtype(gate.dtype))))
        for norm in (self.norm_ih, self.norm_hh, self.norm_c):
            norm.reset_parameters()

    def forward(self, input: Tensor, state: State) -> tuple[Tensor, State]:
        """The hidden states of all steps, and the last hidden and cell state, each (N, hidden_size)."""
        h, c = state
        # Unbound at once: the gradient of indexing step by step would be as large as the sequence, for each step.
        from_input = self.norm_ih(F.linear(input, self.weight_ih)).unbind(1)
        outputs = []
        for step, x in enumerate(from_input):
            gates = self.norm_hh(F.linear(h, self.weight_hh), step, residual=x)
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * self.norm_c(c, step)
            outputs.append(h)
        return torch.stack(outputs, 1), (h, c)


class BNLSTM(nn.Module):
    r"""LSTM with batch normalization in the recurrence, with the interface of `torch.nn.LSTM`.

        (i, f, g, o) = BN(W_ih x_t; γ_x) + BN(W_hh h_{t-1}; γ_h) + b
        c_t = σ(f) c_{t-1} + σ(i) tanh(g)
        h_t = σ(o) tanh(BN(c_t; γ_c, β_c))

    Each BN is a `RecurrentBatchNorm`: statistics for each time step, γ starting at 0.1. b is the bias of the first.
    The cell's own path from c_{t-1} to c_t is not normalized.

    Without an initial state, training draws h_0 from a Gaussian of standard deviation `initial_noise`, as the authors'
    program does on digits. If it were 0 and all sequences began alike, all hidden states would agree up to rounding,
    and each step would multiply gradients by γ/√eps, soon beyond any number. Eval mode starts from 0.

    All sequences of a batch have the same length: batch statistics of padded steps would be wrong, so that a
    `PackedSequence` is refused. Weights start orthogonal, gate by gate. They are called `layers.0.weight_ih` and so on,
    with `layers.1` the reverse direction of the first layer if `bidirectional`.

    References:
        Cooijmans, Ballas, Laurent, Gülçehre and Courville, "Recurrent Batch Normalization", 2016,
        https://arxiv.org/abs/1603.09025, equations 6 to 8.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        num_layers: layers stacked on each other.
        bias: learn b.
        batch_first: input and output are (N, T, ·) rather than (T, N, ·).
        dropout: probability of zeroing an output between layers, in training.
        bidirectional: also run from the last step to the first, and put out both.
        device, dtype: of parameters and buffers.
        max_length: steps with statistics of their own, see `RecurrentBatchNorm`.
        eps, momentum: of the norms.
        gamma: initial weight of the norms.
        initial_noise: standard deviation of h_0 in training where none is given; 0 starts from 0.

    Raises:
        ValueError: sizes out of range, a `PackedSequence`, an input or state of the wrong shape, or one sample in
            training.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gamma: float = 0.1,
        initial_noise: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            require(value >= 1, f"{name} must be at least 1, got {value}: pass a positive number.")
        require(0.0 <= dropout <= 1.0, f"dropout is a probability, got {dropout}: pass a number from 0 to 1.")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.initial_noise = initial_noise
        directions = 1 + bidirectional
        sizes = [input_size] + [directions * hidden_size] * (num_layers - 1)
        options = {"max_length": max_length, "eps": eps, "momentum": momentum, "gamma": gamma}
        place = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            BNLSTMLayer(size, hidden_size, bias, **options, **place) for size in sizes for _ in range(directions)
        )

    def forward(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]:
        """Run over a batch of sequences.

        Args:
            input: (T, N, input_size), with `batch_first` (N, T, input_size), or one sequence (T, input_size).
            hx: initial hidden and cell states, each (num_layers · directions, N, hidden_size), for one sequence
                without N; if None, zeros, or in training noise for the hidden one.

        Returns:
            The last layer's hidden states of all steps, in the layout of the input with `directions · hidden_size`
            features, and the last hidden and cell states of every layer, in the layout of `hx`.
        """
        self._check(input, hx)
        if input.dim() == 2:
            batched = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            output, (h, c) = self._run(input.unsqueeze(0), batched)
            return output.squeeze(0), (h.squeeze(1), c.squeeze(1))
        output, state = self._run(input if self.batch_first else input.transpose(0, 1), hx)
        return (output if self.batch_first else output.transpose(0, 1)), state

    def _check(self, input: Tensor, hx: State | None) -> None:
        require(
            isinstance(input, Tensor),
            f"BNLSTM takes a tensor, got {type(input).__name__}: batch sequences of equal length.",
        )
        require(
            input.dim() in (2, 3) and input.shape[-1] == self.input_size and input.numel() > 0,
            f"expected a sequence (T, {self.input_size}) or a batch of them, 3-dimensional, "
            f"got {tuple(input.shape)}: reshape it.",
        )
        if hx is not None:
            samples = () if input.dim() == 2 else (input.shape[0 if self.batch_first else 1],)
            wanted = (len(self.layers), *samples, self.hidden_size)
            require(
                len(hx) == 2 and all(isinstance(state, Tensor) and state.shape == wanted for state in hx),
                f"hx must be a hidden and a cell state of shape {wanted}, (num_layers · directions, N, hidden_size), "
                f"got {[tuple(getattr(state, 'shape', ())) for state in hx]}: make them so, or leave hx out.",
            )

    def _run(self, x: Tensor, hx: State | None) -> tuple[Tensor, State]:
        """(N, T, ·) through all layers."""
        if hx is None:
            zeros = x.new_zeros(len(self.layers), x.shape[0], self.hidden_size)
            noisy = self.training and self.initial_noise > 0
            hx = (torch.randn_like(zeros) * self.initial_noise if noisy else zeros, zeros)
        directions = 1 + self.bidirectional
        states = []
        for first in range(0, len(self.layers), directions):
            if first and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for k in range(first, first + directions):
                backwards = k > first
                y, state = self.layers[k](x.flip(1) if backwards else x, (hx[0][k], hx[1][k]))
                outputs.append(y.flip(1) if backwards else y)
                states.append(state)
            x = torch.cat(outputs, -1)
        h, c = zip(*states, strict=True)
        return x, (torch.stack(h), torch.stack(c))

    def extra_repr(self) -> str:
        """As torch.nn's."""
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        return text + f", batch_first={self.batch_first}, bidirectional={self.bidirectional}"
