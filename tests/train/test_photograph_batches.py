"""Training on photographs: batches in the promised order, resumed to the bit, whatever the workers."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bnkit.nn
from bnkit._checks import UserError
from bnkit.data import Augmentation, BatchOrder, Photographs, photographs
from bnkit.train import FitConfig, evaluate, fit, iterate, labelled_probabilities, probabilities
from bnkit.train._devices import Devices
from bnkit.train._photograph_batches import PhotographBatches

CONFIG = FitConfig(
    steps=12, batch_size=6, lr=0.05, eval_every=4, eval_batch_size=5, device="cpu", augment="resized_crop=0.3,flip"
)


@pytest.fixture
def pets(tmp_path: Path) -> Photographs:
    """15 training photographs and 4 test photographs of two classes that brightness tells apart."""
    generator = np.random.default_rng(0)
    for name, low, count in (("dark", 0, 10), ("light", 150, 9)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(count):
            height, width = generator.integers(20, 40, 2)
            pixels = generator.integers(low, low + 100, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.jpg")
    return photographs(tmp_path / "pets", 16)


def here(rank: int = 0, world: int = 1) -> Devices:
    return Devices(torch.device("cpu"), torch.float32, lambda x: x, torch.Tensor.backward, rank=rank, world=world)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        bnkit.nn.BatchNorm2d(4, activation="relu"),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_by_value(pets: Photographs, workers: int) -> None:
    config = dataclasses.replace(CONFIG, workers=workers, normalize="imagenet", channels_last=True)
    order, follow = BatchOrder(15, 6, 3), BatchOrder(15, 6, 3)
    examples = pets.training_examples(Augmentation.parse(config.augment), config.seed)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    for images, labels in itertools.islice(PhotographBatches(pets, config, here()).stream(order), 5):
        epoch, index = follow.epoch, next(follow)
        assert order.state_dict() == follow.state_dict()
        expected = torch.stack([examples[i, epoch][0] for i in index.tolist()])  # pyright: ignore
        torch.testing.assert_close(images, (expected / 255 - mean) / std, atol=1e-5, rtol=1e-5)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, pets.train_labels[index])


def test_processes_share_a_batch_without_overlap(pets: Photographs) -> None:
    pets = dataclasses.replace(pets, train_labels=torch.arange(15))
    config = dataclasses.replace(CONFIG, workers=0)
    shares = [next(PhotographBatches(pets, config, here(rank, 3)).stream(BatchOrder(15, 6, 3))) for rank in range(3)]
    assert sorted(label for _, labels in shares for label in labels.tolist()) == sorted(next(BatchOrder(15, 6, 3)))


def test_test_and_calibration_images(pets: Photographs) -> None:
    batches = PhotographBatches(pets, dataclasses.replace(CONFIG, workers=1), here())
    assert [len(labels) for _, labels in batches.test(3)] == [3, 1]
    assert torch.equal(torch.cat([labels for _, labels in batches.test(3)]), pets.test_labels)
    assert [len(images) for images in batches.calibration(7, 4)] == [4, 3]
    mean = torch.cat(list(batches.calibration(100, 4))).mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)


def test_a_resumed_run_ends_with_the_same_bits(pets: Photographs, tmp_path: Path) -> None:
    whole, first, resumed = net(), net(), net()
    expected = fit(whole, pets, dataclasses.replace(CONFIG, workers=0))
    run = iterate(first, pets, dataclasses.replace(CONFIG, workers=2), checkpoint=tmp_path / "run.pt")
    assert [next(run).step for _ in range(3)] == [0, 4, 8]
    history = fit(resumed, pets, dataclasses.replace(CONFIG, workers=1), resume=tmp_path / "run.pt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert history.final.test_loss == expected.final.test_loss


def test_it_learns(pets: Photographs) -> None:
    model, config = net(), dataclasses.replace(CONFIG, steps=40, eval_every=20, workers=2, ema=0.8)
    history = fit(model, pets, config)
    assert history.final.test_accuracy == 1.0
    assert evaluate(model, pets, config) == (history.final.test_loss, history.final.test_accuracy)
    assert probabilities(model, pets, config).shape == (4, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_that_cannot_be_read(pets: Photographs, workers: int) -> None:
    path = pets.path / pets.train_files[0]
    path.write_bytes(path.read_bytes()[:200])
    config = dataclasses.replace(CONFIG, workers=workers, normalize="unit", batch_size=15)
    with pytest.raises(UserError, match=r"can't read the image .*jpg \(Truncated.*\): replace or remove") as caught:
        fit(net(), pets, config)
    assert "\n" not in str(caught.value)
    skipping = dataclasses.replace(pets, skip_corrupt=True)
    images, labels = next(PhotographBatches(skipping, config, here()).stream(BatchOrder(15, 15, 0)))
    assert len(images) == len(labels) == 14


def test_tests_go_on_without_those_that_cannot_be_read(pets: Photographs) -> None:
    model, config = net(), dataclasses.replace(CONFIG, workers=0, eval_batch_size=1)
    expected, labels = labelled_probabilities(model, pets, config)
    assert torch.equal(labels, pets.test_labels)
    (pets.path / pets.test_files[1]).write_bytes(b"damaged")
    skipping = dataclasses.replace(pets, skip_corrupt=True)
    found, labels = labelled_probabilities(model, skipping, config)
    assert torch.equal(found, expected[[0, 2, 3]])
    assert torch.equal(labels, pets.test_labels[[0, 2, 3]])
    assert evaluate(model, skipping, config)[0] == pytest.approx(
        -found.gather(1, labels[:, None]).log().mean().item(), rel=1e-5
    )
    for file in pets.test_files:
        (pets.path / file).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"none of the photographs in .*pets needed here can be read: replace them"):
        evaluate(model, skipping, config)
