from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from against import DRAWS, agree, draw_state, on_meta, parameters, shapes
from PIL import Image
from torch import nn
from torch.nn import functional as F

from bnkit import models
from bnkit._checks import UserError
from bnkit.models._residual import BasicBlock, Bottleneck, PaddedShortcut, PreactBasicBlock, PreactBottleneck, Style

SHARED = Path(__file__).parents[2].parent / "shared"


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_keys_and_shapes_are_torchvision_s(name: str) -> None:
    ours = on_meta(lambda: models.create(name))
    assert shapes(ours) == shapes(on_meta(getattr(torchvision.models, name)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["32", "64"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_equals_torchvision_s_with_its_state(name: str, dtype: torch.dtype, tolerance: float) -> None:
    theirs = on_meta(getattr(torchvision.models, name))
    agree(on_meta(lambda: models.create(name)), theirs, torch.randn(3, 3, 49, 65, dtype=dtype), tolerance)


@pytest.mark.sweep
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["32", "64"])
@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnet152"])
def test_deeper_ones_equal_torchvision_s(name: str, dtype: torch.dtype, tolerance: float) -> None:
    theirs = on_meta(getattr(torchvision.models, name))
    agree(
        on_meta(lambda: models.create(name)),
        theirs,
        torch.randn(4, 3, 128, 128, dtype=dtype),
        tolerance,
        draw=DRAWS[dtype],
    )


def test_equals_torchvision_s_with_another_norm() -> None:
    def group(channels: int) -> nn.Module:
        return nn.GroupNorm(8, channels)

    theirs = on_meta(lambda: torchvision.models.resnet18(norm_layer=group))
    agree(on_meta(lambda: models.create("resnet18", group)), theirs, torch.randn(2, 3, 65, 65), 1e-5)


def test_grouped_and_wide_ones_are_torchvision_s_resnext_and_wide_resnet() -> None:
    resnext = on_meta(lambda: models.create("resnet50", groups=32, base_width=4))
    assert shapes(resnext) == shapes(on_meta(torchvision.models.resnext50_32x4d))
    wide = on_meta(lambda: models.create("resnet50", base_width=128))
    assert shapes(wide) == shapes(on_meta(torchvision.models.wide_resnet50_2))


@pytest.mark.parametrize(
    ("name", "num_classes", "millions"),
    [
        # He et al. 2015, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M.
        ("resnet20", 10, 0.27),
        ("resnet32", 10, 0.46),
        ("resnet44", 10, 0.66),
        ("resnet56", 10, 0.85),
        ("resnet110", 10, 1.7),
        # He et al. 2016, table 4.
        ("preact_resnet164", 10, 1.7),
        # torchvision's documentation, num_params.
        ("resnet18", 1000, 11.689512),
        ("resnet34", 1000, 21.797672),
        ("resnet50", 1000, 25.557032),
        ("resnet101", 1000, 44.549160),
        ("resnet152", 1000, 60.192808),
    ],
)
def test_published_parameter_counts(name: str, num_classes: int, millions: float) -> None:
    count = parameters(on_meta(lambda: models.create(name, num_classes=num_classes)))
    digits = len(str(millions).partition(".")[2])
    assert round(count / 1e6, digits) == millions or int(count / 10 ** (6 - digits)) / 10**digits == millions


@pytest.mark.sweep
def test_resnet1001_has_the_published_weights() -> None:
    # He et al. 2016, table 4: 10.2M, which leaves out the norms' 0.15M.
    model = on_meta(lambda: models.create("preact_resnet1001", num_classes=10))
    assert round(sum(p.numel() for p in model.parameters() if p.dim() > 1) / 1e6, 1) == 10.2


def test_the_depth_is_the_number_of_layers_with_weights() -> None:
    for name in [*models.list("resnet*4"), *models.list("preact_resnet[125]?"), "plain20", "plain56"]:
        model = on_meta(lambda name=name: models.create(name))
        layers = [key for key, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        depth = int(name.lstrip("abcdefghijklmnopqrstuvwxyz_"))
        assert len([key for key in layers if "downsample" not in key]) == depth, name


@pytest.fixture(scope="module")
def cifar() -> tuple[torch.Tensor, torch.Tensor]:
    """Every tenth test image, normalized as the weights expect, and its label."""
    path = SHARED / "data" / "cifar10-jpeg.zip"
    if not path.exists():
        pytest.skip("cifar10-jpeg.zip is not here")
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if "/test/" in name and name.endswith("0.jpg"))
        images = np.stack([np.asarray(Image.open(archive.open(name))) for name in names])
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    classes = sorted({name.split("/")[-2] for name in names})
    return x, torch.tensor([classes.index(name.split("/")[-2]) for name in names])


@pytest.mark.parametrize(
    ("name", "file", "accuracy"),
    [("resnet20", "resnet20-12fca82f.th", 0.795), ("resnet32", "resnet32-d509ac18.th", 0.808)],
)
def test_published_weights_give_their_accuracy(
    name: str, file: str, accuracy: float, cifar: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """On a tenth of the JPEGs. All of them give 0.8103 and 0.8256; the images before compression 0.918 and 0.928."""
    if not (SHARED / "weights" / file).exists():
        pytest.skip(f"{file} is not here")
    model = models.create(name, num_classes=10)
    models.load_weights(model, SHARED / "weights" / file)
    images, labels = cifar
    assert len(labels) == 1000
    with torch.inference_mode():
        predicted = torch.cat([model.eval()(part).argmax(1) for part in images.split(250)])
    assert (predicted == labels).double().mean().item() == pytest.approx(accuracy, abs=0.003)


def test_shortcut_a_by_value() -> None:
    x = torch.randn(2, 4, 5, 6)
    y = PaddedShortcut(5, 2)(x)
    assert y.shape == (2, 9, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].eq(0).all()
    assert y[:, 6:].eq(0).all()


@pytest.mark.parametrize(("shortcut", "projections"), [("none", 0), ("A", 0), ("B", 2), ("C", 9)])
def test_shortcuts(shortcut: str, projections: int) -> None:
    model = models.create("resnet20", num_classes=10, shortcut=shortcut)
    assert sum(key.endswith("downsample.0.weight") for key in model.state_dict()) == projections
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck, PreactBasicBlock, PreactBottleneck])
@pytest.mark.parametrize("se", [None, 16])
@pytest.mark.parametrize("norm", ["batch", nn.BatchNorm2d])
def test_a_block_adds_its_input(kind: type, se: int | None, norm: models.Norm) -> None:
    """Against the same block without the way around."""
    torch.manual_seed(0)
    block = kind(8 * kind.expansion, 8, 1, Style(norm, "relu", "kaiming", se=se)).double()
    plain = kind(8 * kind.expansion, 8, 1, Style(norm, nn.Identity, "kaiming", "none", se=se)).double()
    x = torch.randn(3, 8 * kind.expansion, 5, 5, dtype=torch.float64)
    plain.load_state_dict(block.state_dict())
    for name, layer in plain.named_children():  # activations inside the branch, none behind it
        last = "act2" if kind is BasicBlock else "act3"
        if isinstance(layer, nn.Identity) and name.startswith("act") and (name != last or "Preact" in kind.__name__):
            setattr(plain, name, nn.ReLU())
    expected = plain(x) + x
    torch.testing.assert_close(block(x), expected if "Preact" in kind.__name__ else expected.relu())


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_preactivated_block_that_reshapes_activates_ahead_of_the_shortcut(shortcut: str) -> None:
    block = PreactBasicBlock(4, 8, 2, Style("batch", "relu", "kaiming", shortcut))
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(3, 4, 6, 6)
    activated = F.batch_norm(x, None, None, training=True).relu()
    assert block.downsample is not None
    torch.testing.assert_close(block(x), block.downsample(activated))
    same = PreactBasicBlock(4, 4, 1, Style("batch", "relu", "kaiming", shortcut))
    nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x), x)


