"""The record of a forward pass, fact by fact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnkit.graph import Record, record, tensors_in
from bnkit.graph._feed import apply, feed


class Net(nn.Module):
    """Two layers and a norm, put together by a function."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.9)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def recorded(function: object, *, training: bool = False) -> tuple[Net, Record]:
    model = Net(function).train(training)
    return model, record(model, torch.ones(2, 3, 4, 4))


def names(facts: Record) -> list[str]:
    return [operator.name for operator in facts.operators]


def test_who_made_and_who_read_each_value():
    model, facts = recorded(lambda m, x: F.relu(m.bn(y := m.conv(x))) + y)
    assert names(facts) == ["conv2d", "batch_norm", "relu", "add"]
    conv, norm, relu, add = facts.operators
    assert conv.outputs[0].readers == [norm, add]
    assert [value.name for value in conv.inputs] == [None, "conv.weight", "conv.bias"]
    assert norm.inputs[0].maker is conv
    assert relu.inputs[0].maker is norm
    assert set(add.inputs) == {relu.outputs[0], conv.outputs[0]}
    assert [call.name for call in facts.calls] == ["", "conv", "bn"]
    assert conv.call.module is model.conv
    assert relu.call.module is model
    assert conv.argument(3, "stride") == (1, 1)
    assert add.outputs[0].returned
    assert not conv.outputs[0].escapes
    assert facts.held["conv.weight"].readers == [conv]


def test_modules_are_counted_and_their_inputs_known():
    model, facts = recorded(lambda m, x: m.conv(m.conv(x)))
    first, second = facts.calls_of(model.conv)
    assert first.outputs == second.inputs
    assert facts.calls_of(model.bn) == []
    assert len(facts.held["conv.weight"].readers) == 2


def test_writing_in_place_makes_another_value():
    _, facts = recorded(lambda m, x: m.conv(x).add_(1).relu_())
    conv, add, relu = facts.operators
    assert (add.name, relu.name) == ("add", "relu")
    assert add.inputs == conv.outputs
    assert add.outputs[0] is not conv.outputs[0]
    assert relu.inputs == add.outputs


def test_writing_through_a_view_leaves_the_base_without_a_maker():
    def write(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x)
        y[0].zero_()
        return m.bn(y)

    _, facts = recorded(write)
    assert names(facts) == ["conv2d", "getitem", "zero", "batch_norm"]
    assert facts.operators[-1].inputs[0].maker is None


def test_setting_an_item_is_a_write():
    def write(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x)
        y[0] = 0
        return m.bn(y)

    _, facts = recorded(write)
    assert facts.operators[-1].inputs[0].maker.name == "setitem"


def test_asking_for_a_shape_reads_nothing_but_a_value_does():
    _, facts = recorded(lambda m, x: y if (y := m.conv(x)).shape[0] > 1 and y.dim() == 4 and y.dtype else x)
    assert names(facts) == ["conv2d"]
    _, facts = recorded(lambda m, x: y if (y := m.conv(x)).sum().item() > -1e9 else x)
    assert names(facts) == ["conv2d", "sum", "item"]


def test_what_does_nothing_hands_its_input_on():
    _, facts = recorded(lambda m, x: m.drop(m.conv(x)).contiguous())
    assert names(facts) == ["conv2d"]
    assert facts.operators[0].outputs[0].returned
    _, facts = recorded(lambda m, x: m.drop(m.conv(x)), training=True)
    assert names(facts) == ["conv2d", "dropout"]


def test_what_the_model_keeps_is_seen():
    def keep(m: Net, x: Tensor) -> Tensor:
        m.kept = {"y": m.conv(x)}
        return m.kept["y"].sum() * 1

    _, facts = recorded(keep)
    assert [operator.outputs[0].kept for operator in facts.operators] == [True, False, False]


def test_outputs_in_any_structure_are_seen():
    class Custom:
        def __init__(self, y: Tensor) -> None:
            self.inside = [{"y": y}]
            self.me = self

    for wrap in (lambda y: {"a": [y, 1]}, lambda y: (None, y), Custom):
        _, facts = recorded(lambda m, x, wrap=wrap: wrap(m.conv(x)))
        assert facts.operators[0].outputs[0].returned


def test_scripted_parts_are_seen_as_kernels():
    @torch.jit.script
    def scripted(x: Tensor) -> Tensor:
        return torch.relu(x) + 1

    _, facts = recorded(lambda m, x: scripted(m.conv(x)))
    assert facts.operators[0].outputs[0].readers
    assert names(facts)[0] == "conv2d"


