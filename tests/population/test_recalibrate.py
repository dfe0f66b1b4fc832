"""Values against float64, and everything that recalibration must leave as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import batches, buffers, close, moments, net, randomized, same
from torch import nn

import bnkit
from bnkit import UserError
from bnkit.ops import cpu
from bnkit.population import METHODS, _kernel, _measure, recalibrate

SIZES = (4, 7, 2)
NORMS = [nn.BatchNorm2d, nn.SyncBatchNorm, bnkit.nn.BatchNorm2d, bnkit.nn.GhostBatchNorm, bnkit.nn.BatchRenorm]


def inputs_of(model: nn.Module, x: torch.Tensor, *layers: int) -> dict[int, torch.Tensor]:
    """What enters each of the layers of a sequential `model`, in its present modes."""
    found = {}
    for i, module in enumerate(model):
        if i in layers:
            found[i] = x
        x = module(x)
    return found


# Values


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: f"{n.__module__.split('.')[0]}-{n.__name__}")
@pytest.mark.parametrize("method", ["pooled", "layerwise"])
def test_first_layer_has_the_exact_moments_of_unequal_batches(norm, method):
    model, data = net(norm), batches(*SIZES)
    mean, var = moments(model[0](torch.cat(data)).detach())
    result = recalibrate(model, data, method)
    close(model[1].running_mean, mean)
    close(model[1].running_var, var)
    assert model[1].num_batches_tracked == 3
    assert list(result.layers) == ["1", "5"]
    assert result.batches == 3
    assert result.layers["1"].samples == 13


def test_layerwise_measures_what_inference_sees():
    model, data = net(), batches(*SIZES)
    result = recalibrate(model, data, "layerwise")
    seen = inputs_of(model.eval(), torch.cat(data), 1, 5)
    for i in (1, 5):
        mean, var = moments(seen[i].detach())
        close(model[i].running_mean, mean, 1e-6)
        close(model[i].running_var, var, 1e-6)
    assert result.passes == 2


def test_layerwise_does_not_depend_on_the_batches():
    data = batches(12)
    model = net()
    other = copy.deepcopy(model)
    recalibrate(model, data, "layerwise")
    recalibrate(other, list(data[0].split([1, 4, 7])), "layerwise")
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        if a.is_floating_point():
            close(a, b, 1e-6)


def test_pooled_later_layers_see_batch_statistics():
    model, data = net(), batches(*SIZES)
    reference = copy.deepcopy(model).train()
    reference[3].eval()
    seen = torch.cat([inputs_of(reference, x, 5)[5].detach() for x in data])
    recalibrate(model, data)
    mean, var = moments(seen)
    close(model[5].running_mean, mean, 2e-6)
    close(model[5].running_var, var, 2e-6)


def test_batch_is_the_mean_over_batches():
    model, data = net(), batches(*SIZES)
    each = [moments(model[0](x).detach()) for x in data]
    recalibrate(model, data, "batch")
    close(model[1].running_mean, torch.stack([m for m, _ in each]).mean(0))
    close(model[1].running_var, torch.stack([v for _, v in each]).mean(0))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_moving_is_what_training_does(momentum):
    model, data = net(), batches(*SIZES)
    for layer in (model[1], model[5]):
        layer.momentum = momentum
    reference = copy.deepcopy(model).train()
    reference[3].eval()
    with torch.no_grad():
        for x in data:
            reference(x)
    recalibrate(model, data, "moving")
    for a, b in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2), (5, 4, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_dimension_as_root(shape, dtype):
    dimension = max(len(shape) - 2, 1)
    layer = getattr(nn, f"BatchNorm{dimension}d")(4, dtype=dtype)
    data = [torch.randn(shape, dtype=dtype) * 3 - 1 for _ in range(3)]
    mean, var = moments(torch.cat(data))
    recalibrate(layer, data)
    close(layer.running_mean, mean)
    close(layer.running_var, var)


def test_large_mean_does_not_cancel():
    layer = nn.BatchNorm1d(3)
    data = [torch.randn(50, 3) * 0.1 + 3000 for _ in range(4)]
    mean, var = moments(torch.cat(data))
    recalibrate(layer, data)
    close(layer.running_mean, mean)
    close(layer.running_var, var)


def test_channels_last_and_bfloat16_input():
    layer = nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    recalibrate(layer, [x])
    mean, var = moments(x)
    close(layer.running_mean, mean)
    close(layer.running_var, var)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.norm(x) * 2 + 1)


@pytest.mark.parametrize("method", ["pooled", "layerwise"])
def test_a_layer_called_twice_pools_its_calls(method):
    model, x = Twice(), torch.randn(20, 3) * 3 + 2
    first = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * 2 + 1
    result = recalibrate(model, [x], method)
    mean, var = moments(torch.cat([x, first]))
    close(model.norm.running_mean, mean, 1e-6)
    close(model.norm.running_var, var, 1e-6)
    assert result.layers["norm"].batches == 2


def test_one_sample_batches():
    """A batch of one value a channel is normalized with the running statistics, and counts in the pool."""
    model = randomized(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
    data = list(torch.randn(9, 3).split(1))
    recalibrate(model, data)
    mean, var = moments(torch.cat(data))
    close(model[0].running_mean, mean)
    close(model[0].running_var, var)
    result = recalibrate(model, data, "batch")
    assert set(result.skipped) == {"0", "1"}
    assert "one value" in result.skipped["0"]
    assert not result.not_run


def test_an_empty_batch_counts_for_nothing():
    layer, x = nn.BatchNorm1d(3), torch.randn(6, 3)
    result = recalibrate(layer, [x, x[:0]])
    close(layer.running_mean, moments(x)[0])
    assert result.layers[""].batches == 1


# Layers with statistics of another kind


def test_only_the_current_domain_is_measured():
    layer, x = bnkit.nn.DomainBatchNorm(3, ("a", "b")), torch.randn(6, 3) + 2
    with bnkit.nn.use_domain(layer, "b"):
        recalibrate(layer, [x])
    close(layer.running_means[1], moments(x)[0])
    close(layer.running_vars[1], moments(x)[1])
    assert not layer.running_means[0].any()
    assert sorted(layer.state_dict()) == ["batches_tracked", "bias", "running_means", "running_vars", "weight"]
    result = recalibrate(layer, [x], forward=lambda model, batch: model(batch, domain="b"))
    assert result.not_run == [""]


@pytest.mark.parametrize("method", ["pooled", "layerwise"])
def test_calls_in_another_domain_do_not_count(method):
    model = nn.Sequential(bnkit.nn.DomainBatchNorm(3, ("a", "b")), bnkit.nn.DomainBatchNorm(3, ("a", "b")))
    data = [(torch.randn(6, 3), "a"), (torch.randn(4, 3) + 10, "b")]

    def in_its_domain(model, batch):
        with bnkit.nn.use_domain(model, batch[1]):
            return model(batch[0])

    recalibrate(model, data, method, forward=in_its_domain)
    close(model[0].running_means[0], moments(data[0][0])[0])
    assert not model[0].running_means[1].any()


def test_a_domain_named_in_the_call_is_normalized_with_its_own():
    model = nn.Sequential(bnkit.nn.DomainBatchNorm(3, ("a", "b")), bnkit.nn.DomainBatchNorm(3, ("a", "b")))
    x = torch.randn(6, 3) + 10

    def named(model, x):
        with bnkit.nn.use_domain(model, "a"):
            return model[1](model[0](x, domain="b"), domain="b")

    with bnkit.nn.use_domain(model, "b"):
        recalibrate(model, [x], forward=named)
    close(model[0].running_means[1], moments(x)[0])
    torch.testing.assert_close(model[1].running_means[1], torch.zeros(3), rtol=0, atol=1e-5)


def test_undo_knows_the_domain():
    layer = bnkit.nn.DomainBatchNorm(3, ("a", "b"))
    before = buffers(layer)
    with bnkit.nn.use_domain(layer, "b"):
        result = recalibrate(layer, [torch.randn(6, 3) + 2])
    assert not same(before, layer.buffers())
    result.undo()
    assert same(before, layer.buffers())


@pytest.mark.parametrize(
    "call",
    [
        lambda m, b: m(b[0], b[1]),
        lambda m, b: m(b[0], mask=b[1][:, None]),
        lambda m, b: m(mask=b[1], input=b[0]),
    ],
)
def test_padding_does_not_count(call):
    layer, x, mask = bnkit.nn.MaskedBatchNorm(3), torch.randn(4, 3, 5), torch.rand(4, 5) < 0.6
    recalibrate(layer, [(x, mask)], forward=call)
    mean, var = moments(x.movedim(1, -1)[mask])
    close(layer.running_mean, mean)
    close(layer.running_var, var)


def test_time_steps_are_left_to_training():
    result = recalibrate(bnkit.nn.RecurrentBatchNorm(3, max_length=2), [torch.randn(4, 2, 3)])
    assert "time step" in result.skipped[""]


# What stays as it was


def test_buffers_are_written_in_place_and_nothing_else_changes():
    model = net().train()
    model[3].eval()
    tensors = list(model.buffers())
    parameters = [p.clone() for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    model[1].momentum = None
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    recalibrate(model, batches(5, 5), "layerwise")
    assert all(a is b for a, b in zip(model.buffers(), tensors, strict=True))
    assert same(parameters, model.parameters())
    assert flags == [m.training for m in model.modules()]
    assert model[1].momentum is None
    assert model[5].momentum == 0.1
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_raising_loader_leaves_everything_as_it_was(method, error):
    model = net().train()

    class Loader:
        def __iter__(self):
            yield from batches(4, 4)
            raise error("the loader's own")

    before, tensors = buffers(model), list(model.buffers())
    with pytest.raises(error, match="the loader's own"):
        recalibrate(model, Loader(), method)
    assert same(before, model.buffers())
    assert all(a is b for a, b in zip(model.buffers(), tensors, strict=True))
    assert all(m.training for m in model.modules())
    assert not model[1]._forward_pre_hooks
    assert not model[1]._forward_hooks
    assert model[1].momentum == 0.1


def test_an_interrupted_write_is_taken_back(monkeypatch):
    model = net()
    before, originals, calls, copy_ = buffers(model), list(model.buffers()), [], torch.Tensor.copy_

    def interrupted(self, *arguments):
        if any(self is buffer for buffer in originals):
            calls.append(self)
            if len(calls) == 3:
                raise KeyboardInterrupt
        return copy_(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches(5))
    assert len(calls) > 3
    assert same(before, model.buffers())


def test_frozen_layers_stay():
    model = net().train()
    model[1].eval()
    before = buffers(model[1])
    result = recalibrate(model, batches(5))
    assert same(before, model[1].buffers())
    assert list(result.layers) == ["5"]
    assert "frozen" in result.skipped["1"]
    assert "frozen" in repr(result)


def test_in_a_model_in_eval_mode_none_is_frozen_but_by_class():
    model = net().eval()
    model[1] = bnkit.nn.FrozenBatchNorm2d(6)
    result = recalibrate(model, batches(5))
    assert list(result.layers) == ["5"]
    assert "FrozenBatchNorm2d" in result.skipped["1"]
    assert not any(m.training for m in model.modules())


def test_without_running_statistics():
    model = net()
    model[1] = nn.BatchNorm2d(6, track_running_stats=False)
    result = recalibrate(model, batches(5))
    assert result.skipped == {"1": "keeps no running statistics"}


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = randomized(nn.BatchNorm1d(3)), randomized(nn.BatchNorm1d(3))

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_layer_that_never_runs_is_reported_not_zeroed(method):
    model = Unused()
    before = buffers(model.unused)
    result = recalibrate(model, [torch.randn(5, 3)], method)
    assert same(before, model.unused.buffers())
    assert result.not_run == ["unused"]
    assert "unused" in repr(result)


# Data


def test_short_loader_is_reported():
    model = net()
    result = recalibrate(model, batches(3, 3), num_batches=5)
    assert result.short
    assert result.batches == 2
    assert "5 batches were asked for" in repr(result)
    assert not recalibrate(model, batches(3, 3), num_batches=2).short
    assert recalibrate(model, batches(3, 3), num_batches=1).batches == 1


@pytest.mark.parametrize("method", list(METHODS))
def test_no_data_changes_nothing(method):
    model = net()
    before = buffers(model)
    result = recalibrate(model, [], method)
    assert same(before, model.buffers())
    assert result.batches == 0
    assert result.not_run == ["1", "5"]


class Stream(torch.utils.data.IterableDataset):
    """Samples that come from somewhere, nobody knows how many."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


