from __future__ import annotations

import gzip
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def mnist_gz() -> Path:
    """The root of MNIST's four gzipped files, laid out as torchvision does."""
    root = SHARED / "mnist"
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"MNIST is not in {root}")
    return root


@pytest.fixture
def mnist_unpacked(mnist_gz: Path, tmp_path: Path) -> Path:
    """The root of MNIST's four files as torchvision wants them without a download: unpacked."""
    raw = tmp_path / "unpacked" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in (mnist_gz / "MNIST" / "raw").glob("*.gz"):
        with gzip.open(archive) as packed, (raw / archive.stem).open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return tmp_path / "unpacked"


@pytest.fixture
def cifar_zip(tmp_path: Path) -> Path:
    """A zip of CIFAR-10's first JPEGs: 10 classes, 6 training and 2 test images each, inside one outer folder."""
    whole = SHARED / "cifar10-jpeg.zip"
    if not whole.is_file():
        pytest.skip(f"{whole} is absent")
    part = tmp_path / "cifar.zip"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(part, "w") as target:
        for name in source.namelist():
            split, number = name.split("/")[1], Path(name).stem
            if name.endswith(".jpg") and int(number) < (6 if split == "train" else 2):
                target.writestr(name, source.read(name))
    return part


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., Path]:
    """Write random PNG images: `write_images("a/1.png", "b/2.png", mode="L", size=(8, 8))` returns their root."""
    generator = np.random.default_rng(0)

    def write(*files: str, mode: str = "RGB", size: tuple[int, int] = (8, 8), root: str = "images") -> Path:
        for file in files:
            path = tmp_path / root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(path)
        return tmp_path / root

    return write