def test_compiled_parts_run_as_they_are():
    class Compiled(Net):
        def __init__(self, function: object) -> None:
            super().__init__(function)
            self.inner = torch.compile(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), backend="aot_eager")

    model = Compiled(lambda m, x: m.inner(m.conv(x))).eval()
    assert names(record(model, torch.ones(2, 3, 4, 4))) == ["conv2d", "conv2d", "relu"]


def test_tied_memory_and_several_names():
    model = Net(lambda m, x: m.bn(m.conv(x)))
    model.alias = model.bn
    model.other = nn.Conv2d(3, 3, 1)
    model.other.weight = model.conv.weight
    model.view = nn.Parameter(model.conv.bias.detach()[:2])
    facts = record(model.eval(), torch.ones(2, 3, 4, 4))
    assert facts.names[model.bn] == ["bn", "alias"]
    assert {"conv.weight", "other.weight", "conv.bias", "view"} == set(facts.tied)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails):
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x + torch.rand(())))
        if fails:
            raise ZeroDivisionError
        return y

    model = Net(run).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    if fails:
        with pytest.raises(ZeroDivisionError):
            record(model, torch.ones(2, 3, 4, 4))
    else:
        record(model, torch.ones(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()
    for module in model.modules():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_call_that_fails_and_is_caught_leaves_the_stack_right():
    def run(m: Net, x: Tensor) -> Tensor:
        try:
            m.conv(x[:, :2])
        except RuntimeError:
            return m.bn(x) + 1
        raise AssertionError

    _, facts = recorded(run)
    assert facts.operators[-1].call.name == ""
    assert facts.calls_of(facts.operators[-1].call.module)[0].parent is None


def test_recording_holds_no_activation():
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3))).eval()
    facts = record(model, torch.ones(2, 3, 4, 4))
    del facts.output
    import gc

    gc.collect()
    shapes = [t.shape for t in gc.get_objects() if isinstance(t, Tensor) and t.shape == (2, 3, 4, 4)]
    assert shapes == []


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return a if b is None else a + b


def test_how_a_model_is_called():
    x = torch.ones(2)
    one, two = nn.Identity(), Two()
    assert torch.equal(feed(two, x), x)
    assert torch.equal(feed(two, (x, x)), x)
    assert torch.equal(feed(two, [x, x]), x)
    assert torch.equal(feed(two, {"a": x, "b": x}), x + x)
    assert torch.equal(feed(two, {"img": x}, lambda model, batch: model(batch["img"])), x)
    assert torch.equal(apply(two, (x, x)), x + x)
    assert torch.equal(apply(one, (x, x)), x)
    assert torch.equal(apply(two, [x, x]), x)
    with pytest.raises(ValueError, match="a batch must be a tensor"):
        feed(two, 3)


def test_tensors_in_keeps_an_order():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    found = list(tensors_in({"x": [a, (b, None, "text")], "y": c}))
    assert all(first is second for first, second in zip(found, (a, b, c), strict=True))


@pytest.mark.parametrize(("write", "views"), [
    (lambda y: y.add_(1), []),
    (lambda y: y.flatten(1).add_(1), ["flatten"]),
    (lambda y: y.data.add_(1), ["data"]),
    (lambda y: y.detach()[:, 0].zero_(), ["detach", "getitem"]),
], ids=["itself", "view", "data", "detached"])  # fmt: skip
def test_writes_in_place_are_known_by_the_memory_they_change(write, views):
    _, facts = recorded(lambda m, x: ((y := m.conv(x)), m.bn(y), write(y))[1])
    conv, norm, *between, writer = facts.operators
    memory = conv.outputs[0].memory
    assert [operator.name for operator in between] == views
    assert all(operator.outputs[0].memory is memory for operator in (*between, writer))
    assert writer.writes == {memory}
    assert not any(operator.writes for operator in (conv, norm, *between))
    assert norm.outputs[0].memory is not memory


def test_what_is_written_through_another_tensor_stays_in_its_memory():
    _, facts = recorded(lambda m, x: ((y := m.conv(x)), y.flatten(1).add_(1), F.relu(y))[2])
    conv, *_, relu = facts.operators
    assert relu.inputs[0] is not conv.outputs[0]
    assert relu.inputs[0].memory is conv.outputs[0].memory


def test_strides_are_known_but_of_sparse_values():
    _, facts = recorded(lambda m, x: m.conv(x).transpose(1, 2).to_sparse())
    conv, transpose, sparse = (operator.outputs[0] for operator in facts.operators)
    assert conv.strides == (48, 16, 4, 1)
    assert transpose.strides == (48, 4, 16, 1)
    assert sparse.strides == ()
