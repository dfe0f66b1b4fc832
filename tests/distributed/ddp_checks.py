"""PyTorch's own tests of SyncBatchNorm under DistributedDataParallel (torch.testing._internal.distributed.
distributed_test), which need GPUs there, on CPUs and with our layer.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bnkit.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm


class Net(nn.Module):
    """BatchNormNet of the original."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, 40, bias=False)
        self.norm = norm
        self.fc2 = nn.Linear(40, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x).view(-1, 4, 10)).view(-1, 40))


def train_side_by_side(whole: nn.Module, parallel: nn.Module, x: Tensor, target: Tensor, sizes: list[int]) -> None:
    """Five steps of SGD: one process with everything, and ranks with their shares, whose losses are means of theirs."""
    rank = dist.get_rank()
    mine, my_target = x.split(sizes)[rank], target.split(sizes)[rank]
    for _ in range(5):
        for model, batch, wanted in ((whole, x, target), (parallel, mine, my_target)):
            model.zero_grad()
            # Ranks average the gradients; unequal shares need their weights.
            weight = 1.0 if model is whole else len(batch) * len(sizes) / len(x)
            (weight * nn.functional.mse_loss(model(batch), wanted)).backward()
        with torch.no_grad():
            for one, other in zip(whole.parameters(), parallel.parameters(), strict=True):
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)
                one -= 0.1 * one.grad
                other -= 0.1 * other.grad
    inner = parallel.module.state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(inner[name], tensor, rtol=1e-4, atol=1e-6)


def pair(norm: nn.Module, sync: SyncBatchNorm) -> tuple[Net, DistributedDataParallel]:
    whole = Net(norm)
    parallel = Net(sync)
    parallel.load_state_dict(whole.state_dict())
    return whole, DistributedDataParallel(parallel)


def check_ddp(rank: int) -> None:
    for affine in (True, False):
        whole, parallel = pair(BatchNorm1d(4, momentum=0.99, affine=affine), SyncBatchNorm(4, 1e-5, 0.99, affine))
        file = io.BytesIO()
        torch.save(parallel, file)
        file.seek(0)
        parallel = torch.load(file, weights_only=False)
        equal = [2] * dist.get_world_size()
        train_side_by_side(whole, parallel, torch.randn(sum(equal), 2), torch.randn(sum(equal), 4), equal)


def check_ddp_different_input_sizes(rank: int) -> None:
    whole, parallel = pair(BatchNorm1d(4), SyncBatchNorm(4))
    train_side_by_side(whole, parallel, torch.randn(9, 2), torch.randn(9, 4), [2, 3, 4])


def check_ddp_vectors_down_to_one_on_each_rank(rank: int) -> None:
    for share in (2, 1):
        whole = BatchNorm1d(2)
        parallel = DistributedDataParallel(SyncBatchNorm(2))
        sizes = [share] * dist.get_world_size()
        train_side_by_side(whole, parallel, torch.randn(sum(sizes), 2), torch.randn(sum(sizes), 2), sizes)


def check_ddp_channels_last(rank: int) -> None:
    sizes = [2] * dist.get_world_size()
    for norm, shape, layout in (
        (BatchNorm2d, (6, 2, 4, 4), torch.channels_last),
        (BatchNorm3d, (6, 2, 4, 4, 4), torch.channels_last_3d),
    ):
        whole, parallel = norm(2, momentum=0.99), DistributedDataParallel(SyncBatchNorm(2, momentum=0.99))
        x, target = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
        assert parallel(x.split(sizes)[rank]).is_contiguous(memory_format=layout)
        whole(x)
        train_side_by_side(whole, parallel, x, target, sizes)


def check_ddp_running_statistics_of_different_sizes(rank: int) -> None:
    """Batches of 20, 200 and 2000 values a channel, each constant on its rank."""
    layer = DistributedDataParallel(SyncBatchNorm(2, momentum=0.99))
    parts = [
        torch.cat([torch.ones(2, 1, 10 ** (i + 1)) * base ** (i - 1) for base in (0.1, 0.3)], dim=1) for i in range(3)
    ]
    for _ in range(30):
        layer(parts[rank]).mean().backward()
    everything = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
    torch.testing.assert_close(layer.module.running_mean, everything.mean(1))
    torch.testing.assert_close(layer.module.running_var, everything.var(1))


def check_ddp_bfloat16(rank: int) -> None:
    parallel = pair(BatchNorm1d(4), SyncBatchNorm(4))[1]
    with torch.autocast("cpu", torch.bfloat16):
        y = parallel(torch.randn(8, 2))
    y.mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in parallel.parameters())
    assert parallel.module.norm.running_var.dtype == torch.float32


def check_ddp_inference_on_one_rank(rank: int) -> None:
    layer = SyncBatchNorm(2, momentum=0.99, track_running_stats=False, timeout=5)
    parallel, alone = DistributedDataParallel(layer), copy.deepcopy(layer)
    if rank == 0:
        x = torch.randn(10, 2, 4, 4)
        torch.testing.assert_close(parallel.eval()(x), alone.eval()(x))
    dist.barrier()


def check_ddp_uneven_inputs_end_with_an_error(rank: int) -> None:
    """A rank with more batches than the others: DDP's join context ends all of them, rather than hang."""
    parallel = pair(BatchNorm1d(4), SyncBatchNorm(4))[1]
    done = []

    def train() -> None:
        with parallel.join(throw_on_early_termination=True):
            for step in range(3 + rank):
                parallel(torch.randn(2, 2)).sum().backward()
                done.append(step)

    with pytest.raises(RuntimeError, match=r"exhausted (all )?inputs"):
        train()
    assert len(done) == 3
