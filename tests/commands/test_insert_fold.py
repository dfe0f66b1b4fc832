"""`bnkit insert` and `bnkit fold`: files in, files out, one report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bnkit import UserError, models, surgery
from bnkit._weights import load_weights, save_weights

OPTIONS = ("-o", "num_classes=2", "-o", "in_channels=3", "-o", "image_size=32")


def vgg(norm: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.create("vgg11", norm=norm, num_classes=2, in_channels=3, image_size=32).eval()


def test_insert_calibrates_on_images_and_writes_weights(bnkit: Callable, pictures: Path, tmp_path: Path):
    model = vgg("none")
    save_weights(model, tmp_path / "plain.safetensors")
    result = bnkit("insert", "vgg11", tmp_path / "plain.safetensors", "--data", pictures, "--batch-size", 32,
                   "--out", tmp_path / "bn.safetensors")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "10 changed, 1 skipped" in result.output
    x = torch.randn(2, 3, 32, 32)
    new = surgery.insert(vgg("none"), torch.randn(4, 3, 32, 32)).model
    load_weights(new, tmp_path / "bn.safetensors")
    torch.testing.assert_close(new.eval()(x), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(new.features[0].bn.running_mean, torch.zeros(64))


def test_insert_without_data_builds_the_model_without_norms(bnkit: Callable, tmp_path: Path):
    arguments = ("vgg11", *OPTIONS, "--shape", "3,32,32", "--json")
    with pytest.warns(UserWarning, match="without calibration data"):
        plain = json.loads(bnkit("insert", *arguments).stdout)
    assert len(plain["changed"]) == 10
    assert set(plain["skipped"]) == {"classifier.6"}
    save_weights(vgg("none"), tmp_path / "plain.pt")
    with pytest.warns(UserWarning, match="without calibration data"):
        assert bnkit("insert", "bnkit:vgg11", tmp_path / "plain.pt", *arguments[1:]).exit_code == 0
    with pytest.warns(UserWarning, match="without calibration data"):
        normed = json.loads(bnkit("insert", *arguments, "-o", "norm=batch").stdout)
    assert len(normed["changed"]) == 2  # the linear layers


def test_insert_without_data_warns(bnkit: Callable):
    with pytest.warns(UserWarning, match="without calibration data"):
        result = bnkit("insert", "vgg11", *OPTIONS, "-o", "norm=none", "--shape", "3,32,32", "--json")
    facts = json.loads(result.stdout)
    assert facts["skipped"] == {"classifier.6": "it makes the model's output"}
    assert facts["max_error"] < 1e-5 < facts["training_error"]


def test_fold_writes_a_program_that_runs_alone(bnkit: Callable, tmp_path: Path):
    model = vgg("batch")
    save_weights(model, tmp_path / "bn.pt")
    result = bnkit("fold", "vgg11", tmp_path / "bn.pt", *OPTIONS, "-o", "norm=batch", "--shape", "3,32,32",
                   "--out", tmp_path / "folded.pt2")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "8 changed, 0 skipped" in result.output
    program = torch.export.load(tmp_path / "folded.pt2")
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)


MODELS = """
import torch
from torch import nn

class Branching(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y

class Stateful(nn.Sequential):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass

class Strict(nn.Sequential):
    def forward(self, x):
        assert x.shape[1] == 3, "three channels"
        return super().forward(x)

def made(kind):
    return kind(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

def branching(): return made(Branching)
def stateful(): return nn.Sequential(made(Stateful))
def strict(): return made(Strict)
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MODELS)
    return f"{tmp_path / 'mine.py'}:"


def test_insert_writes_a_program_for_any_batch_after_calibrating_on_single_images(
    bnkit: Callable, pictures: Path, tmp_path: Path
):
    result = bnkit("insert", "vgg11", "--data", pictures, "--batch-size", 1, "--batches", 3,
                   "--out", tmp_path / "bn.pt2")  # fmt: skip
    assert result.exit_code == 0, result.output
    program = torch.export.load(tmp_path / "bn.pt2").module()
    assert program(torch.randn(5, 3, 32, 32)).shape == (5, 2)
    assert program(torch.randn(1, 3, 32, 32)).shape == (1, 2)


def test_a_model_that_torch_can_not_export_is_one_clear_error(bnkit: Callable, mine: str, tmp_path: Path):
    result = bnkit("fold", f"{mine}branching", "--shape", "3,8,8", "--out", tmp_path / "program.pt2")
    assert result.exit_code == 1
    assert result.stdout == ""
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("bnkit: a program must be of a model that torch.export takes, got one that fails (")
    assert message.endswith(f"write the weights, with --out {tmp_path}/program.safetensors or {tmp_path}/program.pt.")
    assert "def forward" not in result.stderr
    assert not (tmp_path / "program.pt2").exists()


def test_state_that_is_no_tensor_goes_into_pt_files_only(bnkit: Callable, mine: str, tmp_path: Path):
    arguments = ("fold", f"{mine}stateful", "--shape", "3,8,8", "--out")
    with pytest.raises(UserError, match=r"hold tensors only, got 0\._extra_state of another type: name a \.pt file"):
        bnkit(*arguments, tmp_path / "folded.safetensors")
    assert not (tmp_path / "folded.safetensors").exists()
    assert bnkit(*arguments, tmp_path / "folded.pt").exit_code == 0
    assert torch.load(tmp_path / "folded.pt")["0._extra_state"] == {"version": 1}


def test_bad_numbers_are_one_clear_error(bnkit: Callable, mine: str, pictures: Path):
    for shape in ("-3,8,8", "3,0,8"):
        with pytest.raises(UserError, match=f"--shape must be of sizes of at least 1, got '{shape}'"):
            bnkit("fold", f"{mine}strict", "--shape", shape)
    with pytest.raises(UserError, match=r"on inputs of shape \(2, 4, 8, 8\), but fails \(AssertionError: three chann"):
        bnkit("fold", f"{mine}strict", "--shape", "4,8,8")
    for option, number in (("--batches", 0), ("--batches", -1), ("--batch-size", 0)):
        with pytest.raises(UserError, match=f"{option} must be at least 1, got {number}"):
            bnkit("insert", "vgg11", "--data", pictures, option, number)


def test_bad_use_is_one_clear_error(bnkit: Callable, tmp_path: Path):
    with pytest.raises(UserError, match="--shape must be numbers"):
        bnkit("fold", "vgg11", *OPTIONS, "--shape", "3x32x32")
    with pytest.raises(UserError, match=r"must run on inputs of shape \(2, 1, 32, 32\)"):
        bnkit("fold", "vgg11", *OPTIONS, "--shape", "1,32,32")
    torch.save(vgg("none"), tmp_path / "module.pt")
    with pytest.raises(UserError, match="pickle of more than weights"):
        bnkit("fold", "vgg11", tmp_path / "module.pt", *OPTIONS, "--shape", "3,32,32")
    save_weights(vgg("none"), tmp_path / "plain.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "plain.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole checkpoint"):
        bnkit("fold", "vgg11", tmp_path / "short.pt", *OPTIONS, "--shape", "3,32,32")
    with pytest.raises(UserError, match=r"it lacks features.1.weight"):
        bnkit("fold", "vgg11", tmp_path / "plain.pt", *OPTIONS, "-o", "norm=batch", "--shape", "3,32,32")
