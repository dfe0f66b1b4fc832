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


def test_insert_without_data_warns(bnkit: Callable):
    with pytest.warns(UserWarning, match="without calibration data"):
        result = bnkit("insert", "vgg11", *OPTIONS, "-o", "norm=none", "--shape", "3,32,32", "--json")
    facts = json.loads(result.stdout)
    assert facts["skipped"] == {"classifier.6": "it makes the model's output"}
    assert facts["max_error"] < 1e-5


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
