"""Insertion: the same outputs, the population's statistics, and everything else as it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkit
from bnkit import UserError
from bnkit.surgery import fold, insert


def batches(*shape: int, sizes: tuple[int, ...] = (5, 3, 7), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn((n, *shape), generator=generator, dtype=dtype) * 2 + 1 for n in sizes]


def assert_same(found: nn.Module, expected: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(found.eval()(x), expected.eval()(x), rtol=1e-10, atol=1e-10)


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 9), "BatchNorm1d"),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6), "BatchNorm2d"),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, bias=False), (4, 3, 4, 5), "BatchNorm3d"),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 7, 6), "BatchNorm2d"),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 7, 6), "BatchNorm2d"),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (4, 9), "BatchNorm1d"),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 4), "BatchNorm2d"),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (4, 3, 2, 3), "BatchNorm3d"),
    "linear": (lambda: nn.Linear(4, 6), (4,), "BatchNorm1d"),
    "linear of three dimensions": (lambda: nn.Linear(4, 6), (5, 4), "BatchNorm1d"),
    "linear of four dimensions": (lambda: nn.Linear(4, 6, bias=False), (2, 3, 4), "BatchNorm1d"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_stay_and_statistics_are_the_populations(kind):
    make, shape, norm = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).double()
    data = batches(*shape)
    model(data[0])
    before = copy.deepcopy(model.state_dict())
    result = insert(model, data)
    new = result.model
    assert result.max_error < 1e-12
    assert result.skipped == {"3": "it makes the model's output"}
    assert type(new[0].bn).__name__ == norm
    assert_same(new, model, torch.cat(data) + 3)
    y = model[0](torch.cat(data)).movedim(-1 if "linear" in kind else 1, 0).flatten(1)
    torch.testing.assert_close(new[0].bn.running_var, y.var(1), rtol=1e-10, atol=0)
    torch.testing.assert_close(new[0].bn.bias, y.mean(1), rtol=1e-10, atol=1e-12)
    bias = 0 if model[0].bias is None else model[0].bias
    torch.testing.assert_close(new[0].bn.running_mean, y.mean(1) - bias, rtol=1e-10, atol=1e-12)
    assert set(before) < set(new.state_dict())
    assert set(new.state_dict()) - set(before) == {f"0.bn.{key}" for key in new[0].bn.state_dict()}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_training_mode_is_close_with_the_whole_population_in_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    data = batches(3, 8, 8, sizes=(64,), dtype=torch.float32)
    new = insert(model, data).model.train()
    error = (new(data[0]) - model(data[0])).abs().max() / model(data[0]).abs().max()
    assert error < 2e-3  # biased variance instead of unbiased, and rounding


@pytest.mark.parametrize("norm", ["batch", "ghost", "frozen", "renorm", "sync"])
def test_every_norm(norm):
    if norm == "sync" and not hasattr(bnkit.nn, "SyncBatchNorm"):
        pytest.skip("bnkit.nn has no SyncBatchNorm")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    data = batches(3, 5, 5)
    new = insert(model.train(), data, norm=norm).model
    assert new.training
    assert_same(new, model, data[1])
    assert norm in type(new[0].bn).__name__.lower()


def test_a_norm_of_ones_own():
    data = batches(3, 5, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    new = insert(model, data, norm=lambda channels: nn.BatchNorm2d(channels, eps=0.1, dtype=torch.float64)).model
    assert new[0].bn.eps == 0.1
    assert_same(new, model, data[1])
    with pytest.raises(
        UserError, match="norm must give a layer with running statistics, weight and bias, got GroupNorm"
    ):
        insert(model, data, norm=lambda channels: nn.GroupNorm(2, channels))
    with pytest.raises(UserError, match="unknown norm 'bach': did you mean batch"):
        insert(model, data, norm="bach")


def test_without_data_it_is_the_identity_and_warns():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = batches(3)[0]
    with pytest.warns(UserWarning, match="will differ in training mode"):
        result = insert(model, example=x)
    assert_same(result.model, model, x)
    assert torch.equal(result.model[0].bn.running_var, torch.ones(4, dtype=torch.float64))
    with pytest.raises(UserError, match="pass calibration batches, or an example="):
        insert(model)
    with pytest.raises(UserError, match="at least one calibration batch"):
        insert(model, [])


@pytest.mark.parametrize("form", ["pairs", "dicts", "tensor", "generator", "forward"])
def test_forms_of_data(form):
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Net(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    tensors = batches(3)
    data = {
        "pairs": [[x, torch.zeros(len(x))] for x in tensors],
        "dicts": [{"x": x} for x in tensors],
        "tensor": torch.cat(tensors),
        "generator": (x for x in tensors),
        "forward": [{"image": x, "label": 1} for x in tensors],
    }[form]
    forward = (lambda model, batch: model(batch["image"])) if form == "forward" else None
    new = insert(model, data, forward=forward).model
    torch.testing.assert_close(new[0].bn.bias, model[0](torch.cat(tensors)).mean(0), rtol=1e-12, atol=1e-12)
    assert_same(new, model, tensors[0])


class Net(nn.Module):
    """Layers put together by a function."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.group, self.layer, self.batch = nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 2)
        self.function = function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, x).mean((2, 3)))


