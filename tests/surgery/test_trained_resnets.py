"""Trained ResNets keep every prediction on CIFAR-10 through surgery."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import bnkit
from bnkit._weights import load_weights

SHARED = Path(__file__).parents[3] / "shared"
IMAGES = SHARED / "data" / "cifar10-jpeg.zip"
WEIGHTS = {
    "resnet20": SHARED / "weights" / "resnet20-12fca82f.th",
    "resnet32": SHARED / "weights" / "resnet32-d509ac18.th",
}
pytestmark = pytest.mark.skipif(
    not all(path.is_file() for path in (IMAGES, *WEIGHTS.values())), reason=f"no CIFAR-10 and weights in {SHARED}"
)


def images_of(every: int) -> tuple[Tensor, Tensor]:
    """Each `every`th test image, normalized as the models expect it, and its label."""
    with zipfile.ZipFile(IMAGES) as archive:
        names = sorted(n for n in archive.namelist() if "/test/" in f"/{n}" and n.endswith((".jpg", ".jpeg", ".png")))
        classes = sorted({name.split("/")[-2] for name in names})
        chosen = names[::every]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in chosen])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x - mean) / std, torch.tensor([classes.index(name.split("/")[-2]) for name in chosen])


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(250)])


def round_trip(model: nn.Module) -> nn.Module:
    for kind in ("batch", "sync", "ghost", "renorm", "frozen", "torch"):
        model = bnkit.convert(model, kind).model
    return bnkit.unfreeze(bnkit.freeze(model).model).model


def check(name: str, every: int) -> None:
    model = bnkit.models.create(name, num_classes=10)
    load_weights(model, WEIGHTS[name])
    model.eval()
    x, labels = images_of(every)
    expected = predictions(model, x)
    # On the original images it is 0.92; compression as JPEG costs some of it.
    assert (expected == labels).double().mean() > 0.75
    for verb, changed in (
        ("fold", bnkit.fold(model, x[:2]).model),
        ("fuse", bnkit.fuse(model, x[:2]).model.eval()),
        ("round trip", round_trip(model).eval()),
    ):
        assert torch.equal(predictions(changed, x), expected), f"{verb} changes predictions"


def test_some_images():
    check("resnet20", every=100)


@pytest.mark.sweep
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_image(name):
    check(name, every=1)
