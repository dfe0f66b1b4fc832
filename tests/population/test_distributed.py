"""Two processes, each with its share of the data, against one with all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "checks",
    [
        [
            "shards_equal_the_whole",
            "one_collective_for_all_layers",
            "one_rank_has_no_data",
            "one_rank_is_short",
            "one_rank_fails",
            "moving_is_refused",
        ],
        ["one_rank_dies"],
    ],
    ids=["all", "death"],
)
def test_two_ranks(checks):
    script = str(Path(__file__).with_name("two_ranks.py"))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *checks]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
