from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST

from bnkit._checks import UserError
from bnkit.data import _digits, load

REPOSITORY = Path(__file__).parents[2]


def test_digits_are_torchvisions_mnist_binarized(mnist_unpacked: Path):
    digits = load("digits")
    for images, labels, train in (
        (digits.train_images, digits.train_labels, True),
        (digits.test_images, digits.test_labels, False),
    ):
        mnist = MNIST(mnist_unpacked, train=train)
        assert torch.equal(images[:, 0], (mnist.data >= 128) * torch.tensor(255, dtype=torch.uint8))
        assert torch.equal(labels, mnist.targets)


def test_digits_hold_mnists_counts():
    digits = load("digits")
    assert digits.name == "digits"
    assert digits.classes == tuple("0123456789")
    assert digits.shape == (1, 28, 28)
    assert digits.train_images.unique().tolist() == [0, 255]
    train, test = digits.train_labels.bincount().tolist(), digits.test_labels.bincount().tolist()
    assert train == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_digits_load_in_well_under_a_second():
    def seconds() -> float:
        start = time.perf_counter()
        load("digits")
        return time.perf_counter() - start

    # About 0.1 s; the best of three, since the machine may be busy.
    assert min(seconds() for _ in range(3)) < 0.7


def test_digits_need_no_torchvision():
    program = "import sys, bnkit.data; bnkit.data.load('digits'); sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = bytearray(_digits.PATH.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "digits.npz"
    damaged.write_bytes(content)
    monkeypatch.setattr(_digits, "PATH", damaged)
    with pytest.raises(UserError, match=r"digits\.npz are damaged .*: reinstall bnkit"):
        load("digits")


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_digits, "PATH", tmp_path / "digits.npz")
    with pytest.raises(UserError, match=r"can't read .*digits\.npz \(No such file or directory\): reinstall bnkit"):
        load("digits")


def test_the_script_makes_the_bundled_file_again(mnist_gz: Path, tmp_path: Path):
    out = tmp_path / "again.npz"
    script = REPOSITORY / "scripts" / "make_digits.py"
    subprocess.run([sys.executable, script, mnist_gz / "MNIST" / "raw", "--out", out], check=True, cwd=REPOSITORY)
    assert out.read_bytes() == _digits.PATH.read_bytes()
