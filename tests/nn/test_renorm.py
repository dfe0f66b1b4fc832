"""BatchRenorm against the paper's algorithm 1 in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import bnkit.nn


def algorithm(x, mean, var, weight, bias, r_max, d_max, eps=1e-5):
    """The paper's, with sums over samples and positions."""
    dims, shape = (0, *range(2, x.dim())), (1, -1) + (1,) * (x.dim() - 2)
    batch_mean = x.mean(dims)
    batch_sigma = torch.sqrt(x.var(dims, correction=0) + eps)
    sigma = torch.sqrt(var + eps)
    r = (batch_sigma / sigma).detach().clamp(1 / r_max, r_max)
    d = ((batch_mean - mean) / sigma).detach().clamp(-d_max, d_max)
    xhat = (x - batch_mean.view(shape)) / batch_sigma.view(shape) * r.view(shape) + d.view(shape)
    return weight.view(shape) * xhat + bias.view(shape)


def make(**options):
    layer = bnkit.nn.BatchRenorm(4, **options)
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
            tensor.uniform_(0.5, 2.0)
    return layer


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.2, 0.3), (3.0, 5.0), (1e6, 1e6)])
@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 7), (3, 4, 5, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_gradients_and_statistics(dtype, shape, r_max, d_max, backend):
    layer = make(r_max=r_max, d_max=d_max, dtype=dtype)
    x = torch.randn(shape, dtype=dtype) * 3 + 1
    dy = torch.randn_like(x)
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    mean, var = layer.running_mean.double().clone(), layer.running_var.double().clone()
    wanted = algorithm(exact[0], mean, var, *exact[1:], r_max, d_max)
    wanted.backward(dy.double())
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    tolerance = {"atol": 3e-5, "rtol": 3e-5} if dtype == torch.float32 else {"atol": 1e-11, "rtol": 1e-11}
    torch.testing.assert_close(y.double(), wanted, **tolerance)
    for ours, theirs in zip((x, layer.weight, layer.bias), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)
    flat = x.detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean.double(), 0.9 * mean + 0.1 * flat.mean(1), **tolerance)
    torch.testing.assert_close(layer.running_var.double(), 0.9 * var + 0.1 * flat.var(1), **tolerance)
    assert layer.num_batches_tracked == 1


def test_unclipped_training_normalizes_as_inference_would():
    layer = make(r_max=1e9, d_max=1e9)
    x = torch.randn(5, 4, 3)
    wanted = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), wanted, atol=1e-5, rtol=1e-5)


def test_before_the_schedule_begins_it_is_batch_norm():
    ours, theirs = bnkit.nn.BatchRenorm(4), nn.BatchNorm1d(4)
    for _ in range(3):
        x = torch.randn(6, 4) * 2 + 3
        torch.testing.assert_close(ours(x), theirs(x))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    ("count", "r_max", "d_max"),
    [
        (0, 1.0, 0.0),
        (5_000, 1.0, 0.0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5.0),
        (50_000, 3.0, 5.0),
    ],
)
def test_the_papers_schedule(count, r_max, d_max):
    """Section 4: 1 and 0 for 5,000 steps, then on a line to 3 at 40,000 and to 5 at 25,000."""
    scheduled, fixed = bnkit.nn.BatchRenorm(4), bnkit.nn.BatchRenorm(4, r_max=r_max, d_max=d_max)
    scheduled.num_batches_tracked.fill_(count)
    x = torch.randn(6, 4) * 20 + 30  # far from the statistics, so that both bounds are met
    torch.testing.assert_close(scheduled(x), fixed(x))


def test_a_function_as_schedule_sees_the_count():
    seen = []

    def r_max(count):
        seen.append(count.item())
        return 1.0 + count / 10

    layer = make(r_max=r_max, d_max=lambda count: 0.5)
    for _ in range(3):
        layer(torch.randn(6, 4))
    assert seen == [0, 1, 2]


