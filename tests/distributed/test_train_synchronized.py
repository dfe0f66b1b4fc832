"""`bnkit train` with synchronized statistics on two processes, against one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")

COMMAND = [
    "train",
    "--model",
    "lenet5",
    "--norm",
    "sync",
    "--epochs",
    "0.01",
    "--batch-size",
    "50",
    "--augment",
    "none",
]
COMMAND += ["--precision", "64-true", "--device", "cpu", "--evaluations", "1", "--lr", "0.02"]


def test_two_processes_train_as_one(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "bnkit.cli", *COMMAND, "--out", str(tmp_path / name)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert len(one) == len(two) > 10
    moved = 0
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        moved += name.endswith("running_mean") and tensor.abs().max() > 1e-3
    assert moved >= 2
    config = json.loads((tmp_path / "two" / "run.json").read_text())["config"]
    assert config["devices"] == 2
