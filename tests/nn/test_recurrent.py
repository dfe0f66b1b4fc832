"""RecurrentBatchNorm against one batch norm a step; BNLSTM against the paper's equations in float64."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from bnkit.nn import BNLSTM, RecurrentBatchNorm


def make(max_length=4, **options):
    layer = RecurrentBatchNorm(3, max_length=max_length, **options)
    if layer.weight is not None:
        nn.init.uniform_(layer.weight, 0.5, 2.0)
    return layer


def one_a_step(layer):
    """torch batch norms that share one weight and bias."""
    norms = [nn.BatchNorm1d(3, layer.eps, layer.momentum) for _ in range(layer.max_length)]
    for norm in norms:
        norm.weight, norm.bias = nn.Parameter(layer.weight.detach().clone()), nn.Parameter(layer.bias.detach().clone())
    for norm in norms[1:]:
        norm.weight, norm.bias = norms[0].weight, norms[0].bias
    return norms


def assert_statistics(layer, norms):
    for step, norm in enumerate(norms):
        torch.testing.assert_close(layer.running_mean[step], norm.running_mean, msg=f"mean of step {step}")
        torch.testing.assert_close(layer.running_var[step], norm.running_var, msg=f"var of step {step}")
        assert layer.num_batches_tracked[step] == norm.num_batches_tracked


@pytest.mark.parametrize("length", [1, 3, 4, 7])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("whole", [True, False])
def test_one_batch_norm_a_step(whole, momentum, length):
    """Both ways to call it; steps from the fourth on share theirs."""
    layer = make(momentum=momentum)
    norms = one_a_step(layer)
    for _ in range(3):
        x = (torch.randn(5, length, 3) * 2 + torch.arange(length).view(1, -1, 1)).requires_grad_()
        twin, dy = x.detach().clone().requires_grad_(), torch.randn(5, length, 3)
        y = layer(x) if whole else torch.stack([layer(x[:, t], t) for t in range(length)], 1)
        wanted = torch.stack([norms[min(t, 3)](twin[:, t]) for t in range(length)], 1)
        torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
        y.backward(dy)
        wanted.backward(dy)
        torch.testing.assert_close(x.grad, twin.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.weight.grad, norms[0].weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.bias.grad, norms[0].bias.grad, atol=1e-4, rtol=1e-4)
    assert_statistics(layer, norms)
    layer.eval()
    longer = torch.randn(2, 9, 3)
    wanted = torch.stack([norms[min(t, 3)].eval()(longer[:, t]) for t in range(9)], 1)
    torch.testing.assert_close(layer(longer), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(longer[:, 6], 6), wanted[:, 6], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [3, 6])
def test_residual_and_activation_of_a_sequence(length):
    layer = make(activation="tanh")
    plain = make()
    plain.load_state_dict(layer.state_dict())
    x, residual = torch.randn(2, 5, length, 3)
    for _ in range(2):
        torch.testing.assert_close(layer(x, residual=residual), torch.tanh(plain(x) + residual))
        layer.eval()
        plain.eval()


@pytest.mark.parametrize("length", [3, 6])
def test_skip_nonfinite_keeps_a_step_out(length):
    layer, plain = make(skip_nonfinite=True), make()
    x = torch.randn(5, length, 3)
    layer(x)
    plain(x)
    bad = torch.randn(5, length, 3)
    bad[0, 1, 1] = torch.inf
    layer(bad)
    assert layer.running_var.isfinite().all()
    torch.testing.assert_close(layer.running_var[1], plain.running_var[1])


def test_gamma():
    assert torch.equal(RecurrentBatchNorm(3, max_length=2).weight, torch.full((3,), 0.1))
    layer = RecurrentBatchNorm(3, max_length=2, gamma=0.25)
    nn.init.zeros_(layer.weight)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.full((3,), 0.25))
    assert layer.running_mean.shape == layer.running_var.shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RecurrentBatchNorm(3, max_length=0), "max_length must be at least 1, got 0"),
        (lambda: make()(torch.zeros(5, 3), -1), "time steps count from 0, got -1"),
        (lambda: make()(torch.zeros(5, 3)), r"expected a sequence of shape \(N, T, 3\) without a step, got \(5, 3\)"),
        (lambda: make()(torch.zeros(5, 2, 4)), r"expected a sequence .* got \(5, 2, 4\)"),
        (lambda: make()(torch.zeros(1, 3), 0), "Expected more than 1 value per channel"),
        (
            lambda: make()(torch.zeros(5, 2, 3), residual=torch.zeros(5, 3, 2)),
            r"residual must have the input's shape \(5, 2, 3\), got \(5, 3, 2\)",
        ),
        (
            lambda: make().eval()(torch.zeros(5, 2, 3), residual=torch.zeros(5, 6)),
            r"residual must have the input's shape \(5, 2, 3\), got \(5, 6\)",
        ),
        (
            lambda: RecurrentBatchNorm(3, max_length=2)(torch.zeros(5, 4, 3), residual=torch.zeros(5, 3, 3)),
            r"residual must have the input's shape \(5, 4, 3\), got \(5, 3, 3\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(4, 0, 3), (0, 2, 3)])
def test_an_empty_sequence_leaves_statistics_alone(shape, momentum):
    layer = RecurrentBatchNorm(3, max_length=3, momentum=momentum)
    assert layer(torch.zeros(shape)).shape == shape
    assert torch.equal(layer.running_var, torch.ones(3, 3))


def lstm(**options):
    model = BNLSTM(2, 3, batch_first=True, max_length=6, initial_noise=0.0, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def equations(cell, x, h, c):
    """Equations 6 to 8 of the paper, step by step, with batch statistics."""

    def bn(z, weight, bias=0.0):
        return weight * (z - z.mean(0)) / torch.sqrt(z.var(0, correction=0) + 1e-5) + bias

    outputs = []
    for t in range(x.shape[1]):
        from_input = bn(x[:, t] @ cell.weight_ih.T, cell.norm_ih.weight)
        from_hidden = bn(h @ cell.weight_hh.T, cell.norm_hh.weight)
        b = 0.0 if cell.norm_ih.bias is None else cell.norm_ih.bias
        i, f, g, o = (from_input + from_hidden + b).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(bn(c, cell.norm_c.weight, cell.norm_c.bias))
        outputs.append(h)
    return torch.stack(outputs, 1), h, c


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 5, 8])
def test_lstm_follows_the_equations(length, bias):
    model = lstm(bias=bias)
    x, h, c = torch.randn(4, length, 2).double(), *torch.randn(2, 4, 3).double()
    dy, leaves = torch.randn(4, length, 3).double(), [x.requires_grad_(), h.requires_grad_(), *model.parameters()]
    output, (h_n, c_n) = model(x, (h.unsqueeze(0), c.unsqueeze(0)))
    wanted, wanted_h, wanted_c = equations(model.layers[0], x, h, c)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(h_n[0], wanted_h)
    torch.testing.assert_close(c_n[0], wanted_c)
    for ours, theirs in zip(
        torch.autograd.grad(output, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_shapes_are_those_of_torchs_lstm(num_layers, bidirectional, batch_first):
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    ours, theirs = BNLSTM(2, 3, max_length=6, **options), nn.LSTM(2, 3, **options)
    x = torch.randn((4, 5, 2) if batch_first else (5, 4, 2))
    state = torch.randn(2, num_layers * (1 + bidirectional), 4, 3).unbind(0)
    for hx in (None, state):
        (y, (h, c)), (wanted, (wanted_h, wanted_c)) = ours(x, hx), theirs(x, hx)
        assert (y.shape, h.shape, c.shape) == (wanted.shape, wanted_h.shape, wanted_c.shape)
    one, (h, _) = ours.eval()(torch.randn(5, 2))
    assert (one.shape, h.shape) == ((5, 3 * (1 + bidirectional)), (num_layers * (1 + bidirectional), 3))


def test_layers_and_directions_are_chained():
    model = lstm(num_layers=2, bidirectional=True)
    x, zero = torch.randn(4, 5, 2).double(), torch.zeros(4, 3).double()
    first = torch.cat(
        [equations(model.layers[0], x, zero, zero)[0], equations(model.layers[1], x.flip(1), zero, zero)[0].flip(1)], 2
    )
    forth, last_forth, _ = equations(model.layers[2], first, zero, zero)
    back, last_back, _ = equations(model.layers[3], first.flip(1), zero, zero)
    y, (h, _) = model(x)
    torch.testing.assert_close(y, torch.cat([forth, back.flip(1)], 2))
    torch.testing.assert_close(h[2:], torch.stack([last_forth, last_back]))


def test_eval_does_not_depend_on_the_batch_or_on_chance():
    model = BNLSTM(2, 3, batch_first=True, max_length=6)
    for _ in range(3):
        model(torch.randn(8, 6, 2))
    model.eval()
    x = torch.randn(8, 6, 2)
    torch.testing.assert_close(model(x)[0][:1], model(x[:1])[0])
    torch.testing.assert_close(model(x[0])[0], model(x)[0][0])


def test_sequences_that_begin_alike_have_finite_gradients():
    """All black pixels at the top of a digit: without noise in h_0 the gradients overflow."""
    x = torch.cat([torch.zeros(16, 60, 1), torch.rand(16, 20, 1)], 1)
    finite = {}
    for noise in (0.1, 0.0):
        torch.manual_seed(0)
        model = BNLSTM(1, 16, batch_first=True, max_length=80, initial_noise=noise)
        model(x)[1][0].pow(2).sum().backward()
        finite[noise] = all(p.grad.isfinite().all() for p in model.parameters())
    assert finite[0.1]


def test_dropout_acts_between_layers_in_training_only():
    model = BNLSTM(2, 3, num_layers=2, dropout=1.0, max_length=6, initial_noise=0.0)
    x = torch.randn(5, 4, 2)
    torch.testing.assert_close(model(x)[0], model(x + torch.randn_like(x))[0])
    assert not torch.allclose(model.eval()(x)[0], model(torch.randn_like(x))[0])


def test_state_dict_round_trip_and_compile():
    torch._dynamo.reset()
    model = BNLSTM(2, 3, max_length=4, initial_noise=0.0)
    x = torch.randn(2, 5, 2)
    model(x)
    twin = BNLSTM(2, 3, max_length=4, initial_noise=0.0)
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], model(x)[0], atol=1e-4, rtol=1e-4)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], tensor, msg=name)


def test_lstm_learns_which_sequence_began_with_a_one():
    torch.manual_seed(0)
    model, head = BNLSTM(1, 8, batch_first=True, max_length=10), nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 0.02)
    for _ in range(60):
        x = torch.randn(32, 10, 1)
        x[:, 0] = (torch.rand(32, 1) < 0.5).float()
        loss = nn.functional.binary_cross_entropy_with_logits(head(model(x)[1][0][-1]), x[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(200, 10, 1)
    x[:, 0] = (torch.rand(200, 1) < 0.5).float()
    model.eval()
    assert ((head(model(x)[1][0][-1]) > 0) == (x[:, 0] > 0.5)).float().mean() > 0.95


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BNLSTM(2, 0, max_length=3), "hidden_size must be at least 1, got 0"),
        (lambda: BNLSTM(2, 3, dropout=1.5, max_length=3), "dropout is a probability, got 1.5"),
        (lambda: BNLSTM(2, 3, max_length=3)(torch.zeros(5, 4, 3)), r"expected a sequence \(T, 2\) or a batch of them"),
        (
            lambda: BNLSTM(2, 3, max_length=3)(pack_sequence([torch.zeros(2, 2)])),
            "BNLSTM takes a tensor, got PackedSeq",
        ),
        (lambda: BNLSTM(2, 3, max_length=3)(torch.zeros(5, 1, 2)), "Expected more than 1 value per channel"),
    ],
)
def test_lstm_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("h", "c", "shape"),
    [
        ((3, 4, 3), (3, 4, 3), (5, 4, 2)),
        ((1, 4, 3), (1, 4, 3), (5, 4, 2)),
        ((2, 5, 3), (2, 5, 3), (5, 4, 2)),
        ((2, 4, 3), (2, 1, 3), (5, 4, 2)),
        ((2, 4, 4), (2, 4, 3), (5, 4, 2)),
        ((2, 3), (2, 3), (5, 4, 2)),
        ((2, 1, 3), (2, 1, 3), (5, 2)),
    ],
)
def test_states_of_another_shape_are_refused(h, c, shape):
    model = BNLSTM(2, 3, num_layers=2, max_length=5).eval()
    wanted = (2, *shape[1:-1], 3)
    with pytest.raises(ValueError, match=re.escape(f"hx must be a hidden and a cell state of shape {wanted}, (num")):
        model(torch.zeros(shape), (torch.zeros(h), torch.zeros(c)))
    with pytest.raises(ValueError, match="hx must be a hidden and a cell state"):
        model(torch.zeros(shape), torch.zeros(wanted))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_those_of_float32_rounded(dtype):
    found = []
    for kind in (dtype, torch.float32):
        torch.manual_seed(0)
        found.append(BNLSTM(3, 4, max_length=3, dtype=kind).state_dict())
    for name, values in found[1].items():
        torch.testing.assert_close(found[0][name], values.to(found[0][name].dtype), rtol=0, atol=0)
    model = BNLSTM(3, 4, max_length=3, dtype=dtype)
    assert model(torch.randn(5, 2, 3, dtype=dtype))[0].dtype == dtype
