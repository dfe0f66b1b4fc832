from __future__ import annotations

import copy
import math

import pytest
import torch
from nets import batches, buffers, close, moments, net, same
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bnkit import UserError
from bnkit.population import EMA, average


def models(n=3):
    found = [net() for _ in range(n)]
    for i, model in enumerate(found):
        model[1].num_batches_tracked.fill_(10 * i)
    return found


def mean_of(tensors, weights=None):
    weights = weights or [1 / len(tensors)] * len(tensors)
    return sum(w * t.double() for w, t in zip(weights, tensors, strict=True))


def test_parameters_and_buffers_are_means_and_counts_the_last():
    given = models()
    states = [copy.deepcopy(m.state_dict()) for m in given]
    result = average(given)
    for name, tensor in result.state_dict().items():
        if tensor.is_floating_point():
            close(tensor, mean_of([s[name] for s in states]))
        else:
            assert torch.equal(tensor, states[-1][name])
    for model, state in zip(given, states, strict=True):
        assert all(torch.equal(a, state[name]) for name, a in model.state_dict().items())


def test_weighted_and_copied():
    given = models(2)
    result = average(given, weights=[3, 1], buffers="copy")
    close(result[0].weight.detach(), mean_of([m[0].weight.detach() for m in given], [0.75, 0.25]))
    assert same(buffers(given[-1]), result.buffers())


def test_recalibrated_statistics_fit_the_averaged_weights():
    given, data = models(), batches(5, 3)
    result = average(given, data, method="layerwise")
    mean, var = moments(result[0](torch.cat(data)).detach())
    close(result[1].running_mean, mean)
    close(result[1].running_var, var)
    assert result[1].num_batches_tracked == 2


def test_a_single_model_that_averages_already():
    swa, data = AveragedModel(net()), batches(6)
    before = buffers(swa)
    result = average(swa, data)
    close(result.module[1].running_mean, moments(swa.module[0](data[0]).detach())[0])
    assert same(before, swa.buffers())


def test_average_errors():
    with pytest.raises(UserError, match="at least one model"):
        average([])
    with pytest.raises(UserError, match="must have the same parameters"):
        average([net(), nn.Linear(3, 3)])
    with pytest.raises(UserError, match="weights must be one number a model"):
        average(models(2), weights=[1])
    with pytest.raises(UserError, match="unknown policy for buffers 'cpoy': did you mean copy"):
        average(models(2), buffers="cpoy")
    with pytest.raises(UserError, match="needs data"):
        average(models(2), buffers="recalibrate")
    with pytest.raises(UserError, match=r"got wieghts: leave them out, or pass data"):
        average(models(2), wieghts=[1, 3])
    with pytest.raises(UserError, match="nothing with buffers='copy', got num_batches"):
        average(models(2), batches(4), buffers="copy", num_batches=1)
    with pytest.raises(UserError, match="one shape"):
        average([nn.Linear(3, 3), nn.Linear(4, 3)])


class Attending(nn.Module):
    """Has what networks other than plain ones have: complex weights, and a mask of infinities."""

    def __init__(self):
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))


def test_complex_weights():
    a, b = Attending(), Attending()
    torch.testing.assert_close(average([a, b], weights=[1, 3]).spectrum, (a.spectrum + 3 * b.spectrum) / 4)
    ema, start = EMA(a, 0.5), a.spectrum.detach().clone()
    ema.update(b)
    torch.testing.assert_close(ema.module.spectrum, (start + b.spectrum.detach()) / 2)


def test_infinities_stay():
    model = Attending()
    assert torch.equal(average([Attending(), model], weights=[0, 1]).mask, model.mask)
    ema = EMA(model, 0.9)
    ema.update(model)
    assert torch.equal(ema.module.mask, model.mask)


@pytest.mark.parametrize("policy", ["average", "copy"])
def test_ema_by_hand(policy):
    model = net()
    ema = EMA(model, 0.9, buffers=policy)
    weight, running = model[0].weight.detach().double(), model[1].running_mean.double()
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].running_mean.normal_()
            model[1].num_batches_tracked += 1
        ema.update(model)
        weight = 0.9 * weight + 0.1 * model[0].weight.detach()
        running = 0.9 * running + 0.1 * model[1].running_mean
    close(ema.module[0].weight, weight, 1e-6)
    close(ema.module[1].running_mean, running if policy == "average" else model[1].running_mean, 1e-6)
    assert ema.module[1].num_batches_tracked == 6
    assert ema.n_averaged == 3
    assert not any(p.requires_grad for p in ema.parameters())


def test_swa_is_the_mean_and_its_state_dict_is_torchs():
    model = net()
    ours, theirs, seen = EMA(model, None), AveragedModel(model, use_buffers=True), []
    for _ in range(4):
        with torch.no_grad():
            model[0].weight.normal_()
        ours.update(model)
        theirs.update_parameters(model)
        seen.append(model[0].weight.detach().clone())
    close(ours.module[0].weight, mean_of(seen), 1e-6)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_ema_recalibrates():
    model, data = net().train(), batches(6)
    ema = EMA(model, 0.5, buffers="recalibrate")
    with torch.no_grad():
        model[0].weight.normal_()
    ema.update(model)
    with pytest.raises(UserError, match=r"call recalibrate\(data\)"):
        ema(data[0])
    ema.recalibrate(data)
    close(ema.module[1].running_mean, moments(ema.module[0](data[0]).detach())[0])
    ema(data[0])


def test_ema_stays_in_eval_mode_and_takes_a_schedule():
    model, calls = net(), []
    ema = EMA(model, lambda updates: calls.append(updates) or 0.0)
    ema.update(model.train())
    ema.train()
    assert not any(m.training for m in ema.modules())
    before = buffers(ema)
    ema(batches(4)[0])
    assert same(before, ema.buffers())
    assert calls == [0]
    with pytest.raises(UserError, match=r"decay must be between 0 and 1, got 1\.5"):
        EMA(model, 1.5)