def test_gradient_does_not_flow_through_r_and_d():
    """If it did, the unclipped output would not depend on the batch, and dx would be weight · dy / σ."""
    layer = make(r_max=1e9, d_max=1e9, dtype=torch.float64)
    sigma = torch.sqrt(layer.running_var + 1e-5)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    layer(x).backward(dy)
    assert not torch.allclose(x.grad, layer.weight / sigma * dy, atol=1e-2)
    torch.testing.assert_close(x.grad.sum(0), torch.zeros(4, dtype=torch.float64))


def test_checkpointed_schedule_uses_the_bounds_of_the_forward_pass():
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        torch.manual_seed(0)
        layer = make(r_max=lambda count: 1.0 + count, d_max=lambda count: 1.0 * count)
        x = torch.randn(6, 4, requires_grad=True)
        torch.tanh(run(layer, x)).pow(2).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def losses(layer, batches, run):
    """The gradients of one backward pass over all batches, `run` calling the layer."""
    inputs = [x.clone().requires_grad_() for x in batches]
    sum(torch.tanh(run(layer, x)).pow(3).sum() for x in inputs).backward()
    return [x.grad for x in inputs] + [parameter.grad for parameter in layer.parameters()]


def plainly(layer, x):
    return layer(x)


def checkpointed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def checkpointed_reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=True)


@pytest.mark.parametrize(("run", "count"), [(checkpointed, 80), (checkpointed_reentrant, 64)])
def test_checkpointed_passes_before_one_backward_pass(run, count):
    layer = make(r_max=1.5, d_max=0.5)
    twin, batches = copy.deepcopy(layer), torch.randn(count, 6, 4) * 2
    torch.testing.assert_close(losses(layer, batches, run), losses(twin, batches, plainly))


def nested(layer, x):
    return checkpoint(
        lambda z: checkpointed(layer, checkpointed(layer, z).tanh()),
        x,
        use_reentrant=False,
    )


def test_nested_checkpoints_and_batches_that_overflowed():
    layer = make(r_max=1.5, d_max=0.5)
    batches = torch.randn(3, 6, 4)
    batches[1, 2, 3] = float("inf")
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(
        losses(layer, batches, nested), losses(twin, batches, lambda f, x: f(f(x).tanh())), equal_nan=True
    )


def test_checkpoint_of_frozen_layers_within_a_checkpoint():
    frozen, linear = make(r_max=1.5, d_max=0.5).requires_grad_(False), nn.Linear(4, 2)
    twin = copy.deepcopy(frozen)
    x = torch.randn(6, 4)
    checkpoint(lambda z: linear(checkpointed(frozen, z)).tanh(), x, use_reentrant=False).sum().backward()
    found = linear.weight.grad.clone()
    linear.zero_grad()
    linear(twin(x)).tanh().sum().backward()
    torch.testing.assert_close(found, linear.weight.grad)


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant])
def test_the_same_batch_in_every_step_and_twice_through_one_graph(run):
    layer = make(r_max=1.5, d_max=0.5)
    twin = copy.deepcopy(layer)
    batch = torch.randn(6, 4)
    for _ in range(3):
        gradients = []
        for module, call in ((layer, run), (twin, plainly)):
            x = batch.clone().requires_grad_()
            loss = torch.tanh(call(module, x)).pow(3).sum()
            loss.backward(retain_graph=True)
            loss.backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant])
def test_the_same_batch_twice_before_backward_is_refused(run):
    batch = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"one of several passes of the same batch .*: call backward.. after each"):
        losses(make(r_max=1.5, d_max=0.5), [batch, batch], run)
    layer = make(r_max=1.0, d_max=0.0)  # r = 1 and d = 0 for both, so that it does not matter which
    torch.testing.assert_close(losses(layer, [batch] * 2, run), losses(copy.deepcopy(layer), [batch] * 2, plainly))


