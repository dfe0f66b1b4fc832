from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bnkit._modes import buffers_kept, evaluating, hooked, training_flags_kept


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()))


class Stubborn(nn.Module):
    def train(self, mode: bool = True) -> Stubborn:
        return self


def fail_after(action: Callable[[], object]):
    action()
    raise KeyError


def flags(module: nn.Module) -> list[bool]:
    return [m.training for m in module.modules()]


def test_training_flags_come_back_one_by_one():
    net = model()
    net[1].eval()
    net.append(Stubborn())
    before = flags(net)
    with pytest.raises(KeyError), training_flags_kept(net):
        fail_after(net.eval)
    assert flags(net) == before == [True, True, False, False, False, True]


def test_evaluating_nests():
    net = model()
    with evaluating(net):
        net.train()
        with evaluating(net):
            assert not any(flags(net))
        assert all(flags(net))
    assert all(flags(net))


def test_buffers_come_back_in_place():
    net = model()
    net(torch.randn(5, 3))
    buffers = list(net.buffers())
    before = [b.clone() for b in buffers]
    with pytest.raises(KeyError), buffers_kept(net):
        fail_after(lambda: net(torch.randn(5, 3)))
    for buffer, now, old in zip(buffers, net.buffers(), before, strict=True):
        assert buffer is now
        assert torch.equal(now, old)


def test_only_the_tensors_given_come_back():
    net = model()
    norm = net.get_submodule("1.0")
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_var is not None
    with buffers_kept([norm.running_var]):
        net(torch.randn(5, 3))
    assert torch.equal(norm.running_var, torch.ones(4))
    assert norm.num_batches_tracked == 1


def test_hooks_go_even_when_registering_fails():
    net = model()
    calls = []

    def handles():
        yield net.register_forward_hook(lambda *_: calls.append(1))
        raise KeyError

    with pytest.raises(KeyError), hooked(handles()):
        pass
    net(torch.randn(5, 3))
    assert not calls
    with hooked([net.register_forward_hook(lambda *_: calls.append(1))]):
        net(torch.randn(5, 3))
    net(torch.randn(5, 3))
    assert calls == [1]
