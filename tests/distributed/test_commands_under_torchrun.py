"""Commands on two processes, against the same on one: the same results, written and printed once."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bnkit import models
from bnkit.cli import app

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def on_one_and_two(folder: Path, one: list[str], two: list[str]) -> tuple[str, str]:
    """What the commands print on one and on two processes, each writing into a folder of its name."""
    printed = []
    for name, launcher, command in (("one", [], one), ("two", TORCHRUN, two)):
        (folder / name).mkdir()
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "bnkit", *command],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=folder / name,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return printed[0], printed[1]


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = load_file(one), load_file(two)
    assert list(first) == list(second)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_train(tmp_path):
    """With synchronized statistics and float64 the weights agree to rounding."""
    command = "train --model lenet5 --norm sync --epochs 0.01 --batch-size 50 --augment none --precision 64-true"
    command = [*command.split(), *["--device", "cpu", "--evaluations", "1", "--lr", "0.02", "--out", "run", "--json"]]
    _, printed = on_one_and_two(tmp_path, command, command)
    assert json.loads(printed)["config"]["devices"] == 2
    weights = [tmp_path / name / "run" / "weights.safetensors" for name in ("one", "two")]
    assert_same_weights(*weights)
    means = [tensor for name, tensor in load_file(weights[1]).items() if name.endswith("running_mean")]
    assert len(means) >= 2
    assert all(mean.abs().max() > 1e-3 for mean in means)


def test_compare(tmp_path):
    """Synchronized on two processes as batch norm on one, with the same evaluations."""
    command = ["compare", "--model", "lenet5", "--steps", "3", "--batch-size", "50", "--device", "cpu"]
    command += ["--out", "run", "--json", "--norms"]
    _, printed = on_one_and_two(tmp_path, [*command, "batch"], [*command, "sync"])
    assert json.loads(printed)["config"]["devices"] == 2
    found = []
    for name in ("one", "two"):
        with (tmp_path / name / "run" / "metrics.csv").open(newline="") as file:
            found.append([float(row["test_loss"]) for row in csv.DictReader(file)])
        assert [path.name for path in (tmp_path / name).iterdir()] == ["run"]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert len(set(found[0])) == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_compare_trains_a_stack_on_the_first_process(rank, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    command = f"compare --quick --steps 2 --threads 1 --device cpu --json --out {tmp_path / 'run'}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0
    assert (tmp_path / "run").exists() == bool(result.stdout) == (rank == 0)


def test_recalibrate(tmp_path):
    """Each process measures its share of the batches; together they have the statistics of all images."""
    torch.manual_seed(0)
    net = models.create("lenet5", norm="batch", num_classes=10, in_channels=1, image_size=28).double()
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    command = "recalibrate lenet5 ../weights.safetensors --out new.safetensors --data digits --split test --json"
    one, two = on_one_and_two(tmp_path, command.split(), command.split())
    first, second = json.loads(one), json.loads(two)
    assert first["batches"] == 79
    assert second["layers"].keys() == first["layers"].keys()
    for name, layer in first["layers"].items():
        assert second["layers"][name] == pytest.approx(layer, rel=1e-4), name
    files = [load_file(tmp_path / name / "new.safetensors") for name in ("one", "two")]
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
