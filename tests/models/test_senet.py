from __future__ import annotations

import pytest
import timm
import torch
from against import DRAWS, agree, on_meta, parameters, shapes
from torch import nn

from bnkit import models
from bnkit._checks import UserError
from bnkit.models._squeeze_excite import SqueezeExcite

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["32", "64"]
)


@pytest.mark.parametrize("name", ["seresnet18", "seresnet34", "seresnet50", "senet154"])
def test_keys_and_shapes_are_timm_s(name: str) -> None:
    ours = on_meta(lambda: models.create(name))
    assert shapes(ours) == shapes(on_meta(lambda: timm.create_model(name)))


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"), [("seresnet18", torch.float64, 1e-10), ("seresnet50", torch.float32, 1e-5)]
)
def test_equals_timm_s_with_its_state(name: str, dtype: torch.dtype, tolerance: float) -> None:
    theirs = on_meta(lambda: timm.create_model(name))
    agree(on_meta(lambda: models.create(name)), theirs, torch.randn(3, 3, 49, 65, dtype=dtype), tolerance)


def test_senet154_s_stem_and_blocks_equal_timm_s() -> None:
    """With few blocks; with all of them below, behind the marker."""
    from timm.models.resnet import Bottleneck, ResNet

    theirs = on_meta(
        lambda: ResNet(
            Bottleneck,
            (2, 1, 1, 1),
            cardinality=64,
            base_width=4,
            stem_type="deep",
            down_kernel_size=3,
            block_reduce_first=2,
            block_args={"attn_layer": "se"},
        )
    )
    ours = on_meta(lambda: models.create("senet154", depths=(2, 1, 1, 1), dropout=0.0))
    assert shapes(ours) == shapes(theirs)
    agree(ours, theirs, torch.randn(2, 3, 65, 49, dtype=torch.float64), 1e-10)


@pytest.mark.sweep
@PRECISIONS
@pytest.mark.parametrize("name", ["seresnet50", "seresnet152", "senet154"])
def test_deeper_ones_equal_timm_s(name: str, dtype: torch.dtype, tolerance: float) -> None:
    theirs = on_meta(lambda: timm.create_model(name))
    options = {"dropout": 0.0} if name == "senet154" else {}
    agree(
        on_meta(lambda: models.create(name, **options)),
        theirs,
        torch.randn(4, 3, 96, 96, dtype=dtype),
        tolerance,
        draw=DRAWS[dtype],
    )


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # Hu et al. 2018: section 4 gives SE-ResNet-50 about 2.5M more than ResNet-50's 25.6M; timm 28.09 and 115.09.
        ("seresnet50", 28.1),
        ("senet154", 115.1),
    ],
)
def test_published_parameter_counts(name: str, millions: float) -> None:
    assert round(parameters(on_meta(lambda: models.create(name))) / 1e6, 1) == millions


def test_the_block_by_definition() -> None:
    block = SqueezeExcite(32, reduction=4).double()
    x = torch.randn(3, 32, 4, 5, dtype=torch.float64)
    w1, w2 = block.fc1.weight.flatten(1), block.fc2.weight.flatten(1)
    assert w1.shape == (8, 32)
    weight = ((x.mean((2, 3)) @ w1.T).relu() @ w2.T).sigmoid()
    torch.testing.assert_close(block(x), x * weight[:, :, None, None])


@pytest.mark.parametrize(
    ("channels", "reduction", "hidden"), [(16, 16, 8), (64, 16, 8), (256, 16, 16), (200, 16, 16), (64, 4, 16)]
)
def test_the_bottleneck_is_a_multiple_of_eight(channels: int, reduction: int, hidden: int) -> None:
    from timm.layers.squeeze_excite import SEModule

    assert SqueezeExcite(channels, reduction=reduction).fc1.out_channels == hidden
    assert SEModule(channels, rd_ratio=1 / reduction).fc1.out_channels == hidden


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20", "plain20", "preact_resnet20", "preact_resnet50"])
def test_any_residual_family_can_be_excited(name: str) -> None:
    model = models.create(name, num_classes=5, width=8, image_size=32, se=True)
    blocks = [block for block in model.modules() if isinstance(block, SqueezeExcite)]
    assert (
        len(blocks)
        == {"resnet18": 8, "resnet50": 16, "resnet20": 9}[name.removeprefix("preact_").replace("plain", "resnet")]
    )
    x = torch.randn(4, 3, 32, 32)
    model(x).backward(torch.randn(4, 5))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for block in blocks for p in block.fc1.parameters())
    weight = model.state_dict()["conv1.weight"]
    plain = models.create(name, num_classes=5, width=8, image_size=32)
    assert plain.state_dict()["conv1.weight"].shape == weight.shape
    assert not any("se." in key for key in plain.state_dict())


def test_dropout_ahead_of_the_output() -> None:
    model = models.create("senet154", num_classes=3, depths=(1, 1, 1, 1), width=32, groups=2, image_size=16)
    assert isinstance(model.dropout, nn.Dropout)
    assert model.dropout.p == 0.2
    with pytest.raises(UserError, match=r"dropout must be between 0 and 1, got 2"):
        models.create("senet154", dropout=2)
    with pytest.raises(UserError, match=r"width must be a multiple of 32, got 48"):
        models.create("senet154", width=48)
