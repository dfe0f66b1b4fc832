from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bnkit import models
from bnkit._checks import UserError
from bnkit._commands._models import load_model
from bnkit._weights import save_weights

SOURCE = """
from torch import nn

def tiny(width=4, *, bias=True):
    return nn.Linear(2, width, bias=bias)

def nothing():
    return None

def broken():
    raise RuntimeError("no such luck")
"""


@pytest.mark.parametrize("name", ["bnkit:lenet5", "lenet5"])
def test_models_of_bnkit(name: str):
    model = load_model(name, ["num_classes=7", "in_channels=1", "norm=group"])
    assert isinstance(model, models.LeNet5)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 7)
    assert any(isinstance(module, nn.GroupNorm) for module in model.modules())


def test_models_of_torchvision_come_without_weights():
    model = load_model("torchvision:squeezenet1_1", ["num_classes=7"])
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert load_model("torchvision:deeplabv3_mobilenet_v3_large", ["num_classes=3"]) is not None


def test_models_of_timm():
    pytest.importorskip("timm", reason="needs the extra timm")
    model = load_model("timm:resnet10t", ["num_classes=7"])
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_models_of_a_file(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    model = load_model(f"{path}:tiny", ["width=3", "bias=False"])
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (3, 2)
    assert model.bias is None
    for name, words in (
        ("tinny", "unknown function of .* 'tinny': did you mean tiny"),
        ("nothing", "must give a torch.nn.Module, got NoneType"),
        ("broken", r"failed \(RuntimeError: no such luck\)"),
    ):
        with pytest.raises(UserError, match=words):
            load_model(f"{path}:{name}")
    path.write_text("import nowhere_to_be_found")
    with pytest.raises(UserError, match=r"can't be run .*nowhere_to_be_found"):
        load_model(f"{path}:tiny")


def test_weights_are_loaded(tmp_path: Path):
    model = models.create("mlp", num_classes=10, in_channels=1)
    save_weights(model, tmp_path / "w.safetensors")
    other = load_model("mlp", ["num_classes=10", "in_channels=1"], tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("torchvison:resnet50", [], "unknown model library 'torchvison': did you mean torchvision"),
        ("torchvision:resnet5", [], "unknown torchvision model 'resnet5': did you mean resnet50"),
        ("torchvision:resnet18", ["classes=3"], r"torchvision:resnet18 failed \(TypeError: .*classes"),
        ("bnkit:vgg", [], "unknown model 'vgg'"),
        ("nowhere.py:f", [], "there is no file nowhere.py"),
        ("lenet5", ["num_classes"], "an option is NAME=VALUE, got 'num_classes'"),
        ("lenet5", ["colour=red"], "has no option 'colour'"),
        ("lenet5", ["name=vgg11"], r"bnkit:lenet5 failed \(TypeError: .*'name'\)"),
        ("resnet20", ["width=wide"], r"'resnet20' can't be built with width='wide' \(TypeError: .*\): see"),
    ],
)
def test_mistakes(name: str, options: list[str], words: str):
    with pytest.raises(UserError, match=words):
        load_model(name, options)
