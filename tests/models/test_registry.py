"""Every registered model, with every norm that it takes.

By default each family's first model runs with batch norm, and some small ones with every norm; `pytest -m sweep` runs
the whole matrix.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnkit
from bnkit import models
from bnkit._checks import UserError
from bnkit.models._registry import _VARIANTS

SMALLER: dict[str, object] = {"growth_rate": 4, "num_init_features": 8, "width": 8, "hidden": (20, 20)}
OWN: dict[str, dict[str, object]] = {
    "mlp": {"image_size": 28},
    "lenet5": {"image_size": 28},
    "preact_resnet1001": {"init": 0.02},  # without a norm 333 blocks by He's rule leave the range of float32
    "senet154": {"depths": (1, 1, 1, 1), "width": 32, "groups": 2},
}
VECTOR_LAYERS = {"mlp", "lenet5", "lenet5_1998"}
FAMILIES = list({variant.family: name for name, variant in reversed(_VARIANTS.items())}.values())[::-1]
EVERY_NORM = {"mlp", "lenet5", "resnet20", "densenet40"}


def by_default(value: object, *others: object, if_: bool) -> Any:
    """A case of the default run if that holds, else of the sweep."""
    return pytest.param(value, *others, marks=() if if_ else pytest.mark.sweep)


def cases(norms: list[str]) -> list[Any]:
    """Pairs of a model and a norm."""
    return [
        by_default(name, norm, if_=name in EVERY_NORM or (name in FAMILIES and norm == "batch"))
        for name in models.list()
        for norm in norms
    ]


MATRIX = pytest.mark.parametrize(("name", "norm"), cases(models.norms()))
WITH_AND_WITHOUT = pytest.mark.parametrize(("name", "norm"), cases(["none", "batch"]))


def options_of(name: str) -> dict[str, Any]:
    valid = models.options(name)
    smaller = {option: value for option, value in SMALLER.items() if option in valid}
    return {"image_size": 32, "init": "kaiming", **smaller, **OWN.get(name, {})}


def small(name: str, norm: models.Norm = "batch", **options: object) -> nn.Module:
    if norm == "instance" and name in VECTOR_LAYERS:
        pytest.skip("instance norm needs maps")
    torch.manual_seed(0)
    model = models.create(name, norm, num_classes=7, in_channels=2, **{**options_of(name), **options})
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


def images(name: str, batch: int = 4) -> torch.Tensor:
    side = options_of(name)["image_size"]
    return torch.randn(batch, 2, side, side, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(N, 7), also of a network that gives them for each pixel."""
    y = model(x)
    return y.flatten(2).mean(2) if y.dim() == 4 else y


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits(model, x).float(), torch.tensor([0, 1, 2, 6]))


@MATRIX
def test_every_parameter_of_every_model_is_trained(name: str, norm: str) -> None:
    model = small(name, norm)
    y = logits(model, images(name))
    assert y.shape == (4, 7)
    y.backward(torch.randn(4, 7))
    behind = () if norm in ("none", "layer") else redundant_biases(model)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert key in behind or parameter.grad.abs().max() > 1e-12, key


def redundant_biases(model: nn.Module) -> list[str]:
    """Biases ahead of a norm, whose gradients are rounding errors."""
    return [f"{name}.bias" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]


@MATRIX
def test_a_few_steps_lower_the_loss(name: str, norm: str) -> None:
    if name == "plain110":
        pytest.skip("110 layers without shortcuts hardly train (He et al. 2015, section 4.2)")
    if (name, norm) == ("seresnet152", "none"):
        pytest.skip("152 layers without norms, their branches squeezed by sigmoids, do not train in a few steps")
    # Some of the deep and plain ones bear small steps only.
    rates = (1e-5, 1e-6, 1e-7) if norm in ("none", "frozen") else (1e-4, 1e-5, 1e-6)
    assert any(losses[-1] < losses[0] for losses in (losses_at(rate, name, norm) for rate in rates))


def losses_at(rate: float, name: str, norm: str) -> list[float]:
    model, x = small(name, norm), images(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    for _ in range(3):
        value = loss(model, x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@MATRIX
def test_a_state_dict_restores_the_model(name: str, norm: str) -> None:
    model, x = small(name, norm), images(name)
    with torch.no_grad():
        model(x)  # moves running statistics
    other = copy.deepcopy(model)
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))


