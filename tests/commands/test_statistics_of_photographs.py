"""`recalibrate` and `adapt` on photographs: at the model's own size, from their files, as evaluation sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import Result

from bnkit import UserError, adapt, models, recalibrate
from bnkit._weights import load_weights, read_weights, save_weights
from bnkit.data import IMAGENET_MEAN, IMAGENET_STD, load, photographs

Command = Callable[..., Result]
MODEL = ["bnkit:squeezenet1_1", "--norm", "batch", "-o", "num_classes=2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 6 photographs, larger than the model's 224 pixels."""
    generator = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            coarse = generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((300, 260)).save(tmp_path / "photos" / name / f"{i}.jpg")
    return tmp_path / "photos"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_weights(models.create("squeezenet1_1", "batch", 2), tmp_path / "before.pt")
    return tmp_path / "before.pt"


def network(path: Path) -> torch.nn.Module:
    model = models.create("squeezenet1_1", "batch", 2)
    load_weights(model, path)
    return model


def normalized(folder: Path, split: str, batch_size: int) -> list[Tensor]:
    images = photographs(folder, 224)
    examples = images.calibration_examples() if split == "train" else images.test_examples()
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    pixels = torch.stack([example[0] for i in order if not isinstance(example := examples[i, 0], str)])
    mean, std = (torch.tensor(moment).view(1, 3, 1, 1) for moment in (IMAGENET_MEAN, IMAGENET_STD))
    return list(((pixels / 255 - mean) / std).split(batch_size))


@pytest.mark.parametrize(("name", "split"), [("recalibrate", "train"), ("adapt", "test")])
def test_the_size_is_the_model_s(bnkit: Command, folder: Path, checkpoint: Path, name: str, split: str) -> None:
    arguments = ["--data", folder, "--normalize", "imagenet", "--batch-size", 3, "--out", "after.pt"]
    bnkit(name, *MODEL, checkpoint, *arguments)
    expected = network(checkpoint)
    batches = normalized(folder, split, 3)
    assert batches[0].shape[2:] == (224, 224)
    if name == "recalibrate":
        recalibrate(expected, batches)
    else:
        adapt(expected, batches)
    found = read_weights(Path("after.pt"))
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


def test_a_photograph_that_can_not_be_read(bnkit: Command, folder: Path, checkpoint: Path) -> None:
    for file in sorted(folder.glob("cats/*"))[:3]:
        file.write_bytes(file.read_bytes()[:200])
    arguments = ["recalibrate", *MODEL, checkpoint, "--data", folder, "--normalize", "imagenet", "--batch-size", 20]
    with pytest.raises(UserError, match=r"can't read the image .*cats.* leave such files out with --skip-corrupt"):
        bnkit(*arguments, "--out", "after.pt")
    assert not Path("after.pt").exists()
    bnkit(*arguments, "--out", "after.pt", "--skip-corrupt")
    assert read_weights(Path("after.pt"))


@pytest.mark.parametrize(("name", "model"), [("adapt", 224), ("recalibrate", 32)])
def test_images_without_labels(bnkit: Command, tmp_path: Path, name: str, model: int) -> None:
    generator = np.random.default_rng(0)
    for i in range(5):
        pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{i}.png")
    network = models.create("resnet20", num_classes=7, image_size=model)
    save_weights(network, tmp_path / "before.pt")
    options = ["-o", "num_classes=7", "--image-size", model, "--data", "flat", "--normalize", "unit", "--out", "a.pt"]
    result = bnkit(name, "resnet20", "before.pt", *options, "--json")
    assert json.loads(result.stdout)["batches"] == 1
    images = photographs(tmp_path / "flat", model, labels=False)
    if model > 64:
        examples = images.test_examples()
        pixels = torch.stack([e[0] for i in range(5) if not isinstance(e := examples[i, 0], str)])
    else:
        pixels = load(tmp_path / "flat", size=model, labels=False).train_images
    assert len(pixels) == 5
    {"adapt": adapt, "recalibrate": recalibrate}[name](network, [pixels / 255])
    found = read_weights(Path("a.pt"))
    for key, value in network.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


def test_training_needs_labels(bnkit: Command, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(tmp_path / "flat" / "a.png")
    with pytest.raises(UserError, match="no class folders in"):
        bnkit("train", "--data", "flat")


def test_a_few_batches_are_of_all_classes(bnkit: Command, pictures: Path) -> None:
    network = models.create("resnet20", num_classes=2)
    save_weights(network, Path("before.pt"))
    options = ["--data", pictures, "--normalize", "unit", "--batches", 1, "--batch-size", 24, "--out", "after.pt"]
    bnkit("recalibrate", "resnet20", "before.pt", *options)
    data = load(pictures)
    recalibrate(network, [data.train_images / 255])
    found, whole = read_weights(Path("after.pt"))["bn1.running_var"], network.state_dict()["bn1.running_var"]
    torch.testing.assert_close(found, whole, rtol=0.15, atol=0)  # of one class some are a tenth of it
