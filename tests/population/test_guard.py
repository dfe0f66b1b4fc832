from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nets import batches, buffers, net, same
from torch import nn

import bnkit
from bnkit import UserError
from bnkit.population import guard_statistics


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bnkit.nn.BatchNorm2d])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_overflowed_leaves_no_trace(norm, bad):
    model = net(norm).train()
    tensors = list(model.buffers())
    x = batches(4)[0]
    model(x)
    before = buffers(model)
    guard_statistics(model)
    model(torch.full_like(x, bad)).square().mean().backward()
    assert same(before, model.buffers())
    assert all(a is b for a, b in zip(tensors, model.buffers(), strict=True))


def test_good_batches_are_as_ever():
    model = net().train()
    model[3].eval()
    data = batches(4, 5, 6)
    expected = net().train()
    expected.load_state_dict(model.state_dict())
    expected[3].eval()
    with guard_statistics(model):
        losses = [model(x).square().mean() for x in data]  # several forward passes, then backward
        sum(losses).backward()
    sum(expected(x).square().mean() for x in data).backward()
    for a, b in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_removed_after_the_block_and_on_errors():
    model = net().train()
    with pytest.raises(RuntimeError), guard_statistics(model):
        model(torch.randn(2, 4, 8, 8))
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks
    model(batches(4)[0] * float("nan"))
    assert model[1].running_mean.isnan().all()


def test_a_failing_layer_keeps_its_buffers():
    layer = nn.BatchNorm1d(3)
    tensors = list(layer.buffers())
    guard_statistics(layer)
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(torch.randn(1, 3))
    assert all(a is b for a, b in zip(tensors, layer.buffers(), strict=True))


def test_eval_mode_and_compiled():
    model = net().eval()
    before = buffers(model)
    with guard_statistics(model):
        model(batches(3)[0])
    assert same(before, model.buffers())
    with pytest.raises(UserError, match="guard_statistics works through hooks"):
        guard_statistics(torch.compile(model))


def test_it_nests():
    layer, x = nn.BatchNorm1d(3), torch.randn(6, 3)
    expected, tensors = nn.BatchNorm1d(3), list(layer.buffers())
    expected(x)
    outer = guard_statistics(layer)
    with guard_statistics(layer):
        layer(x)
        layer(x * float("nan"))
    assert all(a is b for a, b in zip(tensors, layer.buffers(), strict=True))
    assert same(buffers(expected), layer.buffers())
    outer.remove()
    layer(x)
    assert layer.num_batches_tracked == 2


class Interrupted(nn.BatchNorm1d):
    """Ctrl-C comes in the middle of a pass, the first time."""

    ready = False

    def forward(self, x):
        y = super().forward(x)
        if not self.ready:
            self.ready = True
            raise KeyboardInterrupt
        return y


@pytest.mark.parametrize("goes_on", [False, True])
def test_an_interrupted_pass_leaves_the_layer_its_buffers(goes_on):
    layer, x = Interrupted(3), torch.randn(6, 3)
    tensors = list(layer.buffers())
    guard = guard_statistics(layer)
    with pytest.raises(KeyboardInterrupt):
        layer(x)
    if goes_on:
        layer(x)
    guard.remove()
    assert all(a is b for a, b in zip(tensors, layer.buffers(), strict=True))
    assert layer.num_batches_tracked == int(goes_on)


def test_compiled_afterwards_copied_and_pickled():
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(6, 3)
    guard_statistics(model)
    for guarded in (torch.compile(model, backend="eager"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tensors = list(guarded.buffers())
        guarded(x)
        guarded(x * float("nan"))
        assert all(a is b for a, b in zip(tensors, guarded.buffers(), strict=True))
        assert [int(b) for b in tensors if b.dim() == 0] == [1]
        assert all(b.isfinite().all() for b in tensors)
        model[0].reset_running_stats()