@WITH_AND_WITHOUT
def test_channels_last_gives_the_same(name: str, norm: str) -> None:
    model, x = small(name, norm).double(), images(name).double()
    # In training the statistics of 4 images make this one amplify even float64's rounding.
    model.train(name != "plain110")
    expected = logits(model, x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    got = logits(last, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


@WITH_AND_WITHOUT
def test_bfloat16_trains_near_float32(name: str, norm: str) -> None:
    model, x = small(name, norm), images(name)
    # In training the statistics of 4 images make deep networks amplify any rounding.
    model.train(name in FAMILIES or name in EVERY_NORM)
    expected = logits(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, x)
        trained = logits(model.train(), x)
    near = 0.3 if name in ("plain110", "seresnet152") else 0.15  # rounding adds up over more than a hundred layers
    assert (got - expected).abs().mean() < near * expected.abs().mean()
    trained.float().backward(torch.randn(4, 7))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(value.dtype in (torch.float32, torch.int64) for value in model.state_dict().values())


@WITH_AND_WITHOUT
def test_symbolic_trace_gives_the_same_function(name: str, norm: str) -> None:
    model = small(name, norm).eval()
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(images(name)), model(images(name)))


def of_families(*by_default_: str) -> Any:
    """Each family's first model with each norm, of which the default run has these with batch norm."""
    names = dict.fromkeys([*FAMILIES, "resnet20"])
    pairs = [by_default(n, norm, if_=n in by_default_ and norm == "batch") for n in names for norm in models.norms()]
    return pytest.mark.parametrize(("name", "norm"), pairs)


@of_families("resnet20", "mlp")
def test_export_gives_the_same_function(name: str, norm: str) -> None:
    model, x = small(name, norm).eval(), images(name)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@of_families("resnet20", "mlp")
def test_compiles_to_one_graph_that_trains_the_same(name: str, norm: str) -> None:
    model, x = small(name, norm).double(), images(name).double()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    upstream = torch.randn(4, 7, dtype=torch.float64)
    for net in (model, compiled):
        logits(net, x).backward(upstream)
    for (key, expected), got in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-6, atol=1e-8, msg=key)
    for expected, got in zip(model.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("verb", ["fold", "fuse"])
@of_families("mlp", "lenet5")
def test_surgery_keeps_the_function(name: str, norm: str, verb: str) -> None:
    model, x = small(name, norm), images(name)
    for _ in range(3):
        model(x * 2 + 1)
    model.eval()
    operated = getattr(bnkit, verb)(model, x).model
    torch.testing.assert_close(operated.eval()(x), model(x), rtol=1e-3, atol=1e-4)


@WITH_AND_WITHOUT
def test_the_seed_alone_decides_the_initial_weights_whatever_the_norm(name: str, norm: str) -> None:
    plain, normed = small(name, "none"), small(name, "group" if norm == "none" else norm)
    after = torch.rand(1)
    weights = [[p for p in model.parameters() if p.dim() > 1] for model in (plain, normed)]
    assert len(weights[0]) == len(weights[1]) > 1
    for left, right in zip(*weights, strict=True):
        assert torch.equal(left, right)
    small(name, "none")
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("name", [by_default(name, if_=name in FAMILIES) for name in models.list()])
def test_every_model_takes_images_of_28_pixels_in_black_and_white(name: str) -> None:
    side = 32 if "1998" in name else 28
    with torch.device("meta"):
        model = models.create(name, num_classes=3, in_channels=1, image_size=side)
        y = model(torch.empty(2, 1, side, side))
    assert y.shape[:2] == (2, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_size_too_small_is_refused_with_the_smallest(name: str) -> None:
    if name == "mlp":
        pytest.skip("takes images of any size")
    with pytest.raises(UserError, match=r"image.* \d+ (or \d+ )?pixels a side.*got image_size=1"):
        models.create(name, image_size=1)


def test_the_seed_decides_the_initial_weights() -> None:
    first, again = small("lenet5"), small("lenet5")
    another = models.create("lenet5", "batch", 7, 2)
    key = "features.0.weight"
    assert torch.equal(first.get_parameter(key), again.get_parameter(key))
    assert not torch.equal(first.get_parameter(key), another.get_parameter(key))


def test_names_are_sorted_and_filtered() -> None:
    assert models.list() == sorted(models.list())
    assert models.list("vgg1[13]") == ["vgg11", "vgg13"]
    assert models.list("no*") == []


def test_options_and_their_defaults() -> None:
    assert models.options("mlp") == {
        "hidden": (100, 100, 100),
        "activation": "sigmoid",
        "init": "small-gaussian",
        "image_size": 28,
    }
    assert "configuration" not in models.options("vgg16")


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown model 'vgg12': did you mean vgg1\d"):
        models.create("vgg12")
    with pytest.raises(UserError, match=r"unknown model 'lenet': did you mean lenet5"):
        models.options("lenet")


def test_unknown_option_names_the_valid_ones() -> None:
    with pytest.raises(
        UserError, match=r"model 'mlp' has no option 'pool': its options are activation, hidden, image_size, init\."
    ):
        models.create("mlp", pool="max")
    with pytest.raises(UserError, match="'vgg16' has no option 'configuration'"):
        models.create("vgg16", configuration="A")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("resnet20", {"width": "wide"}),
        ("resnet20", {"width": -4}),
        ("densenet121", {"growth_rate": 1.5}),
        ("vgg11", {"dropout": "some"}),
        ("mlp", {"hidden": 3}),
        ("mlp", {"norm": lambda channels: torch.nn.BatchNorm1d(channels, size=3)}),
    ],
)
def test_what_a_model_can_not_be_built_with_is_said(name: str, option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"model '{name}' can't be built with .+ \(\w+Error: .+\): see") as caught:
        models.create(name, **option)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("counts", [{"num_classes": 0}, {"in_channels": -1}, {"num_classes": 2.5}])
def test_counts_must_be_positive_integers(counts: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(counts))} must be a positive integer"):
        models.create("mlp", **counts)
