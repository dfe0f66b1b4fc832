from __future__ import annotations

import copy

import pytest
import torch
from nets import batches, buffers, close, moments, net, same
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnkit
from bnkit import UserError
from bnkit.population import accumulation, guard_statistics, preserve_statistics

SIZES = (4, 1, 7)


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bnkit.nn.BatchNorm2d, bnkit.nn.GhostBatchNorm])
def test_one_update_with_the_moments_of_all(norm, momentum):
    model, data = net(norm), batches(*SIZES)
    model[1].momentum = momentum
    old = model[1].running_mean.double(), model[1].running_var.double()
    new = moments(model[0](torch.cat(data)).detach())
    m = 1 / 4 if momentum is None else momentum  # three batches were counted before
    with accumulation(model):
        for x in data:
            model(x).square().mean().backward()
    close(model[1].running_mean, (1 - m) * old[0] + m * new[0])
    close(model[1].running_var, (1 - m) * old[1] + m * new[1])
    assert model[1].num_batches_tracked == 4
    assert not model[1]._forward_pre_hooks


def test_two_rounds_and_ordinary_training_after():
    model, data = net(), batches(4, 4)
    with accumulation(model):
        model(data[0])
    with accumulation(model):
        model(data[1])
    model(data[0])
    assert model[1].num_batches_tracked == 6


def test_gradients_are_those_without():
    model, x = net().train(), batches(4)[0]
    model[3].eval()
    other = copy.deepcopy(model)
    with accumulation(model):
        model(x).square().mean().backward()
    other(x).square().mean().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    layer, data = nn.BatchNorm1d(3, momentum=1.0), [torch.randn(n, 3, requires_grad=True) for n in (4, 6)]
    with accumulation(layer):
        for x in data:
            checkpoint(layer, x, use_reentrant=reentrant).square().mean().backward()
    close(layer.running_mean, moments(torch.cat(data).detach())[0])
    assert layer.num_batches_tracked == 1


def test_frozen_and_evaluating_layers_stay():
    model = net().train()
    model[1].eval()
    before = buffers(model[1])
    with accumulation(model):
        model(batches(4)[0])
    assert same(before, model[1].buffers())
    assert model[5].num_batches_tracked == 4
    before = buffers(model)
    with accumulation(model.eval()):
        model(batches(4)[0])
    assert same(before, model.buffers())


def test_an_exception_changes_nothing():
    model = net()
    before = buffers(model)

    def interrupted():
        with accumulation(model):
            model(batches(4)[0])
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert same(before, model.buffers())
    assert model[1].track_running_stats


def test_nonfinite_micro_batches_are_left_out_where_the_layer_does_so():
    layer = bnkit.nn.BatchNorm1d(3, momentum=1.0, skip_nonfinite=True)
    x = torch.randn(5, 3)
    with accumulation(layer):
        layer(x)
        layer(x * float("nan"))
    close(layer.running_mean, moments(x)[0])


def test_compiled_models_are_refused():
    with (
        pytest.raises(UserError, match="compiled code does not see, and the model is compiled"),
        accumulation(torch.compile(net())),
    ):
        pass


def test_passes_inside_preserve_statistics_do_not_count():
    layer, x = nn.BatchNorm1d(3, momentum=1.0), torch.randn(6, 3)
    with accumulation(layer):
        layer(x)
        with preserve_statistics(layer):
            layer(x + 100)
    close(layer.running_mean, moments(x)[0])
    before = buffers(layer)
    with preserve_statistics(layer), accumulation(layer):
        layer(x + 100)
    assert same(before, layer.buffers())


def test_each_domain_gets_its_own():
    layer = bnkit.nn.DomainBatchNorm(3, ("a", "b", "c"), momentum=1.0)
    data = {"a": [torch.randn(5, 3)], "b": [torch.randn(4, 3) + 9, torch.randn(2, 3)]}
    with accumulation(layer):
        layer(data["b"][0], domain="b")
        layer(data["a"][0])
        with bnkit.nn.use_domain(layer, "b"):
            layer(data["b"][1])
    for i, parts in enumerate(data.values()):
        mean, var = moments(torch.cat(parts))
        close(layer.running_means[i], mean)
        close(layer.running_vars[i], var)
    assert layer.batches_tracked.tolist() == [1, 1, 0]


def test_time_steps_are_left_to_training():
    model = nn.Sequential(bnkit.nn.RecurrentBatchNorm(3, max_length=2))
    other, x = copy.deepcopy(model), torch.randn(4, 2, 3)
    with accumulation(model):
        model(x)
    other(x)
    assert same(buffers(other), model.buffers())


def test_a_guard_outside_and_inside():
    layer, data = nn.BatchNorm1d(3, momentum=1.0), torch.randn(2, 6, 3)
    tensors = list(layer.buffers())
    with guard_statistics(layer), accumulation(layer), guard_statistics(layer):
        for x in data:
            layer(x)
    close(layer.running_var, moments(data.flatten(0, 1))[1])
    assert all(a is b for a, b in zip(tensors, layer.buffers(), strict=True))