def test_preactivated_bottlenecks_equal_timm_s() -> None:
    """timm's ResNetV2 with the norms of ours, whose keys differ."""
    theirs = on_meta(lambda: timm.create_model("resnetv2_50"))
    ours = on_meta(lambda: models.create("preact_resnet50"))
    assert parameters(ours) == parameters(theirs)
    ours.to(torch.float64).to_empty(device="cpu")
    theirs.to(torch.float64).to_empty(device="cpu")
    state = draw_state(theirs)
    renamed = {_our_key(key): value for key, value in state.items()}
    fc = "fc.weight"
    renamed[fc] = renamed[fc].flatten(1)
    ours.load_state_dict(renamed)
    x = torch.randn(2, 3, 70, 70, dtype=torch.float64)
    for training in (True, False):
        expected = theirs.train(training)(x)
        assert (ours.train(training)(x) - expected).abs().max() <= 1e-10 * expected.abs().max()


def _our_key(key: str) -> str:
    for old, new in (
        ("stem.conv", "conv1"),
        ("stages.", "layers."),
        (".blocks.", "."),
        ("downsample.conv", "downsample"),
        (".norm", ".bn"),
        ("norm.", "bn."),
        ("head.fc", "fc"),
    ):
        key = key.replace(old, new)
    return key


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
def test_zero_init_residual_starts_as_the_shortcuts_alone(name: str) -> None:
    model = models.create(name, zero_init_residual=True, width=8, image_size=32, num_classes=5)
    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            assert last.weight.eq(0).all()  # pyright: ignore
            assert block.bn1.weight.eq(1).all()  # pyright: ignore
            if isinstance(block.downsample, nn.Identity):
                x = torch.randn(2, last.num_features, 4, 4).relu()  # pyright: ignore
                assert torch.equal(block(x), x)
    with pytest.raises(UserError, match=r"zero_init_residual needs a norm with a weight, got Identity"):
        models.create(name, "none", zero_init_residual=True, width=8)