NORMED = {
    "batch norm": (lambda m, x: m.batch(m.a(x)), "batch"),
    "group norm behind an activation": (lambda m, x: m.group(m.a(x).relu()), "group"),
    "layer norm behind a permutation": (lambda m, x: m.layer(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "layer"),
    "function": (lambda m, x: F.layer_norm(m.a(x), (5, 5)), "layer_norm"),
    "norm behind a concatenation": (lambda m, x: m.batch(torch.cat([m.a(x)[:, :2], m.a(x)[:, 2:]], 1)), None),
    "norm behind a sum": (lambda m, x: m.batch(m.a(x) + x.mean()), "batch"),
}


@pytest.mark.parametrize("case", NORMED)
def test_layers_with_a_norm_behind_them_are_left_alone(case):
    function, norm = NORMED[case]
    result = insert(Net(function), batches(3, 5, 5))
    if norm is not None:
        assert result.skipped["a"] == f"{norm} already normalizes it"
    assert result.skipped["b"] == "it did not run on the example"
    assert result.skipped["last"] == "it makes the model's output"


USES = {
    "functional activation": lambda m, x: F.relu(m.b(F.relu(m.a(x), inplace=True))),
    "shared layer": lambda m, x: m.b(m.b(m.a(x).relu()).relu()),
    "in-place sum": lambda m, x: m.a(x).add_(m.b(m.a(x * 2)).tanh()),
    "weight and bias used by a function too": lambda m, x: m.b(F.conv2d(x, m.a.weight, m.a.bias, padding=1) + m.a(x)),
    "control flow": lambda m, x: m.b(m.a(x)) if bool(x.mean() > -9) else x,
}


@pytest.mark.parametrize("case", USES)
def test_uses_of_a_layer(case):
    model = Net(USES[case])
    result = insert(model, batches(3, 5, 5))
    assert {"a", "b"} <= set(result.changed)
    assert_same(result.model, model, batches(3, 6, 6)[0])
    assert isinstance(result.model.a.bias, nn.Parameter) == (case == "weight and bias used by a function too")


def test_statistics_of_a_shared_layer_are_those_of_all_its_uses():
    model = Net(USES["shared layer"])
    x = torch.cat(batches(3, 5, 5))
    first = model.b(model.a(x).relu())
    both = torch.cat([first, model.b(first.relu())]).transpose(0, 1).flatten(1)
    new = insert(model, batches(3, 5, 5)).model
    torch.testing.assert_close(new.b.bn.bias, both.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new.b.bn.running_var, both.var(1), rtol=1e-12, atol=1e-12)


def test_where():
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 2)).double()

    data = batches(3, 5, 5)
    assert set(insert(model(), data).changed) == {"0", "2"}
    assert set(insert(model(), data, where="2").changed) == {"2"}
    assert set(insert(model(), data, where=["0", "4"]).changed) == {"0", "4"}
    assert set(insert(model(), data, where=nn.Linear).changed) == {"4"}
    assert set(insert(model(), data, where=[nn.Linear, "0*"]).changed) == {"0", "4"}
    assert set(insert(model(), data, where=lambda name, m: getattr(m, "kernel_size", 0) == (1, 1)).changed) == {"2"}
    with pytest.raises(UserError, match="got 'features', which fits none"):
        insert(model(), data, where="features")


