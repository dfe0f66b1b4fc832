"""SyncBatchNorm and `reduce_statistics` on real processes: few runs, many checks, since to start them takes longest."""

from __future__ import annotations

import pytest
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("this build of PyTorch has no torch.distributed", allow_module_level=True)

from processes import run_checks


def test_three_ranks_compute_what_one_does(tmp_path):
    run_checks(["equals_one_batch", "compiles_without_graph_breaks", "reduces_statistics"], 3, tmp_path)


def test_under_distributed_data_parallel(tmp_path):
    checks = [
        "ddp",
        "ddp_different_input_sizes",
        "ddp_vectors_down_to_one_on_each_rank",
        "ddp_channels_last",
        "ddp_running_statistics_of_different_sizes",
        "ddp_bfloat16",
        "ddp_inference_on_one_rank",
        "ddp_uneven_inputs_end_with_an_error",
    ]
    run_checks(checks, 3, tmp_path)


def test_ranks_that_skip_a_call_are_named(tmp_path):
    checks = ["a_slow_rank_is_waited_for", "skipped_forward", "skipped_backward", "one_forward_others_backward"]
    run_checks(checks, 3, tmp_path)


def test_a_killed_rank_is_named(tmp_path):
    run_checks(["killed"], 3, tmp_path, dead=[2])