@pytest.mark.parametrize("method", ["pooled", "layerwise"])
def test_a_loader_of_a_data_set_without_a_length(method):
    x, totals = torch.randn(10, 3), []
    layer = nn.BatchNorm1d(3)
    loader = torch.utils.data.DataLoader(Stream(x), batch_size=4)
    result = recalibrate(layer, loader, method, progress=lambda done, total: totals.append(total))
    close(layer.running_var, moments(x)[1])
    assert result.batches == 3
    assert totals == [None] * 3


def test_pairs_dicts_forward_and_a_bare_tensor():
    x = torch.randn(6, 3)
    expected = moments(x)[0]

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, image):
            return self.norm(input=image)

    for data, forward in (
        ([(x, 0)], None),
        ([{"image": x}], None),
        ({"image": x}, None),
        (x, None),
        ([(0, x)], lambda model, batch: model(batch[1])),
    ):
        model = Named()
        recalibrate(model, data, forward=forward)
        close(model.norm.running_mean, expected)


def test_layerwise_with_data_that_come_once():
    model, data = net(), batches(4, 3)
    other = copy.deepcopy(model)
    recalibrate(model, iter(data), "layerwise")
    recalibrate(other, data, "layerwise")
    assert same(buffers(model), other.buffers())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", list(METHODS))