def test_twice_is_once_and_folding_gives_the_original_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    data = batches(3, 5, 5)
    once = insert(model, data).model
    twice = insert(once, data)
    assert twice.changed == {}
    assert "inserted before" in twice.skipped["0"]
    folded = fold(once, data[0]).model
    torch.testing.assert_close(folded[0].weight, model[0].weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded[0].bias, model[0].bias, rtol=1e-12, atol=1e-12)
    assert_same(folded, model, data[1])


def test_folding_a_linear_layer_of_three_dimensions_gives_the_original_back():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    data = batches(5, 3)
    result = fold(insert(model, data).model, data[0])
    assert result.changed == {"0.bn": "folded into 0"}
    assert_same(result.model, model, data[1])


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_the_original_network_loads(bias):
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(), nn.Conv2d(4, 2, 1)
        return nn.Sequential(*layers).double()

    data = batches(3, 5, 5)
    new, other = insert(make(0), data).model, make(1)
    state = copy.deepcopy(new.state_dict())
    assert "<All keys matched" in str(new.load_state_dict(checkpoint := other.state_dict()))
    assert list(checkpoint) == list(other.state_dict())
    assert_same(new, other, data[0])
    new.load_state_dict(state)
    assert_same(new, make(0), data[0])


def test_training_and_optimizer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = batches(3, 5, 5, dtype=torch.float32)
    model(data[0]).square().sum().backward()
    optimizer.step()
    result = insert(model, data)
    new = result.model
    result.rebind(optimizer)
    params = optimizer.param_groups[0]["params"]
    assert params == [p for p in params if p in set(new.parameters())]
    assert set(params) == set(new.parameters())
    assert "momentum_buffer" in optimizer.state[new[0].weight]
    new.train()(data[0]).square().sum().backward()
    assert new[0].bn.weight.grad is not None
    assert float(new[0].bn.num_batches_tracked) == 1


def test_fused_sgd_goes_on_with_new_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    data = batches(3, 5, 5, dtype=torch.float32)
    model(data[0]).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    result = insert(model, data)
    new = result.rebind(optimizer) and result.model.train()
    new(data[0]).square().sum().backward()
    weight, gradient = new[0].bn.weight.detach().clone(), new[0].bn.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(new[0].bn.weight.detach(), weight - 0.1 * gradient)


def test_layers_that_a_transformer_reads_without_running_them_are_left_alone():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), encoder, nn.Linear(8, 3)).eval()
    data = batches(5, 4, dtype=torch.float32)
    result = insert(model, data)
    assert set(result.changed) == {"0"}
    assert "without running it" in result.skipped["3.linear1"]
    torch.testing.assert_close(result.model.eval()(data[0]), model(data[0]), rtol=1e-4, atol=1e-5)


def test_it_pickles_copies_compiles_and_exports():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    data = batches(3, 5, 5)
    new = insert(model, data).model.eval()
    x, expected = data[0], new(data[0])
    assert isinstance(new[0], nn.Conv2d)
    assert torch.equal(pickle.loads(pickle.dumps(new))(x), expected)
    assert torch.equal(copy.deepcopy(new)(x), expected)
    torch.testing.assert_close(torch.export.export(new, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.compile(new, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_failure_changes_nothing(inplace):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    before, kinds = copy.deepcopy(model.state_dict()), [type(layer) for layer in model]
    data = batches(3, 5, 5, dtype=torch.float32)

    def breaking() -> object:
        yield data[0]
        raise ZeroDivisionError

    bad = torch.full_like(data[0], float("nan"))
    for error, arguments in (
        (UserError, {"data": data, "tolerance": 0.0}),
        (UserError, {"data": [data[0], bad]}),
        (ZeroDivisionError, {"data": breaking()}),
    ):
        with pytest.raises(error):
            insert(model, inplace=inplace, **arguments)
        assert [type(layer) for layer in model] == kinds
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model)


def test_inplace_and_frozen_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    first, weight = model[0], model[0].weight.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = insert(model, batches(3, 5, 5), inplace=True)
    assert result.model is model
    assert model[0] is first
    assert model[0].weight is weight
    assert not any(p.requires_grad for p in model[0].parameters())
