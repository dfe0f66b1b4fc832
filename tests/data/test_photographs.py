"""Photographs in files: what is cut out of them, by value, and what happens to those that can't be read."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from bnkit._checks import UserError
from bnkit.data import Augmentation, Examples, photographs, usual_side

FILES = ("cat/1.png", "cat/2.png", "cat/3.png", "dog/1.png", "dog/2.png", "dog/3.png")
Writer = Callable[..., Path]


@pytest.fixture
def folder(write_images: Writer) -> Path:
    write_images(*FILES, size=(61, 47))
    return write_images("dog/4.png", mode="L", size=(30, 80))


def image_of(examples: Examples, *key: int) -> torch.Tensor:
    found = examples[key[0], key[1]]
    assert not isinstance(found, str)
    return found[0]


def test_they_are_arranged_like_a_set_in_memory(folder: Path) -> None:
    found = photographs(folder, 32)
    assert found.classes == ("cat", "dog")
    assert found.shape == (3, 32, 32)
    assert len(found.train_files) == len(found.train_labels) == 5
    assert len(found.test_files) == len(found.test_labels) == 2
    assert sorted((*found.train_files, *found.test_files)) == sorted((*FILES, "dog/4.png"))
    examples = found.training_examples(Augmentation(), 0)
    for index, (file, label) in enumerate(zip(found.train_files, found.train_labels.tolist(), strict=True)):
        example = examples[index, 0]
        assert not isinstance(example, str)
        assert example[1] == label == ("cat", "dog").index(file[:3])


def test_a_test_sees_the_centre_as_torchvision_cuts_it(folder: Path) -> None:
    found = photographs(folder, 28)
    expected = v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.PILToTensor()])
    for index, file in enumerate(found.test_files):
        with Image.open(folder / file) as image:
            assert torch.equal(image_of(found.test_examples(), index, 0), expected(image.convert("RGB")))


def test_training_sees_what_torchvision_draws(folder: Path) -> None:
    found = photographs(folder, 28)
    examples = found.training_examples(Augmentation.parse("resized_crop=0.2,flip,color=0.3"), 5)
    first = examples._transform
    expected = v2.Compose(
        [v2.RandomResizedCrop(28, scale=(0.2, 1.0)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3)]
    )
    with Image.open(folder / found.train_files[0]) as image:
        picture = image.convert("RGB")
    for seed in range(8):
        torch.manual_seed(seed)
        got = first(picture)
        torch.manual_seed(seed)
        assert torch.equal(got, v2.PILToTensor()(expected(picture)))


def test_what_is_drawn_follows_from_seed_epoch_and_index_alone(folder: Path) -> None:
    found = photographs(folder, 28)
    augmentation = Augmentation.parse("resized_crop=0.2")
    examples = found.training_examples(augmentation, 5)
    torch.manual_seed(1)
    image = image_of(examples, 2, 7)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(image_of(found.training_examples(augmentation, 5), 2, 7), image)
    others = [image_of(examples, 2, 8), image_of(found.training_examples(augmentation, 6), 2, 7)]
    assert not any(torch.equal(image, other) for other in others)


def test_augmentations_of_batches_come_after(folder: Path) -> None:
    found = photographs(folder, 28)
    changed = image_of(found.training_examples(Augmentation(rotate=30.0, cutout=9), 5), 0, 0)
    plain = image_of(found.calibration_examples(), 0, 0)
    assert changed.dtype == plain.dtype == torch.uint8
    assert changed.shape == plain.shape
    assert not torch.equal(changed, plain)


def test_moves_beyond_the_image_are_refused_before_any_is_read(folder: Path) -> None:
    with pytest.raises(UserError, match="must be less than the image's side 28, got 28: lower them"):
        photographs(folder, 28).training_examples(Augmentation(shift=28), 0)


def test_mean_and_deviation_are_of_the_training_photographs(folder: Path) -> None:
    found = photographs(folder, 28)
    pixels = np.stack([image_of(found.calibration_examples(), i, 0).numpy() for i in range(5)]).astype(float) / 255
    np.testing.assert_allclose(found.mean.numpy(), pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found.std.numpy(), pixels.std((0, 2, 3)), rtol=1e-6)


def test_a_large_jpeg_is_decoded_small(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:800, 0:1000]
    pixels = np.stack([rows / 4, columns / 5, (rows + columns) / 9], 2).astype(np.uint8)
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg", quality=95)
    found = photographs(tmp_path, 28)
    examples = found.test_examples()
    assert examples._open(found.test_files[0]).size == (250, 200)
    exact = v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.PILToTensor()])(Image.fromarray(pixels))
    assert (image_of(examples, 0, 0).int() - exact.int()).abs().max() <= 3


def test_an_archive_is_read_by_each_process_for_itself(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "pets.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in folder.rglob("*.png"):
            packed.write(path, path.relative_to(folder))
    found, unpacked = photographs(archive, 28), photographs(folder, 28)
    examples = found.test_examples()
    image = image_of(examples, 1, 0)
    assert torch.equal(image, image_of(unpacked.test_examples(), 1, 0))
    assert found.name == "pets"
    loader = torch.utils.data.DataLoader(examples, sampler=[(1, 0)] * 4, num_workers=2, batch_size=None)  # pyright: ignore
    assert all(torch.equal(other, image) for other, _ in loader)
    assert torch.equal(image_of(pickle.loads(pickle.dumps(examples)), 1, 0), image)


def test_one_that_cannot_be_read_says_why(folder: Path) -> None:
    found = photographs(folder, 28)
    (folder / found.test_files[0]).write_bytes(b"no image")
    assert isinstance(fault := found.test_examples()[0, 0], str)
    assert fault.startswith(f"can't read the image {folder / found.test_files[0]} (cannot identify")


def test_the_usual_side(folder: Path, write_images: Writer) -> None:
    assert usual_side(folder) == 47
    (folder / "cat/1.png").write_bytes(b"no image")
    assert usual_side(folder) == 47
    empty = write_images("cat/1.png", root="broken")
    (empty / "cat/1.png").write_bytes(b"")
    with pytest.raises(UserError, match="no images that can be read in"):
        usual_side(empty)


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is neither a folder nor a \.zip archive"):
        photographs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="image size must be at least 1, got 0"):
        photographs(folder, 0)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    for name in "ab":
        (tmp_path / "single" / name).mkdir(parents=True)
        (tmp_path / "single" / name / "1.png").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="no test images in"):
        photographs(tmp_path / "single")
