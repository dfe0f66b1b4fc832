"""One rank of a test: `worker.py CHECK,CHECK,... INIT_METHOD RANK WORLD FILE` runs checks and writes what failed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import ddp_checks
import pytest
import torch
import torch.distributed as dist
from torch import nn

from bnkit.nn import BatchNorm1d, DomainBatchNorm, SyncBatchNorm, SyncError
from bnkit.population import reduce_statistics


def batches(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """The batch of each rank, the same wherever it is called."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, generator=generator, dtype=dtype) * 2 + 3 for size in sizes]


def one_batch(parts: list[torch.Tensor]) -> torch.Tensor:
    """(n, C): all values of all ranks."""
    return torch.cat([part.movedim(1, -1).flatten(0, -2) for part in parts])


def check_equals_one_batch(rank: int) -> None:
    xs, dys = batches((2, 4, 3, 5), (0, 4, 1, 1), (1, 4, 7, 1)), batches((2, 4, 3, 5), (0, 4, 1, 1), (1, 4, 7, 1))
    layer, whole = SyncBatchNorm(4, activation="silu").double(), BatchNorm1d(4, activation="silu").double()
    x, all_x = xs[rank].clone().requires_grad_(), one_batch(xs).requires_grad_()
    y, all_y = layer(x), whole(all_x)
    y.backward(dys[rank].square())
    all_y.backward(one_batch(dys).square())
    sizes = [len(one_batch([part])) for part in xs]
    torch.testing.assert_close(one_batch([y]), all_y.split(sizes)[rank])
    torch.testing.assert_close(one_batch([x.grad]), all_x.grad.split(sizes)[rank])
    torch.testing.assert_close(layer.running_var, whole.running_var)
    for mine, all_of_them in zip(layer.parameters(), whole.parameters(), strict=True):
        dist.all_reduce(mine.grad)
        torch.testing.assert_close(mine.grad, all_of_them.grad)


def check_compiles_without_graph_breaks(rank: int) -> None:
    for options in ({"activation": "relu", "momentum": None}, {"skip_nonfinite": True, "affine": False}):
        torch._dynamo.reset()
        eager, layer = (SyncBatchNorm(4, **options) for _ in range(2))
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            x = batches((2, 4, 3), (3, 4, 3), (1, 4, 3), dtype=torch.float32)[rank]
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            for call, z in zip((eager, compiled), inputs, strict=True):
                call(z).pow(3).sum().backward()
            torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
            torch.testing.assert_close(layer.state_dict(), eager.state_dict())


def check_reduces_statistics(rank: int) -> None:
    """Means of 1, 2, 4 and variances of 1, 2, 3, seen 1, 3 and 0 times; rank 2's must not count."""
    model = nn.Sequential(nn.Linear(2, 2), SyncBatchNorm(2), DomainBatchNorm(2, ["a", "b"]), nn.BatchNorm2d(2))
    norms = list(model)[1:]
    norms[0].running_mean.fill_([1.0, 2.0, 4.0][rank])
    norms[0].running_var.fill_([1.0, 2.0, 3.0][rank])
    norms[0].num_batches_tracked.fill_([1, 3, 0][rank])
    norms[1].running_means[1] += rank
    norms[1].batches_tracked[1] = 5
    buffers = [buffer.data_ptr() for buffer in model.buffers()]
    reduce_statistics(model)
    assert [buffer.data_ptr() for buffer in model.buffers()] == buffers
    torch.testing.assert_close(norms[0].running_mean, torch.full((2,), 1.75))
    torch.testing.assert_close(norms[0].running_var, torch.full((2,), (1 + 0.75**2 + 3 * (2 + 0.25**2)) / 4))
    assert norms[0].num_batches_tracked == 3
    torch.testing.assert_close(norms[1].running_means, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(norms[1].running_vars, torch.tensor([[1.0, 1.0], [5 / 3, 5 / 3]]))
    torch.testing.assert_close(norms[2].running_var, torch.ones(2))  # no rank has used it
    norms[2].running_mean.fill_([0.0, 8.0, 4.0][rank])
    group = dist.new_group([0, 1])
    if rank < 2:
        reduce_statistics(model, group, weight=[3, 1][rank])
        torch.testing.assert_close(norms[2].running_mean, torch.full((2,), 2.0))
        torch.testing.assert_close(norms[2].running_var, torch.full((2,), 1 + (3 * 2**2 + 6**2) / 4))


def check_skipped_forward(rank: int) -> None:
    layer = SyncBatchNorm(3, process_group=dist.new_group(), timeout=1)
    x = torch.randn(4, 3)
    layer(x)
    if rank != 1:
        with pytest.raises(SyncError, match=r"forward pass of SyncBatchNorm\(3\) .*; rank 1 did not take part\."):
            layer(x)
    dist.barrier()


def check_skipped_backward(rank: int) -> None:
    layer = SyncBatchNorm(3, process_group=dist.new_group(), timeout=1)
    y = layer(torch.randn(4, 3, requires_grad=True))
    if rank != 2:
        with pytest.raises(SyncError, match=r"backward pass of SyncBatchNorm\(3\) .*; rank 2 did not take part\."):
            y.square().sum().backward()
    dist.barrier()


def check_one_forward_others_backward(rank: int) -> None:
    group = dist.new_group()
    first, second = (SyncBatchNorm(3, process_group=group, timeout=1) for _ in range(2))
    y = first(torch.randn(4, 3, requires_grad=True))
    with pytest.raises(SyncError, match=r"backward pass of .*forward pass of|forward pass of .*backward pass of"):
        second(y) if rank == 1 else y.square().sum().backward()
    dist.barrier()


def check_a_slow_rank_is_waited_for(rank: int) -> None:
    layer = SyncBatchNorm(3, timeout=30)
    if rank == 1:
        time.sleep(1.5)
    layer(torch.randn(4, 3))
    layer(torch.randn(4, 3))


def check_killed(rank: int) -> None:
    """The last rank dies between two calls: the others say who, and keep their buffers."""
    layer, x = SyncBatchNorm(3), torch.randn(4, 3)
    layer(x)
    if rank == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(SyncError, match=r"rank 2 did not take part\. Every rank has to call"):
        layer(x)
    assert layer.num_batches_tracked == 1
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError):
        reduce_statistics(layer)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if name.startswith("check_")}
CHECKS |= {name.removeprefix("check_"): f for name, f in vars(ddp_checks).items() if name.startswith("check_")}


def main(names: str, init_method: str, rank: int, world: int, file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world)
    failed = {}
    for name in names.split(","):
        torch.manual_seed(0)
        try:
            CHECKS[name](rank)
        except BaseException:
            failed[name] = traceback.format_exc()
            break  # the ranks may be out of step
    file.write_text(json.dumps(failed))
    sys.stdout.flush()
    os._exit(0)  # gloo waits at exit for ranks that are gone


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