def test_nonfinite_batches_are_refused_or_left_out(value, method):
    model, data = net(), batches(4, 4, 4)
    data[1][0, 0, 0, 0] = value
    before = buffers(model)
    with pytest.raises(UserError, match=r"must be finite.*skip_nonfinite=True"):
        recalibrate(model, data, method)
    assert same(before, model.buffers())
    other = copy.deepcopy(model)
    result = recalibrate(model, data, method, skip_nonfinite=True)
    assert result.nonfinite == [1]
    assert "left out, not finite: 1 batch" in repr(result)
    recalibrate(other, [data[0], data[2]], method)
    assert same(buffers(model), other.buffers())


# The forward passes


def test_stops_at_the_last_layer_and_builds_no_graph():
    model = net()
    head, grads = [], []
    model[7].register_forward_hook(lambda *_: head.append(1))
    model[4].register_forward_hook(lambda m, x, y: grads.append(y.requires_grad))
    recalibrate(model, batches(4, 4, 4))
    assert head == [1]  # the first pass runs to the end, to see what is last
    assert grads == [False] * 3


def test_a_model_that_catches_exceptions_does_not_notice():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            try:
                return self.norm(x)
            except Exception:  # pragma: no cover
                raise AssertionError("a model must not see how the pass ends") from None

    recalibrate(Careful(), [torch.randn(4, 3)] * 3)


