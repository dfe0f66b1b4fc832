from __future__ import annotations

import pytest
import torch
from torch import nn

from bnkit import models
from bnkit._checks import UserError


def test_the_paper_s_network_by_hand() -> None:
    torch.manual_seed(0)
    model = models.create("mlp", "batch", num_classes=10, in_channels=1)
    x = torch.rand(60, 1, 28, 28)
    state, value = model.state_dict(), x.flatten(1).double()
    for index in (1, 4, 7):
        value = value @ state[f"features.{index}.weight"].double().T
        value = (value - value.mean(0)) / (value.var(0, correction=0) + 1e-5).sqrt()
        value = torch.sigmoid(value)
    expected = value @ state["classifier.weight"].double().T + state["classifier.bias"]
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("norm", "parameters"), [("none", 99_710), ("batch", 99_710 + 300)])
def test_a_norm_replaces_the_bias(norm: str, parameters: int) -> None:
    # 784·100 + 2·100·100 + 100·10 weights, 310 biases; with BN 300 of these give way to 600 γ and β.
    model = models.create("mlp", norm, num_classes=10, in_channels=1)
    assert sum(p.numel() for p in model.parameters()) == parameters
    hidden = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][:-1]
    assert all((layer.bias is None) is (norm == "batch") for layer in hidden)


def test_options() -> None:
    model = models.create(
        "mlp", "none", num_classes=3, in_channels=2, hidden=(5, 4), activation="relu", init=0.5, image_size=6
    )
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [(5, 72), (4, 5), (3, 4)]
    assert sum(isinstance(layer, nn.ReLU) for layer in model.modules()) == 2
    assert model.get_parameter("features.1.weight").std().item() == pytest.approx(0.5, rel=0.1)


def test_errors() -> None:
    with pytest.raises(UserError, match=r"hidden must be positive integers, got \(100, 0\)"):
        models.create("mlp", hidden=(100, 0))
    with pytest.raises(UserError, match="image_size must be positive, got 0"):
        models.create("mlp", image_size=0)
