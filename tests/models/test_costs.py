from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import bnkit.nn
from bnkit import models
from bnkit._checks import UserError
from bnkit.cli import app

FLOAT = 4


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize(
    ("layer", "shape", "parameters", "multiply_adds"),
    [
        # Output positions times the filter's size times channels in and out.
        (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 7), 6 * 8 * 9 + 8, 2 * 35 * 6 * 8 * 9),
        (nn.Conv2d(6, 8, 3, stride=2, bias=False), (1, 6, 9, 9), 6 * 8 * 9, 16 * 6 * 8 * 9),
        (nn.Conv2d(6, 8, (1, 5), groups=2), (3, 6, 4, 6), 3 * 8 * 5 + 8, 3 * 8 * 3 * 8 * 5),
        (nn.Conv2d(6, 6, 3, groups=6, dilation=2), (1, 6, 7, 7), 60, 9 * 6 * 9),
        (nn.Conv1d(4, 5, 3), (2, 4, 10), 65, 2 * 8 * 60),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 51, 27 * 48),
        # A transposed convolution multiplies each input with the whole filter.
        (nn.ConvTranspose2d(6, 8, 2, stride=2), (2, 6, 5, 7), 6 * 8 * 4 + 8, 2 * 35 * 6 * 8 * 4),
        (nn.ConvTranspose2d(6, 8, 3, groups=2), (1, 6, 4, 4), 3 * 8 * 9 + 8, 16 * 3 * 8 * 9),
        (nn.Linear(20, 30), (4, 20), 630, 4 * 600),
        (nn.Linear(20, 30, bias=False), (4, 7, 20), 600, 28 * 600),
        (nn.BatchNorm2d(6), (2, 6, 5, 7), 12, 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_counts_by_hand(layer: nn.Module, shape: tuple[int, ...], parameters: int, multiply_adds: int) -> None:
    found = models.costs(layer, torch.randn(shape))
    assert (found.parameters, found.multiply_adds) == (parameters, multiply_adds)


def activation_bytes(model: nn.Module, *shape: int) -> int:
    return models.costs(model, torch.randn(shape)).activation_bytes


def test_activation_memory_by_hand() -> None:
    x, y = 2 * 3 * 64 * FLOAT, 2 * 8 * 64 * FLOAT
    statistics = 2 * 8 * FLOAT
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert activation_bytes(conv, 2, 3, 8, 8) == x
    # conv keeps x, BN keeps conv's output, mean and 1/σ, ReLU keeps its own output.
    assert activation_bytes(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()), 2, 3, 8, 8) == x + 2 * y + statistics
    # In place, ReLU still overwrites what BN made, not what it kept.
    separate = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    assert activation_bytes(separate, 2, 3, 8, 8) == x + 2 * y + statistics
    # Fused, the output is kept only by what follows; a tensor that two layers keep counts once.
    fused = bnkit.nn.BatchNorm2d(8, activation="relu")
    assert activation_bytes(nn.Sequential(conv, fused), 2, 3, 8, 8) == x + y + statistics
    follower = nn.Sequential(conv, fused, nn.MaxPool2d(2))
    assert activation_bytes(follower, 2, 3, 8, 8) == x + 2 * y + statistics + y // 4 * 2  # its indices are int64
    # Without parameters nothing is kept, unless the input wants a gradient.
    two = nn.Sequential(nn.ReLU(), nn.ReLU())
    assert activation_bytes(two, 2, 8, 8, 8) == 0
    assert models.costs(two, torch.randn(2, 8, 8, 8, requires_grad=True)).activation_bytes == 2 * y


def test_what_a_real_pass_keeps_is_what_was_counted() -> None:
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    expected = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    assert models.costs(model, x).activation_bytes == expected


class Residual(nn.Module):
    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.norm = bnkit.nn.BatchNorm2d(4, activation=activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x, x * 2)


