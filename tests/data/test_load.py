from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnkit._checks import UserError
from bnkit.data import load, names


def test_names():
    assert names() == ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100")


def test_an_unknown_name_meets_the_nearest():
    with pytest.raises(UserError, match=r"unknown data set 'fashon-mnist': did you mean fashion-mnist"):
        load("fashon-mnist")


@pytest.mark.parametrize("path", ["some/where", "./digits", "~/no-such-folder", "images.zip"])
def test_a_missing_path_is_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"no such folder: {path}; check the path"):
        load(path)


def test_a_file_is_no_data_set(tmp_path: Path):
    (tmp_path / "file.txt").touch()
    with pytest.raises(UserError, match=r"file\.txt is neither a folder nor a \.zip archive"):
        load(tmp_path / "file.txt")


def test_an_existing_folder_needs_no_slash(write_images, monkeypatch: pytest.MonkeyPatch):
    root = write_images("a/1.png", "a/2.png", "b/1.png", "b/2.png", root="mnst")
    monkeypatch.chdir(root.parent)
    assert load("mnst").classes == ("a", "b")


def test_names_come_before_folders(write_images, monkeypatch: pytest.MonkeyPatch):
    root = write_images("a/1.png", "a/2.png", "b/1.png", "b/2.png", root="digits")
    monkeypatch.chdir(root.parent)
    assert load("digits").num_classes == 10
    assert load("./digits").num_classes == 2


def test_size_resizes_as_pillow_does():
    plain, resized = load("digits"), load("digits", size=32)
    assert resized.shape == (1, 32, 32)
    for index in (0, 5000, 59_999):  # in the first, a middle and the last piece
        image = Image.fromarray(plain.train_images[index, 0].numpy())
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(resized.train_images[index, 0].numpy(), expected)
    assert resized.test_images.shape == (10_000, 1, 32, 32)


def test_a_size_below_one_is_refused():
    with pytest.raises(UserError, match="image size must be at least 1, got 0"):
        load("digits", size=0)