@pytest.mark.parametrize("name", ["preact_resnet20", "preact_resnet50"])
def test_zero_init_residual_of_preactivated_blocks(name: str) -> None:
    model = models.create(name, "none", zero_init_residual=True, width=8, image_size=32, num_classes=5)
    blocks = [m for m in model.modules() if isinstance(m, (PreactBasicBlock, PreactBottleneck)) and not m.reshapes]
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 4, 4)
        assert torch.equal(block(x), x)
    assert len(blocks) >= 7


def test_initialization_is_he_s() -> None:
    model = models.create("resnet18")
    weight = model.get_parameter("layer3.0.conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    model = models.create("resnet20", init=0.07)
    assert model.get_parameter("layer3.1.conv2.weight").std().item() == pytest.approx(0.07, rel=0.02)
    assert model.get_parameter("linear.weight").std().item() == pytest.approx(0.07, rel=0.02)


def test_the_stem_is_chosen_by_the_size() -> None:
    x = torch.randn(2, 3, 64, 64)
    for name in ("resnet18", "preact_resnet18"):
        small, large = (models.create(name, width=8, image_size=side, num_classes=5) for side in (64, 65))
        assert small.conv1.stride, large.conv1.stride == ((1, 1), (2, 2))
        assert large(x).shape == small(x).shape == (2, 5)
        pooled = [m.maxpool(m.conv1(x)).shape[2:] for m in (small, large)]  # pyright: ignore
        assert pooled == [(64, 64), (16, 16)]


@pytest.mark.parametrize(
    ("name", "smallest"), [("resnet18", 8), ("resnet20", 4), ("preact_resnet18", 8), ("preact_resnet20", 4)]
)
def test_too_small_names_the_smallest(name: str, smallest: int) -> None:
    model = models.create(name, image_size=smallest, width=8, num_classes=3)
    assert model(torch.randn(2, 3, smallest, smallest)).shape == (2, 3)
    with pytest.raises(UserError, match=f"needs images of {smallest} pixels a side or more, got image_size="):
        models.create(name, image_size=smallest - 1)


def test_errors() -> None:
    with pytest.raises(UserError, match=r"unknown shortcut 'D'"):
        models.create("resnet20", shortcut="D")
    with pytest.raises(UserError, match=r"has no option 'shortcut'"):
        models.create("plain20", shortcut="A")
    with pytest.raises(UserError, match=r"se must be True, False or a positive reduction .*, got -1"):
        models.create("resnet20", se=-1)
