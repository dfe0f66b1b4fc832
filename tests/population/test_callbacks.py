"""Driven by Fabric, and by a loop that calls hooks as a Lightning Trainer does."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from lightning_fabric import Fabric
from nets import batches, buffers, close, moments, net, same

from bnkit import UserError
from bnkit.population import Callback, EMACallback, GuardCallback, RecalibrateCallback

HOOKS = ["setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_before_zero_grad", "on_save_checkpoint"]


def trainer(data):
    return types.SimpleNamespace(train_dataloader=data, global_step=0)


def test_every_hook_is_there_and_others_are_not():
    callback = Callback()
    for hook in HOOKS:
        assert getattr(callback, hook)(None, None) is None
    assert callback.state_key == "Callback"
    assert callback.state_dict() == {}
    with pytest.raises(AttributeError, match="no attribute 'off_fit'"):
        _ = callback.off_fit


def test_recalibrates_at_the_end():
    model, data = net(), batches(5, 3)
    for callback in (RecalibrateCallback(), RecalibrateCallback(lambda: data), RecalibrateCallback(data)):
        fabric = Fabric(accelerator="cpu", callbacks=[callback])
        fabric.call("on_train_start", trainer(data), model)
        before = buffers(model)
        fabric.call("on_train_end", trainer(data), model)
        assert not same(before, model.buffers())
        close(model[1].running_mean, moments(model[0](torch.cat(data)).detach())[0])
        assert callback.result.batches == 2
        model[1].running_mean.zero_()


def test_ema_updates_once_a_step():
    model, run, data = net(), trainer(None), batches(4)
    callback = EMACallback(0.5, data, buffers="recalibrate", method="layerwise")
    callback.on_fit_start(run, model)
    callback.on_train_start(run, model)
    for step in (0, 1, 1, 2):
        run.global_step = step
        callback.on_train_batch_end(run, model, None, None, 0)
    assert callback.ema.n_averaged == 2
    callback.on_train_end(run, model)
    assert not callback.ema.stale
    other = EMACallback(0.5, buffers="recalibrate")
    other.load_state_dict(callback.state_dict())
    other.on_fit_start(run, net())
    assert same(buffers(callback.ema), other.ema.buffers())


def test_another_fit_begins_anew():
    run, callback = trainer(None), EMACallback(0.5)
    callback.on_fit_start(run, net())
    saved, model = copy.deepcopy(callback.state_dict()), net()
    callback.load_state_dict(saved)
    callback.on_fit_start(run, net())
    assert torch.equal(callback.ema.module[0].weight, saved["module.0.weight"])
    callback.on_fit_start(run, model)
    assert torch.equal(callback.ema.module[0].weight, model[0].weight)


def test_options_are_refused_at_once():
    with pytest.raises(UserError, match="unknown option 'num_batch': did you mean num_batches"):
        RecalibrateCallback(num_batch=3)
    with pytest.raises(UserError, match="unknown option 'buffer'"):
        EMACallback(0.9, buffer="copy")
    with pytest.raises(UserError, match="got num_batches: pass data"):
        EMACallback(0.9, num_batches=3)


def test_an_exception_before_training_is_not_hidden():
    callback = GuardCallback()
    callback.on_exception(None, net(), KeyError())
    callback.on_fit_end(None, net())


@pytest.mark.parametrize("end", ["on_fit_end", "on_exception"])
def test_guards_while_training(end):
    model, callback = net().train(), GuardCallback()
    callback.on_fit_start(None, model)
    before = buffers(model)
    model(batches(4)[0] * float("inf"))
    assert same(before, model.buffers())
    getattr(callback, end)(None, model, *([KeyError()] if end == "on_exception" else []))
    assert not model[1]._forward_hooks