def test_bytes_that_normalization_moves() -> None:
    x = torch.randn(2, 4, 5, 5)
    size = x.nbytes
    assert models.costs(nn.BatchNorm2d(4), x).norm_bytes == 8 * size
    assert models.costs(bnkit.nn.BatchNorm2d(4, activation="relu"), x).norm_bytes == 8 * size
    assert models.costs(nn.GroupNorm(2, 4), x).norm_bytes == 8 * size
    assert models.costs(Residual("relu"), x).norm_bytes == 10 * size
    assert models.costs(nn.ReLU(), x).norm_bytes == 0
    assert models.costs(nn.BatchNorm2d(4).half(), x.half()).norm_bytes == 4 * size


def test_the_residual_is_kept_only_under_an_activation() -> None:
    x = torch.randn(2, 4, 5, 5)
    found = [models.costs(Residual(activation), x).activation_bytes for activation in (None, "relu")]
    assert found == [x.nbytes + 2 * 4 * FLOAT, 2 * x.nbytes + 2 * 4 * FLOAT]


def test_the_share_of_normalization() -> None:
    x = torch.randn(2, 4, 5, 5)
    assert models.costs(nn.BatchNorm2d(4), x).norm_share == 1
    assert models.costs(nn.ReLU(), x).norm_share == 0
    # ReLU reads and writes forward; backward it reads y and dy, and writes dx: 5 against 8.
    for norm in (nn.BatchNorm2d(4), bnkit.nn.BatchNorm2d(4)):
        found = models.costs(nn.Sequential(norm, nn.ReLU()), x.requires_grad_())
        assert found.other_bytes == 5 * x.nbytes
        assert found.norm_share == pytest.approx(8 / 13)


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "densenet121", "mobilenet_v3_small", "googlenet"])
def test_multiply_adds_are_fvcore_s(name: str) -> None:
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = on_meta(lambda: getattr(torchvision.models, name)(**options)).to_empty(device="cpu")
    x = torch.randn(1, 3, 64, 64)
    assert models.costs(model, x).multiply_adds == fvcore_s(model, x)


def fvcore_s(model: nn.Module, x: torch.Tensor) -> int:
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operators = FlopCountAnalysis(model.eval(), x).by_operator()
    return operators["conv"] + operators["linear"]


def test_multiply_adds_are_torchvision_s_published_ones() -> None:
    for name in ("alexnet", "vgg11_bn", "resnet50", "squeezenet1_0", "densenet121"):
        options = {"init_weights": False} if "vgg" in name else {}
        model = on_meta(lambda name=name, options=options: getattr(torchvision.models, name)(**options))
        meta = torchvision.models.get_model_weights(name).DEFAULT.meta
        found = models.costs(model, torch.empty(1, 3, 224, 224))
        assert found.multiply_adds / 1e9 == pytest.approx(meta["_ops"], abs=6e-4)
        assert found.parameters == meta["num_params"]