class Gated(nn.Module):
    """Runs its second layer for some batches only, and its first twice for others."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.a(x)
        if len(x) == 5:
            y = self.b(x)
        if len(x) == 6:
            y = self.a(x + 1)
        return y


def test_control_flow_by_batch():
    x, y, z = (torch.randn(n, 3) for n in (4, 5, 6))
    model = Gated()
    result = recalibrate(model, [x, z, y])
    close(model.a.running_mean, moments(torch.cat([x, y, z, z + 1]))[0])
    close(model.b.running_mean, moments(y)[0])
    assert (result.layers["a"].batches, result.layers["b"].batches) == (4, 1)


class Steps(nn.Module):
    """Runs its layer once for each step of a sequence, and as often as a batch may say."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, times=1):
        for _ in range(times):
            for step in x.unbind(1):
                self.norm(step)


@pytest.mark.parametrize("method", ["pooled", "batch", "layerwise"])
def test_a_layer_that_runs_once_for_some_batches(method):
    data = [torch.randn(4, steps, 3) + torch.arange(steps)[:, None] for steps in (1, 5, 1, 3)]
    model = Steps()
    result = recalibrate(model, data, method)
    assert result.layers["norm"].batches == 10
    steps = [x[:, i] for x in data for i in range(x.shape[1])]
    close(model.norm.running_mean, moments(torch.cat(steps))[0])


