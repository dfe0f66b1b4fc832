"""One of several processes that measure together: `two_ranks.py WHAT`, started by torchrun. Asserts by itself."""

from __future__ import annotations

import copy
import datetime
import os
import sys

import pytest
import torch
import torch.distributed as dist
from nets import batches, buffers, net, same

from bnkit.population import adapt, recalibrate

SIZES = (4, 7, 2, 5, 3)


def gathered(values):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return everyone


def shards_equal_the_whole():
    rank = dist.get_rank()
    torch.manual_seed(0)
    model, data = net(), batches(*SIZES)
    mine = {0: data[:4], 1: data[4:]}[rank]  # four batches here, one there
    for run in (
        lambda m, d, **k: recalibrate(m, d, "pooled", **k),
        lambda m, d, **k: recalibrate(m, d, "batch", **k),
        lambda m, d, **k: recalibrate(m, d, "layerwise", **k),
        lambda m, d, **k: adapt(m, d, 8, "layerwise", **k),
    ):
        together, alone = copy.deepcopy(model), copy.deepcopy(model)
        result = run(together, mine)
        expected = run(alone, data, distributed=False)
        assert result.batches == expected.batches == 5
        assert result.layers["1"].samples == sum(SIZES)
        for a, b in zip(together.buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=3e-7, atol=3e-7)
        assert gathered([b.tolist() for b in together.buffers()])[0] == [b.tolist() for b in together.buffers()]


def one_collective_for_all_layers():
    calls, all_gather = [], dist.all_gather

    def counted(*arguments, **options):
        calls.append(1)
        return all_gather(*arguments, **options)

    dist.all_gather = counted
    try:
        recalibrate(net(), batches(4))
    finally:
        dist.all_gather = all_gather
    assert len(calls) == 1


def one_rank_has_no_data():
    model, data = net(), batches(4, 5)
    dist.broadcast_object_list(shared := [data, model.state_dict()])
    data, state = shared
    for method in ("pooled", "layerwise"):
        model.load_state_dict(state)
        alone = copy.deepcopy(model)
        recalibrate(alone, data, method, distributed=False)
        recalibrate(model, data if dist.get_rank() == 0 else [], method)
        for a, b in zip(model.buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=3e-7, atol=3e-7)


def one_rank_is_short():
    model, data = net(), batches(4, 4, 4)
    mine = data[: 3 - dist.get_rank()]
    result = recalibrate(model, mine, num_batches=3)
    assert result.batches == 5
    assert result.short
    assert "3 batches were asked for of each of 2 ranks, the data had 5" in repr(result)
    assert not recalibrate(model, mine, num_batches=2).short
    assert recalibrate(model, mine, num_batches=3, distributed=False).short == (dist.get_rank() == 1)


def one_rank_fails():
    for method in ("pooled", "layerwise"):
        _one_rank_fails(method)


def _one_rank_fails(method):
    model = net()
    before = buffers(model)

    def loader():
        yield from batches(4)
        if dist.get_rank() == 1:
            raise OSError("disk gone")

    expected = [
        pytest.raises(RuntimeError, match=r"failed on rank 1 with OSError\('disk gone'\)"),
        pytest.raises(OSError, match="disk gone"),
    ]
    with expected[dist.get_rank()]:
        recalibrate(model, loader(), method)
    assert same(before, model.buffers())
    recalibrate(model, batches(4))  # and the group still works


def one_rank_dies():
    model = net()
    before = buffers(model)

    def loader():
        yield from batches(4)
        if dist.get_rank() == 1:
            os._exit(0)

    with pytest.raises(RuntimeError):
        recalibrate(model, loader())
    assert same(before, model.buffers())
    os._exit(0)  # a group with a dead rank can't be taken down


def moving_is_refused():
    with pytest.raises(ValueError, match="depends on the order of batches"):
        recalibrate(net(), batches(4), "moving")
    recalibrate(net(), batches(4), "moving", distributed=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name in sys.argv[1:]:
        globals()[name]()
    dist.destroy_process_group()
