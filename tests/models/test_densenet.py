from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
from against import DRAWS, agree, draw_state, on_meta, parameters, shapes
from torch import nn
from torch.nn import functional as F

from bnkit import models
from bnkit._checks import UserError
from bnkit.models._residual import Style
from bnkit.models.densenet import DenseLayer

NAMES = ["densenet121", "densenet161", "densenet169", "densenet201"]
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["32", "64"]
)


@pytest.mark.parametrize("name", ["densenet121", "densenet161"])
def test_keys_and_shapes_are_torchvision_s(name: str) -> None:
    ours = on_meta(lambda: models.create(name))
    assert shapes(ours) == shapes(on_meta(getattr(torchvision.models, name)))


@PRECISIONS
@pytest.mark.parametrize("drawn", [False, True], ids=["fresh", "drawn"])
def test_equals_torchvision_s_with_its_state(dtype: torch.dtype, tolerance: float, drawn: bool) -> None:
    sizes = {"growth_rate": 4, "num_init_features": 8, "num_classes": 7}
    theirs = torchvision.models.DenseNet(block_config=(6, 12, 24, 16), **sizes).to(dtype)
    if drawn:
        draw_state(theirs)
    ours = models.create("densenet121", **sizes).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 3, 65, 81, dtype=dtype)
    for training in (True, False):
        expected = theirs.train(training)(x)
        assert (ours.train(training)(x) - expected).abs().max() <= tolerance * expected.abs().max()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("name", ["densenet40", "densenet_bc100"])
def test_torchvision_s_published_files_load(name: str, tmp_path: Path) -> None:
    expected = draw_state(models.create(name, num_classes=3))
    # As torchvision's densenet121() and the others rename what they download, the other way round.
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", key): value for key, value in expected.items()}
    assert any(".denselayer1.norm.1.running_mean" in key for key in old)
    torch.save(old, tmp_path / "published.pth")
    direct, from_file = (models.create(name, num_classes=3) for _ in range(2))
    direct.load_state_dict(old)
    models.load_weights(from_file, tmp_path / "published.pth")
    for model in (direct, from_file):
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.sweep
@PRECISIONS
@pytest.mark.parametrize("name", NAMES)
def test_whole_networks_equal_torchvision_s(name: str, dtype: torch.dtype, tolerance: float) -> None:
    assert shapes(on_meta(lambda: models.create(name))) == shapes(on_meta(getattr(torchvision.models, name)))
    theirs = on_meta(getattr(torchvision.models, name))
    agree(
        on_meta(lambda: models.create(name)),
        theirs,
        torch.randn(4, 3, 96, 96, dtype=dtype),
        tolerance,
        draw=DRAWS[dtype],
    )


@pytest.mark.parametrize(
    ("name", "num_classes", "millions"),
    [
        # Huang et al. 2017, table 2 (C10+).
        ("densenet40", 10, 1.0),
        ("densenet100", 10, 7.0),
        ("densenet_bc100", 10, 0.8),
        ("densenet_bc250", 10, 15.3),
        ("densenet_bc190", 10, 25.6),
        # torchvision's documentation, num_params.
        ("densenet121", 1000, 7.978856),
        ("densenet169", 1000, 14.149480),
    ],
)
def test_published_parameter_counts(name: str, num_classes: int, millions: float) -> None:
    count = parameters(on_meta(lambda: models.create(name, num_classes=num_classes)))
    assert round(count / 1e6, len(str(millions).partition(".")[2])) == millions


def test_bc_is_an_option_of_the_network_of_100_layers() -> None:
    option = on_meta(lambda: models.create("densenet100", bc=True))
    assert shapes(option) == shapes(on_meta(lambda: models.create("densenet_bc100")))


@pytest.mark.parametrize(("name", "depth"), [("densenet40", 40), ("densenet_bc100", 100), ("densenet201", 201)])
def test_the_depth_is_the_number_of_layers_with_weights(name: str, depth: int) -> None:
    model = on_meta(lambda: models.create(name))
    assert sum(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in model.modules()) == depth


@pytest.mark.parametrize("bottleneck", [0, 2])
def test_a_layer_by_definition(bottleneck: int) -> None:
    layer = DenseLayer(7, 5, bottleneck, 0.0, False, Style("batch", "relu", "kaiming")).double()
    a, b = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    y = F.batch_norm(torch.cat([a, b], 1), None, None, training=True).relu()
    if bottleneck:
        y = F.batch_norm(F.conv2d(y, layer.conv1.weight), None, None, training=True).relu()
        y = F.conv2d(y, layer.conv2.weight, padding=1)
    else:
        y = F.conv2d(y, layer.conv1.weight, padding=1)
    torch.testing.assert_close(layer([a, b]), y)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", ["densenet40", "densenet_bc100"])
def test_less_memory_for_the_same_training(name: str, norm: str) -> None:
    """Two steps: outputs, gradients and statistics are those of a model that keeps all; each batch counts once."""
    x, upstream = torch.randn(3, 3, 16, 16), torch.randn(3, 5)
    saved, states = [], []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        model = models.create(
            name, norm, num_classes=5, image_size=16, growth_rate=2, memory_efficient=memory_efficient
        ).double()
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = model(x.double())
            y.backward(upstream.double())
        gradients = {f"{key}.grad": p.grad for key, p in model.named_parameters()}
        states.append({"y": y.detach(), **gradients, **model.state_dict()})
        saved.append(count)
    torch.testing.assert_close(states[1], states[0], rtol=1e-10, atol=1e-12)
    assert saved[1] < 0.7 * saved[0]
    counts = [value.item() for key, value in states[1].items() if key.endswith("num_batches_tracked")]
    assert all(value == 2 for value in counts)
    assert bool(counts) is (norm == "batch")


def test_dropout_of_what_a_layer_adds() -> None:
    layer = DenseLayer(4, 100, 0, 0.5, False, Style("batch", "relu", "kaiming"))
    x = torch.randn(2, 4, 5, 5)
    assert layer.train()([x]).eq(0).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert layer.eval()([x]).ne(0).all()


@pytest.mark.parametrize(
    ("name", "side", "smallest"), [("densenet121", 224, 29), ("densenet121", 32, 8), ("densenet40", 32, 4)]
)
def test_too_small_names_the_smallest(name: str, side: int, smallest: int) -> None:
    model = models.create(name, num_classes=3, image_size=side, growth_rate=2).eval()
    assert model(torch.randn(1, 3, smallest, smallest)).shape == (1, 3)
    with pytest.raises(
        UserError, match=f"needs images of {smallest} pixels a side or more, got {smallest}×{smallest - 1}"
    ):
        model(torch.randn(1, 3, smallest, smallest - 1))


def test_errors() -> None:
    with pytest.raises(UserError, match=r"needs images of 8 pixels a side or more, got image_size=7"):
        models.create("densenet121", image_size=7)
    with pytest.raises(UserError, match=r"compression must be in \(0, 1\], got 0"):
        models.create("densenet121", compression=0)
    with pytest.raises(UserError, match=r"growth_rate must be at least 1, got 0"):
        models.create("densenet40", growth_rate=0)
    with pytest.raises(UserError, match=r"drop_rate must be in \[0, 1\), got 1"):
        models.create("densenet40", drop_rate=1)
