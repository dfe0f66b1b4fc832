from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from bnkit._checks import UserError
from bnkit.data import load
from bnkit.data._idx import FILES
from bnkit.data._torchvision import _LABELS

CIFAR = {
    "cifar10": (datasets.CIFAR10, "labels", ["data_batch_1", "data_batch_2"], "test_batch"),
    "cifar100": (datasets.CIFAR100, "fine_labels", ["train"], "test"),
}


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A web server on this machine: its address and the folder it serves."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/", folder
        running.shutdown()


@pytest.fixture
def small_mnist() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = [(20, 28, 28), (20,), (10, 28, 28), (10,)]
    return {
        name: generator.integers(0, 256 if len(shape) > 1 else 10, shape, dtype=np.uint8)
        for name, shape in zip(FILES, shapes, strict=True)
    }


@pytest.fixture
def mnist_mirror(small_mnist, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local stand-in for the servers of MNIST and Fashion-MNIST: its folder."""
    address, mirror = server
    resources = []
    for name, array in small_mnist.items():
        content = gzip.compress(idx(array))
        (mirror / f"{name}.gz").write_bytes(content)
        resources.append((f"{name}.gz", md5(content)))
    for dataset in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(dataset, "mirrors", [address])
        monkeypatch.setattr(dataset, "resources", resources)
    return mirror


def test_mnist_is_torchvisions(mnist_gz: Path, mnist_unpacked: Path):
    packed, plain = load("mnist", data_dir=mnist_gz), load("mnist", data_dir=mnist_unpacked)
    for images, labels, train in (
        (packed.train_images, packed.train_labels, True),
        (packed.test_images, packed.test_labels, False),
    ):
        expected = datasets.MNIST(mnist_unpacked, train=train)
        assert torch.equal(images[:, 0], expected.data)
        assert torch.equal(labels, expected.targets)
    assert torch.equal(plain.train_images, packed.train_images)
    # The values everyone normalizes MNIST with.
    assert packed.mean.item() == pytest.approx(0.1307, abs=5e-5)
    assert packed.std.item() == pytest.approx(0.3081, abs=5e-5)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_download_of_mnist(name: str, small_mnist, mnist_mirror: Path, tmp_path: Path, capfd):
    images = load(name, data_dir=tmp_path / "new", download=True)
    tensors = [images.train_images[:, 0], images.train_labels, images.test_images[:, 0], images.test_labels]
    for tensor, array in zip(tensors, small_mnist.values(), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert capfd.readouterr() == ("", "")
    for archive in mnist_mirror.iterdir():
        archive.unlink()
    again = load(name, data_dir=tmp_path / "new")
    assert torch.equal(again.train_images, images.train_images)
    assert again.name == name


def test_class_names_are_torchvisions():
    assert list(_LABELS["fashion-mnist"]) == datasets.FashionMNIST.classes
    assert [f"{label} - " for label in _LABELS["mnist"]] == [name[:4] for name in datasets.MNIST.classes]


def test_labels_must_be_of_the_classes(tmp_path: Path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in FILES:
        images = np.zeros((4, 28, 28), np.uint8)
        (folder / name).write_bytes(idx(images if "images" in name else np.array([0, 3, 77, 9], np.uint8)))
    with pytest.raises(UserError, match=r"the labels in .*raw must be less than 10, got 77: the file is damaged"):
        load("mnist", data_dir=tmp_path)


def test_images_and_labels_must_belong_together(small_mnist, tmp_path: Path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in small_mnist.items():
        (raw / name).write_bytes(idx(array[:-1] if name == FILES[1] else array))
    with pytest.raises(UserError, match=r"don't belong together \(\(20, 28, 28\) and \(19,\)\)"):
        load("mnist", data_dir=tmp_path)


@pytest.fixture(params=CIFAR)
def cifar_server(request: pytest.FixtureRequest, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch):
    """A local stand-in for CIFAR's server; yields the set's name and the arrays it serves."""
    dataset, key, train_files, test_file = CIFAR[request.param]
    generator = np.random.default_rng(0)
    arrays, sums, archive = {}, {}, server[1] / dataset.filename
    with tarfile.open(archive, "w:gz") as tar:

        def add(file: str, content: object) -> None:
            data = pickle.dumps(content)
            sums[file] = md5(data)
            entry = tarfile.TarInfo(f"{dataset.base_folder}/{file}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))

        for file in (*train_files, test_file):
            images = generator.integers(0, 256, (6, 3072), dtype=np.uint8)
            arrays[file] = images.reshape(6, 3, 32, 32), [0, 1, 2, 2, 1, 0]
            add(file, {"data": images, key: arrays[file][1]})
        add(dataset.meta["filename"], {dataset.meta["key"]: ["cat", "dog", "frog"]})
    monkeypatch.setattr(dataset, "url", server[0] + dataset.filename)
    monkeypatch.setattr(dataset, "tgz_md5", md5(archive.read_bytes()))
    monkeypatch.setattr(dataset, "train_list", [[file, sums[file]] for file in train_files])
    monkeypatch.setattr(dataset, "test_list", [[test_file, sums[test_file]]])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": sums[dataset.meta["filename"]]})
    return request.param, [arrays[file] for file in train_files], arrays[test_file]


def test_download_of_cifar(cifar_server, tmp_path: Path, capfd):
    name, train, test = cifar_server
    images = load(name, data_dir=tmp_path / "new", download=True)
    np.testing.assert_array_equal(images.train_images.numpy(), np.concatenate([array for array, _ in train]))
    np.testing.assert_array_equal(images.test_images.numpy(), test[0])
    assert images.train_labels.tolist() == [label for _, labels in train for label in labels]
    assert images.test_labels.tolist() == test[1]
    assert images.classes == ("cat", "dog", "frog")
    assert images.shape == (3, 32, 32)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(load(name, data_dir=tmp_path / "new").train_images, images.train_images)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
    ],
)
def test_a_missing_set_says_where_it_was_looked_for(name: str, folder: str, tmp_path: Path):
    with pytest.raises(UserError, match=rf"no complete {name} in {tmp_path}/{folder}: .*--data-dir, or .*--download"):
        load(name, data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_default_data_dir_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"no complete mnist in {tmp_path}/data/MNIST/raw"):
        load("mnist")


def test_a_damaged_cifar_is_not_read(cifar_server, tmp_path: Path):
    name, _, _ = cifar_server
    load(name, data_dir=tmp_path / "new", download=True)
    test_file = next((tmp_path / "new").rglob("test*"))
    test_file.write_bytes(test_file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"no complete {name} in"):
        load(name, data_dir=tmp_path / "new")


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_a_failed_download_is_one_line(
    name: str, server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    address, _ = server
    if name == "MNIST":
        monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
    else:
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}absent")
    with pytest.raises(
        UserError, match=rf"^can't download {name.lower()} to .+ \(.*404.*\): check network .+$"
    ) as raised:
        load(name.lower(), data_dir=tmp_path / "new", download=True)
    assert "\n" not in str(raised.value)
