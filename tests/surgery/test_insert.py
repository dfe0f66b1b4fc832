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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_norm_of_ones_own_gets_type_and_gradients_of_a_named_one(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).to(dtype)
    model[0].weight.requires_grad_(False)
    data = batches(3, 5, 5, dtype=dtype)
    own, named = (insert(model, data, norm=norm).model for norm in (nn.BatchNorm2d, "batch"))
    for index in (0, 2):
        assert type(own[index].bn) is nn.BatchNorm2d
        for (name, found), (_, expected) in zip(
            own[index].bn.named_parameters(), named[index].bn.named_parameters(), strict=True
        ):
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
            assert found.requires_grad == expected.requires_grad == (index == 2), name
            assert torch.equal(found, expected), name
    torch.testing.assert_close(own.eval()(data[0]), named.eval()(data[0]))


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
    with pytest.raises(UserError, match="must not be empty, but 0 got none: check the loader"):
        insert(model, x[:0])


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


ACTIVATIONS = [
    nn.Threshold(0.1, 0), nn.ReLU(), nn.RReLU(), nn.Hardtanh(), nn.ReLU6(), nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh(),
    nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.ELU(), nn.CELU(), nn.SELU(), nn.GLU(1), nn.GELU(), nn.Hardshrink(),
    nn.LeakyReLU(), nn.LogSigmoid(), nn.Softplus(), nn.Softshrink(), nn.PReLU(), nn.Softsign(), nn.Tanhshrink(),
]  # fmt: skip
SPATIAL = ["MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool"]
BETWEEN = {
    **{type(layer).__name__: (2, layer) for layer in ACTIVATIONS},
    **{f"{name}{dims}d": (dims, getattr(nn, f"{name}{dims}d")(2)) for name in SPATIAL for dims in (1, 2, 3)},
    **{f"LPPool{dims}d": (dims, getattr(nn, f"LPPool{dims}d")(2.0, 2)) for dims in (1, 2, 3)},
    "AvgPool2d with padding": (2, nn.AvgPool2d(3, padding=1)),
    "FractionalMaxPool2d": (2, nn.FractionalMaxPool2d(2, output_size=2)),
    "FractionalMaxPool3d": (3, nn.FractionalMaxPool3d(2, output_size=2)),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_a_norm_behind_an_activation_or_pooling_is_seen(case):
    dims, between = BETWEEN[case]
    convolution, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"InstanceNorm{dims}d")
    channels = 2 if isinstance(between, nn.GLU) else 4
    model = nn.Sequential(convolution(3, 4, 1), between, norm(channels), convolution(channels, 2, 1)).double()
    result = insert(model, batches(3, *[5] * dims))
    assert result.changed == {}
    assert result.skipped["0"] == "2 already normalizes it"


FUNCTIONS = {
    "in place": lambda y: F.hardtanh_(y),
    "of torch": lambda y: torch.selu(y),
    "dropout": lambda y: F.alpha_dropout(F.dropout3d(F.feature_alpha_dropout(y))),
    "indices too": lambda y: F.max_pool2d(y, 2, return_indices=True)[0],
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_norm_behind_functions_is_seen(case):
    result = insert(Net(lambda m, x: m.batch(FUNCTIONS[case](m.a(x)))), batches(3, 6, 6))
    assert result.skipped["a"] == "batch already normalizes it"


@pytest.mark.parametrize("with_data", [True, False])
def test_a_layer_that_returns_a_tuple_is_left_alone(with_data):
    class Pair(nn.Conv2d):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return super().forward(x), None

    class Unpacking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.plain, self.last = Pair(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.plain(self.pair(x)[0].relu()).relu())

    model, x = Unpacking().double(), batches(3, 5, 5)[0]
    with warnings.catch_warnings(record=True):
        result = insert(model, [x] if with_data else None, example=x)
    assert result.skipped["pair"] == "its output is not a tensor"
    assert set(result.changed) == {"plain"}
    assert_same(result.model, model, x)


def test_a_model_that_writes_to_its_input():
    model = Net(lambda m, x: m.b(m.a(x.mul_(2)).relu()))
    data = batches(3, 5, 5)
    before = [x.clone() for x in data]
    result = insert(model, data)
    assert set(result.changed) == {"a", "b"}
    assert all(torch.equal(x, old) for x, old in zip(data, before, strict=True))
    torch.testing.assert_close(result.model.a.bn.bias, model.a(2 * torch.cat(before)).mean((0, 2, 3)))


@pytest.mark.parametrize("source", ["list", "shuffled loader", "norm that draws"])
def test_random_numbers_of_the_model_are_the_same_and_go_on_as_before(source):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(self.a(x).relu(), 0.3))  # which drops in eval mode too

    def drawing(channels: int) -> nn.Module:
        torch.rand(3)
        return nn.BatchNorm2d(channels)

    model, tensors = Noisy().double().eval(), batches(3, 5, 5)
    data = torch.utils.data.DataLoader(torch.cat(tensors), 4, shuffle=True) if "loader" in source else tensors
    state = torch.get_rng_state()
    result = insert(model, data, norm=drawing if "draws" in source else "batch")
    assert torch.equal(torch.get_rng_state(), state)
    assert result.max_error < 1e-12
    assert set(result.changed) == {"a"}


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


def test_rebind_leaves_the_norms_of_a_backbone_out_of_an_optimizer_of_the_head():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 2)
    )
    data = batches(3, 5, 5, dtype=torch.float32)
    body = torch.optim.SGD([{"params": model[2].parameters()}, {"params": model[6].parameters()}], lr=0.1)
    head = torch.optim.SGD(model[6].parameters(), lr=0.1)
    result = insert(model, data)
    new = result.model
    assert set(result.changed) == {"0", "2", "5"}
    assert result.rebind(head).param_groups[0]["params"] == [*new[6].parameters()]
    first, second = (group["params"] for group in result.rebind(body).param_groups)
    assert first == [new[2].weight, new[2].bn.weight, new[2].bn.bias]
    assert second == [*new[6].parameters()]


def test_rebind_finds_the_group_of_a_layer_whose_weight_another_holds_too():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    model.append(nn.Linear(3, 2))
    model[4].weight = model[0].weight
    optimizer = torch.optim.SGD([{"params": [model[0].weight]}, {"params": model[6].parameters()}], lr=0.1)
    result = insert(model, batches(3, dtype=torch.float32))
    new = result.model
    first, second = (group["params"] for group in result.rebind(optimizer).param_groups)
    assert set(first) == {new[0].weight, *new[0].bn.parameters(), *new[4].bn.parameters()}
    assert second == [*new[6].parameters()]


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
