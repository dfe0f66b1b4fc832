"""Every registered model, with every norm that it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnkit import models
from bnkit._checks import UserError

SMALL = {"mlp": 28, "lenet5": 28}
VECTOR_LAYERS = {"mlp", "lenet5"}


def small(name: str, norm: models.Norm = "batch", **options: object) -> nn.Module:
    torch.manual_seed(0)
    return models.create(name, norm, num_classes=7, in_channels=2, image_size=SMALL.get(name, 32), **options)


def images(name: str, batch: int = 4) -> torch.Tensor:
    side = SMALL.get(name, 32)
    return torch.randn(batch, 2, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", models.norms())
@pytest.mark.parametrize("name", models.list())
def test_every_parameter_of_every_model_is_trained(name: str, norm: str) -> None:
    if norm == "instance" and name in VECTOR_LAYERS:
        with pytest.raises(UserError, match="norm 'instance' needs images, got vectors"):
            small(name, norm)
        return
    model = small(name, norm, init="kaiming")
    logits = model(images(name))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 6])).backward()
    behind = () if norm in ("none", "layer") else redundant_biases(model)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert key in behind or parameter.grad.abs().max() > 1e-9, key


def redundant_biases(model: nn.Module) -> list[str]:
    """Biases ahead of a norm, whose gradients are rounding errors."""
    return [f"{name}.bias" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("name", models.list())
def test_symbolic_trace_gives_the_same_function(name: str, norm: str) -> None:
    model = small(name, norm).eval()
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(images(name)), model(images(name)))


@pytest.mark.parametrize("name", models.list())
def test_the_seed_alone_decides_the_initial_weights_whatever_the_norm(name: str) -> None:
    plain, normed = small(name, "none"), small(name, "batch")
    after = torch.rand(1)
    weights = [[p for p in model.parameters() if p.dim() > 1] for model in (plain, normed)]
    assert len(weights[0]) == len(weights[1]) > 1
    for left, right in zip(*weights, strict=True):
        assert torch.equal(left, right)
    small(name, "group")
    assert torch.equal(torch.rand(1), after)


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
    with pytest.raises(UserError, match=r"unknown model 'lenet': did you mean lenet5\?"):
        models.options("lenet")


def test_unknown_option_names_the_valid_ones() -> None:
    with pytest.raises(
        UserError, match=r"model 'mlp' has no option 'pool': its options are activation, hidden, image_size, init\."
    ):
        models.create("mlp", pool="max")
    with pytest.raises(UserError, match="'vgg16' has no option 'configuration'"):
        models.create("vgg16", configuration="A")


@pytest.mark.parametrize("counts", [{"num_classes": 0}, {"in_channels": -1}, {"num_classes": 2.5}])
def test_counts_must_be_positive_integers(counts: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(counts))} must be a positive integer"):
        models.create("mlp", **counts)
