from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from toys import toy_set

from bnkit.data import Augmentation, ImageSet
from bnkit.train import FitConfig
from bnkit.train._batches import ResidentBatches
from bnkit.train._devices import Devices


def here(rank: int = 0, world: int = 1, dtype: torch.dtype = torch.float32) -> Devices:
    return Devices(torch.device("cpu"), dtype, lambda x: x, torch.Tensor.backward, rank=rank, world=world)


def with_constant_channel() -> ImageSet:
    data = toy_set()
    for images in (data.train_images, data.test_images):
        images[:, 1] = 51
    return data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_by_value(dtype: torch.dtype) -> None:
    data, index = toy_set(), torch.tensor([5, 0, 299])
    unit = data.train_images.numpy().astype(np.float64) / 255
    images, labels = ResidentBatches(data, FitConfig(1, normalize="unit"), here(dtype=dtype)).training(index)
    assert images.dtype == dtype
    np.testing.assert_allclose(images.numpy(), unit[index], rtol=1e-6)
    assert labels.tolist() == data.train_labels[index].tolist()

    mean, std = unit.mean((0, 2, 3), keepdims=True), unit.std((0, 2, 3), keepdims=True)
    images, _ = ResidentBatches(data, FitConfig(1), here(dtype=dtype)).training(index)
    np.testing.assert_allclose(images.numpy(), (unit[index] - mean) / std, atol=2e-6)


def test_the_test_images_get_the_training_images_moments() -> None:
    data = toy_set()
    parts = list(ResidentBatches(data, FitConfig(1), here()).test(40))
    assert [len(labels) for _, labels in parts] == [40, 40, 10]
    unit = data.test_images.double() / 255
    mean, std = (moment.double().view(1, -1, 1, 1) for moment in (data.mean, data.std))
    torch.testing.assert_close(torch.cat([images for images, _ in parts]), ((unit - mean) / std).float())
    assert torch.equal(torch.cat([labels for _, labels in parts]), data.test_labels)


def test_a_constant_channel_becomes_zero() -> None:
    images, _ = ResidentBatches(with_constant_channel(), FitConfig(1), here()).training(torch.arange(10))
    assert images.isfinite().all()
    assert images[:, 1].abs().max() < 1e-6
    assert images[:, 0].std() > 0.5


def test_processes_share_a_batch_without_overlap() -> None:
    data = dataclasses.replace(toy_set(), train_labels=torch.arange(300))
    index = torch.randperm(300)[:12]
    config = FitConfig(1, normalize="unit")
    shares = [ResidentBatches(data, config, here(rank, 3)).training(index)[1].tolist() for rank in range(3)]
    assert [len(share) for share in shares] == [4, 4, 4]
    assert sorted(label for share in shares for label in share) == sorted(index.tolist())


def test_training_images_are_augmented_and_test_images_are_not() -> None:
    data, index = toy_set(), torch.arange(40)
    config = FitConfig(1, normalize="unit", augment="crop=2,flip,color=0.3")
    torch.manual_seed(1)
    images, _ = ResidentBatches(data, config, here()).training(index)
    torch.manual_seed(1)
    torch.testing.assert_close(images, Augmentation.parse(config.augment)(data.train_images[:40]) / 255)
    (test, _), *_ = ResidentBatches(data, config, here()).test(90)
    torch.testing.assert_close(test, data.test_images / 255)


def test_channels_last() -> None:
    config = FitConfig(1, channels_last=True, augment="flip")
    images, _ = ResidentBatches(toy_set(), config, here()).training(torch.arange(7))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert not images.is_contiguous()