def test_a_batch_that_says_how_often():
    x, y = torch.randn(4, 1, 3), torch.randn(4, 1, 3) + 9
    model = Steps()
    recalibrate(model, [{"x": x, "times": 1}, {"x": y, "times": 3}])
    close(model.norm.running_mean, moments(torch.cat([x[:, 0], *[y[:, 0]] * 3]))[0])


@pytest.mark.parametrize("method", list(METHODS))
def test_another_default_device(method):
    model, data = net(), batches(4, 3)
    other = copy.deepcopy(model)
    _kernel._zeros.cache_clear()
    with torch.device("meta"):
        recalibrate(model, data, method)
    recalibrate(other, data, method)
    assert same(buffers(other), model.buffers())


def test_compiled_and_wrapped_models():
    model, data = net(), batches(4, 3)
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    compiled(data[0])
    result = recalibrate(compiled, data)
    recalibrate(other, data)
    assert same(buffers(other), model.buffers())
    assert list(result.layers) == ["1", "5"]
    model[0].compile(backend="eager")
    recalibrate(nn.DataParallel(model), data)
    assert same(buffers(other), model.buffers())


def test_a_forward_of_the_instance_s_own_is_used_and_kept():
    layer, x = nn.BatchNorm2d(3), batches(5)[0]
    own = layer.forward = lambda input: nn.BatchNorm2d.forward(layer, input) + 1
    second = nn.BatchNorm2d(3)
    recalibrate(nn.Sequential(layer, second), [x])
    assert layer.forward is own
    close(layer.running_mean, moments(x)[0])
    close(second.running_mean, torch.ones(3))


def test_hooks_of_the_user_s_run_and_count():
    layer, x, seen = nn.BatchNorm2d(3), batches(5)[0], []
    layer.register_forward_pre_hook(lambda layer, arguments: (arguments[0] * 2,))
    layer.register_forward_hook(lambda layer, arguments, output: seen.append(output))
    recalibrate(layer, [x])
    close(layer.running_mean, moments(x * 2)[0])
    assert len(seen) == 1


def test_layers_compiled_one_by_one():
    model, data = net(), batches(4, 3)
    other = copy.deepcopy(model)
    model[1].compile(backend="eager")
    model(data[0])
    model.load_state_dict(other.state_dict())
    recalibrate(model, data)
    recalibrate(other, data)
    assert same(buffers(other), model.buffers())


@pytest.mark.parametrize("training", [True, False])
def test_between_a_forward_pass_and_its_backward_pass(training):
    model, (x, other) = net(bnkit.nn.BatchNorm2d).train(training), batches(5, 4)
    model[3].eval()
    parameters, upstream = list(model.parameters()), torch.randn(5, 7)
    expected = torch.autograd.grad(model(x), parameters, upstream)
    y = model(x)
    recalibrate(model, [other])
    assert same(expected, torch.autograd.grad(y, parameters, upstream))
    model = net(nn.BatchNorm2d).train(training)
    y = model(x)
    recalibrate(model, [other])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(upstream)


# Errors, report


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_buffers_are_refused(dtype):
    with pytest.raises(UserError, match=r"must be float32 or float64, those of 1 are .*float16: call \.float\(\)"):
        recalibrate(net().to(dtype), batches(4))


def test_other_errors():
    with pytest.raises(UserError, match="unknown method 'poolt': did you mean pooled"):
        recalibrate(net(), batches(4), "poolt")
    with pytest.raises(UserError, match="num_batches must not be negative, nor a fraction, got -1"):
        recalibrate(net(), batches(4), num_batches=-1)
    with pytest.raises(UserError, match=r"nor a fraction, got 2\.5"):
        recalibrate(net(), batches(4), num_batches=2.5)
    with pytest.raises(UserError, match="distributed=True needs a process group"):
        recalibrate(net(), batches(4), distributed=True)
    with pytest.raises(UserError, match="run the model once"):
        recalibrate(nn.Sequential(nn.LazyBatchNorm2d()), batches(4))