def test_a_pass_that_is_not_remembered_is_refused():
    with pytest.raises(ValueError, match=r"a batch that was not among the last 64: make the model deterministic"):
        losses(make(), torch.randn(65, 6, 4), checkpointed_reentrant)
    noise = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"a batch that was not among the last 64: make the model deterministic"):
        losses(
            make(), torch.randn(1, 6, 4), lambda f, x: checkpointed(lambda z: f(z + torch.rand(4, generator=noise)), x)
        )


def remembered(layer):
    return sum(map(len, (layer._passes._without_graph, *layer._passes._of_regions.values())))


def test_passes_are_remembered_for_as_long_as_they_can_be_repeated():
    layer = make(r_max=1.5, d_max=0.5)
    x = torch.randn(6, 4, requires_grad=True)
    layer(x).sum().backward()
    assert remembered(layer) == 0
    y = checkpointed(layer, x)
    assert remembered(layer) == 1
    y.sum().backward()
    del y
    assert remembered(layer) == 0


def compute(layer, x):
    return layer(torch.sin(layer(x * 2)) + x)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_checkpoint(momentum, use_reentrant):
    """The graph's end updates the statistics, which a repeated pass must not see."""
    torch._dynamo.reset()
    layer = make(r_max=(0, 3, 1.5), d_max=lambda count: 0.2 + 0.1 * count, momentum=momentum, activation="silu")
    twin = copy.deepcopy(layer)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        return checkpoint(compute, layer, x, use_reentrant=use_reentrant)

    for _ in range(2):
        gradients, x = [], torch.randn(6, 4)
        for call in (run, lambda x: compute(twin, x)):
            leaf = x.clone().requires_grad_()
            torch.tanh(call(leaf)).pow(3).sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)
    for ours, theirs in zip(
        (*layer.parameters(), *layer.buffers()), (*twin.parameters(), *twin.buffers()), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours.grad, theirs.grad)


def by_vmap(layer):
    parameters, buffers = torch.func.stack_module_state([layer, copy.deepcopy(layer)])
    state = {**parameters, **buffers}
    torch.func.vmap(lambda state, x: torch.func.functional_call(layer, state, x))(state, torch.randn(2, 6, 4))


def by_grad(layer):
    def loss(parameters, x):
        state = parameters | {name: buffer.clone() for name, buffer in layer.named_buffers()}
        return torch.func.functional_call(layer, state, x).pow(3).sum()

    torch.func.grad(loss)(dict(layer.named_parameters()), torch.randn(6, 4))


def by_fake_tensors(layer):
    with FakeTensorMode(allow_non_fake_inputs=True):
        checkpointed(layer, torch.randn(6, 4, requires_grad=True)).sum().backward()


def by_checkpoint(layer):
    checkpointed_reentrant(layer, torch.randn(6, 4, requires_grad=True))
    assert remembered(layer) == 1


@pytest.mark.parametrize("use", [by_vmap, by_grad, by_fake_tensors, by_checkpoint])
def test_copies_and_pickles_after(use):
    layer = make(r_max=1.5, d_max=0.5)
    use(layer)
    x = torch.randn(6, 4)
    wanted = copy.deepcopy(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin.state_dict(), wanted)
        assert remembered(twin) == 0
        assert twin(x).shape == x.shape


@pytest.mark.parametrize("bad", [0.5, (5, 5, 3.0), (0, 10, 0.9), (1, 2)])
def test_bounds_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="r_max must be a number of at least 1, a tuple"):
        bnkit.nn.BatchRenorm(4, r_max=bad)


def test_negative_d_max_is_refused():
    with pytest.raises(ValueError, match="d_max must be a number of at least 0"):
        bnkit.nn.BatchRenorm(4, d_max=-1.0)


def test_an_empty_batch_leaves_statistics_alone():
    layer = make(r_max=2.0, d_max=1.0)
    before = layer.running_var.clone()
    assert layer(torch.zeros(0, 4, 3)).shape == (0, 4, 3)
    assert torch.equal(layer.running_var, before)
