"""The commands on a small network and the bundled digits, alone and under torchrun."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import call

from bnkit import UserError, models
from bnkit._commands import _statistics
from bnkit._weights import load_weights, read_weights, save_weights
from bnkit.data import load
from bnkit.population import adapt, recalibrate

MODEL = ["bnkit:lenet5", "-o", "num_classes=10"]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_weights(models.create("lenet5", num_classes=10, in_channels=1), tmp_path / "before.pt")
    return tmp_path / "before.pt"


def network(path: Path):
    model = models.create("lenet5", num_classes=10, in_channels=1)
    load_weights(model, path)
    return model


def digits(split: str = "train") -> list[torch.Tensor]:
    images = load("digits")
    pixels = getattr(images, f"{split}_images").float() / 255
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return list(((pixels - images.mean) / images.std)[order].split(100))


def assert_same(path: Path, model) -> None:
    for name, value in read_weights(path).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_recalibrate(checkpoint, tmp_path):
    out = tmp_path / "after.safetensors"
    done = call("recalibrate", *MODEL, checkpoint, "--data", "digits", "--out", out, "--batch-size", 100)
    assert done.exit_code == 0
    assert "Recalibration: " in done.output
    assert f"Wrote {out}" in done.output
    model = network(checkpoint)
    recalibrate(model, digits())
    assert_same(out, model)


def test_adapt_as_json(checkpoint, tmp_path):
    out = tmp_path / "after.pt"
    arguments = ["--data", "digits", "--out", out, "--batch-size", 100, "--batches", 2, "--source-weight", 50, "--json"]
    facts = json.loads(call("adapt", *MODEL, checkpoint, *arguments).stdout)
    model = network(checkpoint)
    result = adapt(model, digits("test"), 50, num_batches=2)
    assert facts["batches"] == 2
    assert facts["layers"].keys() == result.layers.keys()
    assert_same(out, model)


def test_statistics_that_are_nan_are_null_in_json(tmp_path):
    model = models.create("lenet5", num_classes=10, in_channels=1)
    first = next(module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm))
    first.running_mean.fill_(math.nan)
    save_weights(model, tmp_path / "before.pt")
    arguments = ["--data", "digits", "--out", tmp_path / "after.pt", "--batches", 1, "--json"]
    text = call("recalibrate", *MODEL, tmp_path / "before.pt", *arguments).stdout
    drifts = list(json.loads(text, parse_constant=pytest.fail)["layers"].values())
    assert drifts[0]["mean_shift"] is None
    assert drifts[0]["var_ratio"] > 0
    text = call("evaluate", tmp_path / "before.pt", "--model", "bnkit:lenet5", "--data", "digits", "--json").stdout
    assert json.loads(text, parse_constant=pytest.fail)["results"][0]["loss"] is None


def test_two_processes_are_one(checkpoint, tmp_path):
    out = tmp_path / "after.pt"
    arguments = ["recalibrate", *MODEL, str(checkpoint), "--data", "digits", "--out", str(out), "--batch-size", "100"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bnkit"]
    done = subprocess.run([sys.executable, *launch, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    model = network(checkpoint)
    recalibrate(model, digits())
    assert_same(out, model)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    steps = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: steps.append(device))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: steps.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: steps.append("end"))
    monkeypatch.setattr(_statistics, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with _statistics._processes(torch.device("cuda", 0)) as device:
        assert device == torch.device("cuda", 1)
    assert steps == [torch.device("cuda", 1), "nccl", "end"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "val"], "--split must be train or test, got val"),
        (["--normalize", "imagenet"], "imagenet is for 3 channels"),
        (["--normalize", "own"], "unknown normalization 'own'"),
        (["--method", "pool"], "unknown method 'pool': did you mean pooled"),
        (["--device", "tpu"], "unknown device 'tpu': did you mean cpu"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    ],
)
def test_mistakes(checkpoint, tmp_path, arguments, message):
    out = tmp_path / "after.pt"
    with pytest.raises(UserError, match=message):
        call("recalibrate", *MODEL, checkpoint, "--data", "digits", "--out", out, *arguments)
    assert not out.exists()


def test_convert(checkpoint, tmp_path):
    out = tmp_path / "ghost.pt"
    done = call(
        *("convert", *MODEL, "-o", "in_channels=1", checkpoint, "--to", "ghost"),
        *("--norm-option", "ghost_size=8", "--out", out),
    )
    assert "GhostBatchNorm" in done.output
    assert_same(out, network(checkpoint))
    done = call("convert", *MODEL, "--to", "frozen", "--where", "*1*", "--json")
    facts = json.loads(done.stdout)
    assert facts["changed"]
    with pytest.raises(UserError, match="--norm-option is NAME=VALUE"):
        call("convert", *MODEL, "--norm-option", "ghost_size")