def test_statistics_that_are_nan():
    model, data = net(), batches(4, 5)
    for method in ("pooled", "batch", "layerwise"):
        model[1].running_var.fill_(float("nan"))
        recalibrate(model, data, method)
        assert all(b.isfinite().all() for b in model.buffers())
    model[1].running_var.fill_(float("nan"))
    with pytest.raises(UserError, match="got NaN or infinity in those of 1: take another method"):
        recalibrate(model, data, "moving")


def test_batch_norms_without_modules_are_refused():
    model, (x,) = net().eval(), batches(4)
    for made in (torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
        with pytest.raises(UserError, match="scripted or exported model has none: measure in the model that it was"):
            recalibrate(made, [x])


def test_report_and_undo():
    model = net()
    before = buffers(model)
    result = recalibrate(model, batches(4, 4))
    drift = result.layers["1"]
    assert torch.equal(drift.before[0], before[0])
    assert torch.equal(drift.after[0], model[1].running_mean)
    lines = repr(result).splitlines()
    assert lines[0] == "Recalibration: 2 layers from 2 batches, pooled"
    assert lines[1].split() == ["layer", "channels", "mean", "shift/σ", "var", "ratio", "W₂/σ"]
    assert lines[2].split()[:2] == ["1", "6"]
    result.undo()
    assert same(before, model.buffers())


def test_drift_by_hand():
    layer = nn.BatchNorm1d(1)
    layer.running_mean.fill_(1.0)
    layer.running_var.fill_(4.0)
    drift = recalibrate(layer, [torch.tensor([[-1.0], [1.0], [3.0]])]).layers[""]  # mean 1, variance 4
    assert drift.distance == pytest.approx(0, abs=1e-7)
    drift = recalibrate(layer, [torch.tensor([[5.0], [6.0], [7.0]])]).layers[""]  # mean 6, variance 1
    assert drift.mean_shift == pytest.approx(2.5)
    assert drift.var_ratio == pytest.approx(0.25)
    assert drift.distance == pytest.approx((25 + 1) ** 0.5 / 2)


def test_a_model_without_batch_norm():
    result = recalibrate(nn.Linear(3, 3), [torch.randn(4, 3)])
    assert result.layers == {}


def test_progress(capsys):
    calls = []
    recalibrate(net(), batches(4, 4), "layerwise", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    recalibrate(net(), batches(4, 4), progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bnkit.nn.BatchNorm2d], ids=["torch", "bnkit"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_read_and_normalized_at_once_is_what_the_layer_does(monkeypatch, norm, layout):
    """The kernel's way and the layers' own: same statistics, and no trace in the model."""
    model = net(norm)
    data = [x.contiguous(memory_format=layout) for x in batches(5, 3, 7)]
    other = copy.deepcopy(model)
    recalibrate(model, data)
    assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.setattr(_measure, "does_as_known", lambda layer: False)
    recalibrate(other, data)
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not cpu.available(), reason="the kernels are not installed")
def test_residual_and_activation_at_once():
    layer = randomized(bnkit.nn.BatchNorm2d(3, activation="relu"))
    x, residual = torch.randn(2, 4, 3, 5, 5).unbind()
    y, found = _kernel.normalized(layer, x, residual)
    true_mean, true_var = moments(x)
    close(found.mean, true_mean)
    close(found.variance(unbiased=True), true_var)
    shape = (1, 3, 1, 1)
    z = (x.double() - true_mean.view(shape)) / (x.double().var((0, 2, 3), correction=0).view(shape) + 1e-5).sqrt()
    z = layer.weight.double().view(shape) * z + layer.bias.double().view(shape) + residual.double()
    torch.testing.assert_close(y.double(), z.relu(), rtol=1e-5, atol=1e-5)


def test_what_the_kernel_leaves_to_the_layer():
    layer = nn.BatchNorm2d(3)
    assert _kernel.normalized(layer, torch.randn(1, 3, 1, 1)) is None  # one value a channel
    assert _kernel.normalized(layer, torch.randn(0, 3, 2, 2)) is None
    assert _kernel.normalized(layer, torch.randn(2, 4, 2, 2)) is None  # the layer says what is wrong with it
    assert _kernel.normalized(bnkit.nn.BatchNorm2d(3, activation="elu"), torch.randn(2, 3, 2, 2)) is None
    assert not _kernel.does_as_known(bnkit.nn.DomainBatchNorm(3, 2))
