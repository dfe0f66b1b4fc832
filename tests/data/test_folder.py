from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.datasets import ImageFolder

from bnkit._checks import UserError
from bnkit.data import load

SPLIT_FILES = [
    f"{part}/{name}/{i}.png" for part in ("train", "test") for name in ("ant", "bee", "cow") for i in range(3)
]


def test_a_folder_is_torchvisions_image_folder(write_images):
    root = write_images(*SPLIT_FILES, size=(19, 13))
    images = load(root, size=10)
    transform = transforms.Compose([transforms.Resize(10), transforms.CenterCrop(10), transforms.PILToTensor()])
    for part, tensor, labels in (
        ("train", images.train_images, images.train_labels),
        ("test", images.test_images, images.test_labels),
    ):
        expected = ImageFolder(root / part, transform)
        assert list(images.classes) == expected.classes
        assert torch.equal(tensor, torch.stack([image for image, _ in expected]))
        assert labels.tolist() == expected.targets


def test_name_and_default_size(write_images):
    images = load(write_images("ant/1.png", "ant/2.png", "bee/1.png", "bee/2.png", root="insects"))
    assert images.name == "insects"
    assert images.shape == (3, 32, 32)
    assert images.skipped == ()


def test_gray_only_if_all_are(write_images):
    root = write_images("ant/1.png", "ant/2.png", "bee/1.png", "bee/2.png", mode="L")
    gray = load(root, size=8)
    assert gray.shape == (1, 8, 8)
    write_images("bee/3.png")
    mixed = load(root, size=8)
    assert mixed.shape == (3, 8, 8)
    ant = mixed.train_images[mixed.train_labels == 0]
    assert torch.equal(ant, gray.train_images[gray.train_labels == 0].expand(-1, 3, -1, -1))


def test_a_zip_is_read_like_the_folder(write_images, tmp_path: Path):
    root = write_images(*SPLIT_FILES)
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for file in root.rglob("*"):
            target.write(file, Path("outer", file.relative_to(root)))
    expected, images = load(root), load(archive)
    assert images.name == "packed"
    assert torch.equal(images.train_images, expected.train_images)
    assert torch.equal(images.test_labels, expected.test_labels)


def test_cifar_from_a_zip_of_jpegs(cifar_zip: Path):
    images = load(cifar_zip)
    assert images.shape == (3, 32, 32)
    assert images.classes == (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    assert images.train_labels.bincount().tolist() == [6] * 10
    assert images.test_labels.bincount().tolist() == [2] * 10
    # JPEG or not, CIFAR-10's channel means are 0.49, 0.48, 0.45 over all images; over 60, near them.
    np.testing.assert_allclose(images.mean.numpy(), [0.491, 0.482, 0.447], atol=0.05)


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def test_a_corrupt_image_is_named(write_images):
    root = write_images(*SPLIT_FILES)
    corrupt(root / "train/bee/1.png")
    with pytest.raises(UserError, match=r"can't read the image .*train/bee/1\.png \(.+\): .* --skip-corrupt") as raised:
        load(root)
    assert "\n" not in str(raised.value)


def test_corrupt_images_are_skipped_and_counted(write_images):
    root = write_images(*SPLIT_FILES)
    whole = load(root)
    corrupt(root / "train/bee/1.png")
    (root / "test/ant/0.png").write_bytes(b"")
    images = load(root, skip_corrupt=True)
    assert images.skipped == ("train/bee/1.png", "test/ant/0.png")
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(images.train_images, whole.train_images[kept])
    assert torch.equal(images.train_labels, whole.train_labels[kept])
    assert torch.equal(images.test_images, whole.test_images[1:])
    assert torch.equal(images.test_labels, whole.test_labels[1:])


def test_a_corrupt_entry_of_a_zip_is_skipped(write_images, tmp_path: Path):
    root = write_images(*SPLIT_FILES)
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for file in root.rglob("*.png"):
            target.write(file, file.relative_to(root))
    content = archive.read_bytes()
    damaged = (root / "train/cow/2.png").read_bytes()
    archive.write_bytes(content.replace(damaged, damaged[::-1]))
    assert load(archive, skip_corrupt=True).skipped == ("train/cow/2.png",)
    with pytest.raises(UserError, match=r"packed\.zip/train/cow/2\.png \(Bad CRC-32"):
        load(archive)


def test_a_class_must_keep_a_training_image(write_images):
    root = write_images(*SPLIT_FILES)
    for i in range(3):
        corrupt(root / f"train/bee/{i}.png")
    with pytest.raises(UserError, match="no readable training image of the class 'bee' in"):
        load(root, skip_corrupt=True)


def test_there_must_be_test_images(write_images):
    with pytest.raises(UserError, match=r"no test images in .*: give at least one class two images"):
        load(write_images("ant/1.png", "bee/1.png"))


def test_progress_counts_every_file_once(write_images):
    root = write_images(*SPLIT_FILES)
    corrupt(root / "train/ant/0.png")
    calls = []
    load(root, skip_corrupt=True, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 18) for i in range(1, 19)]