class Branching(nn.Module):
    """Calls one layer twice, shares its weight, and does work of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.inner.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return F.linear(self.tied(self.inner(self.inner(x))), self.inner.weight) * scale


def test_layers_add_up() -> None:
    found = models.costs(Branching(), torch.randn(5, 6))
    layers = {layer.name: layer for layer in found.layers}
    assert list(layers) == ["", "inner", "tied", "unused"]
    assert [layer.multiply_adds for layer in found.layers] == [180, 360, 180, 0]
    assert [layer.parameters for layer in found.layers] == [0, 42, 6, 12]
    assert layers["inner"].output == (5, 6)
    assert layers["unused"].output is None
    assert sum(layer.activation_bytes for layer in found.layers) == found.activation_bytes


def test_inputs_by_position_and_by_name() -> None:
    expected = models.costs(Branching(), torch.randn(5, 6))
    assert models.costs(Branching(), (torch.randn(5, 6), 2.0)).multiply_adds == expected.multiply_adds
    assert models.costs(Branching(), {"x": torch.randn(5, 6)}) == expected


@pytest.mark.parametrize("name", ["lenet5", "vgg11"])
def test_one_image_costs_what_a_batch_of_them_costs_each(name: str) -> None:
    # LeNet-5 normalizes vectors, so it can't train on one image.
    model = on_meta(lambda: models.create(name, "batch", 10, 1, image_size=28))
    one, two, five = (models.costs(model, torch.empty(n, 1, 28, 28)) for n in (1, 2, 5))
    for count in ("multiply_adds", "activation_bytes", "norm_bytes", "other_bytes"):
        per_image = getattr(five, count) - getattr(two, count)
        assert per_image > 0
        assert getattr(two, count) - getattr(one, count) == per_image / 3
    assert one.parameters == five.parameters == sum(p.numel() for p in model.parameters())


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    models.costs(model, torch.randn(2, 1, 5, 5))
    with pytest.raises(UserError, match="costs runs a model on tensors without values"):
        models.costs(model, torch.randn(2, 3, 5, 5))
    assert [module.training for module in model.modules()] == flags
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_reads_values_is_refused_with_the_cause() -> None:
    class Reading(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.max().item()

    with pytest.raises(UserError, match="give the input it expects, and a model that reads no values") as caught:
        models.costs(Reading(), torch.randn(2, 3))
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NotImplementedError(), "NotImplementedError"),
        (AssertionError("wrong size"), "wrong size"),
        (KeyError("a"), "'a'"),
    ],
)
def test_whatever_a_model_raises_is_the_reason(error: Exception, words: str) -> None:
    class Raising(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    with pytest.raises(UserError, match=rf"which Raising did not take \({words}\): give") as caught:
        models.costs(Raising(), torch.randn(2, 3))
    assert caught.value.__cause__ is error


def test_the_table() -> None:
    text = repr(
        models.costs(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), torch.randn(2, 3, 10, 10))
    )
    assert text.splitlines() == [
        "layer  kind         output   parameters  multiply-adds  activations  norm moves",
        "───────────────────────────────────────────────────────────────────────────────",
        "0      Conv2d       2×8×8×8         216         27,648       2.4 kB         0 B",
        "1      BatchNorm2d  2×8×8×8          16              0       4.2 kB     32.8 kB",
        "───────────────────────────────────────────────────────────────────────────────",
        "total                               232         27,648       6.6 kB     32.8 kB",
        "Normalization moves 68% of the bytes of a training step.",
    ]


def test_the_command_prints_a_table_and_json() -> None:
    result = CliRunner().invoke(app, ["models", "vgg1[13]", "--image-size", "32"])
    assert result.exit_code == 0
    assert "vgg11" in result.output
    assert "vgg13" in result.output
    assert "vgg16" not in result.output
    found = json.loads(CliRunner().invoke(app, ["models", "vgg11", "--json"]).stdout)["vgg11"]
    assert found["parameters"] == 132_868_840
    assert found["multiply_adds"] == 7_609_090_048
    assert found["image_size"] == 224
    assert 0 < found["norm_share"] < 1
    assert {layer["kind"] for layer in found["layers"]} >= {"Conv2d", "BatchNorm2d", "Linear"}


def test_the_command_says_which_models_do_not_take_the_norm() -> None:
    result = CliRunner().invoke(app, ["models", "[ls][eq]*net[15]_*", "--norm", "instance", "--json"])
    found = json.loads(result.stdout)
    assert "norm 'instance' needs images" in found["lenet5_1998"]["error"]
    assert found["squeezenet1_1"]["parameters"] > 1e6
    result = CliRunner().invoke(app, ["models", "mlp", "--norm", "instance"])
    assert result.exit_code == 2
    assert "norm 'instance' needs images" in result.stderr
    result = CliRunner().invoke(app, ["models", "nothing"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("bnkit: no model is called 'nothing': ")
