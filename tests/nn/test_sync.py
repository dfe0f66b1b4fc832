"""SyncBatchNorm on ranks that are threads, against batch normalization of all their batches in one."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from oracle import ACTIVATIONS, Case, assert_as_accurate, lay_out, make_case
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnkit.nn
from bnkit._checks import UserError
from bnkit.moments import Moments
from bnkit.nn import SyncBatchNorm, SyncError

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed"),
]
if dist.is_available():
    from ranks_in_threads import on_ranks

# The sizes (N, *) of each rank's batch.
EQUAL = [(2, 3, 4), (2, 3, 4)]
UNEQUAL = [(5, 3, 4), (1, 2, 7), (2, 1, 1)]  # in N, H and W
WITH_EMPTY = [(0, 3, 4), (4, 3, 2), (0, 5, 5), (1, 2, 2)]
ALL_IN_ONE = [(0, 2), (7, 3), (0, 2)]
ONE_EACH = [(1,), (1,), (1,)]  # a value a channel on each rank, too few for batch normalization by itself


def share(rows: torch.Tensor | None, sizes: list[tuple[int, ...]], rank: int, layout: str) -> torch.Tensor | None:
    """The rank's part of all values (n, C), as a batch (N, C, *) of its size."""
    if rows is None:
        return None
    part = rows.split([math.prod(size) for size in sizes])[rank]
    batch = part.reshape(*sizes[rank], rows.shape[1]).movedim(-1, 1)
    return lay_out(batch, layout if batch.dim() == 4 else "contiguous")


def as_rows(batches: list[torch.Tensor | None]) -> torch.Tensor | None:
    """What `share` was given."""
    if batches[0] is None:
        return None
    return torch.cat([batch.movedim(1, -1).flatten(0, -2) for batch in batches])


def make_layer(case: Case, **options) -> SyncBatchNorm:
    """A layer in the state of the case."""
    layer = SyncBatchNorm(
        case.x.shape[1],
        eps=case.eps,
        momentum=case.momentum,
        affine=case.weight is not None,
        bias=case.bias is not None,
        activation=case.activation,
        dtype=case.running_mean.dtype,
        **options,
    )
    state = {"running_mean": case.running_mean, "running_var": case.running_var}
    state |= {name: value for name in ("weight", "bias") if (value := getattr(case, name)) is not None}
    layer.load_state_dict(state, strict=False)
    return layer


def results_of(case: Case, sizes: list[tuple[int, ...]], layout: str = "contiguous"):
    """All that a step computes on ranks with batches of these sizes, as one batch would give it."""

    def step(rank: int):
        layer = make_layer(case)
        x, residual = (share(rows, sizes, rank, layout) for rows in (case.x, case.residual))
        x.requires_grad_()
        if residual is not None:
            residual.requires_grad_()
        y = layer(x, residual)
        y.backward(share(case.dy, sizes, rank, "contiguous"))
        return y.detach(), x.grad, residual.grad if residual is not None else None, layer

    y, dx, dresidual, layers = zip(*on_ranks(len(sizes), step), strict=True)
    for layer in layers[1:]:
        assert torch.equal(layer.running_mean, layers[0].running_mean), "ranks disagree"
        assert torch.equal(layer.running_var, layers[0].running_var), "ranks disagree"
    results = {"y": as_rows(y), "dx": as_rows(dx), "dresidual": as_rows(dresidual)}
    for name in ("weight", "bias"):
        parameters = [getattr(layer, name) for layer in layers]
        results["d" + name] = None if parameters[0] is None else torch.stack([p.grad for p in parameters]).sum(0)
    return results | {"running_mean": layers[0].running_mean, "running_var": layers[0].running_var}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL, WITH_EMPTY, ALL_IN_ONE, ONE_EACH], ids=str)
@pytest.mark.parametrize("extras", ["plain", "relu of a sum"])
def test_equals_one_batch(sizes, dtype, extras):
    options = {"activation": "relu", "residual": True} if extras != "plain" else {}
    case = make_case((sum(map(math.prod, sizes)), 5), dtype=dtype, **options)
    assert_as_accurate(results_of(case, sizes), case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
def test_options(activation, affine):
    case = make_case((46, 5), activation=activation, affine=affine, residual=True, momentum=0.7, eps=1e-3)
    assert_as_accurate(results_of(case, [(2, 3, 4), (1, 5, 3), (1, 1, 7)], "channels_last"), case)


@pytest.mark.parametrize(("mean", "std"), [(1e4, 1e-1), (-3e3, 1e-2), (1e-8, 1e-9)])
def test_far_from_zero(mean, std):
    """Sums of squares would cancel here."""
    case = make_case((sum(map(math.prod, UNEQUAL)), 5), mean=mean, std=std, eps=1e-12)
    assert_as_accurate(results_of(case, UNEQUAL), case)


def test_second_derivatives():
    case = make_case((14, 3), dtype=torch.float64)
    sizes = [(2, 5), (4, 1)]

    def penalty(rank: int):
        layer = make_layer(case) if rank >= 0 else bnkit.nn.BatchNorm1d(3, dtype=torch.float64)
        layer.load_state_dict(make_layer(case).state_dict())
        x = share(case.x, sizes, rank, "contiguous") if rank >= 0 else case.x.clone()
        x.requires_grad_()
        slope = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)[0]
        slope.square().sum().backward()
        return x.grad, layer.weight.grad

    whole = penalty(-1)
    parts = on_ranks(2, penalty)
    torch.testing.assert_close(as_rows([part[0] for part in parts]), whole[0])
    torch.testing.assert_close(parts[0][1] + parts[1][1], whole[1])


def test_one_collective_each_way(monkeypatch):
    from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup

    calls = []

    def counted(name: str, original):
        def call(*args):
            calls.append((threading.get_ident(), name))
            return original(*args)

        return call

    for name in ("allgather_into_tensor_coalesced", "_allgather_base", "allreduce", "broadcast", "barrier"):
        monkeypatch.setattr(ProcessLocalGroup, name, counted(name, getattr(ProcessLocalGroup, name)))

    def step(rank: int) -> list[list[str]]:
        def mine() -> list[str]:
            return [name for thread, name in calls if thread == threading.get_ident()]

        before = len(mine())
        layer, x = SyncBatchNorm(3, activation="relu"), torch.randn(4, 3, 5, requires_grad=True)
        y = layer(x, torch.randn_like(x))
        forward = len(mine())
        y.backward(torch.randn_like(y))
        return [mine()[before:forward], mine()[forward:]]

    assert on_ranks(2, step) == [[["_allgather_base"], ["allreduce"]]] * 2


def test_running_statistics_over_many_steps():
    """By value after 0, 1, 2 and many, with momentum None: the mean over batches, each of all ranks."""
    data = torch.randn(20, 2, 6, 3, dtype=torch.float64) * 3 + 1

    def train(rank: int):
        layer = SyncBatchNorm(3, momentum=None, dtype=torch.float64)
        return [(layer(batch[rank]), copy.deepcopy(layer.state_dict()))[1] for batch in data]

    for states in on_ranks(2, train):
        for step in (1, 2, 20):
            seen = data[:step].flatten(1, 2)
            torch.testing.assert_close(states[step - 1]["running_mean"], seen.mean(1).mean(0))
            torch.testing.assert_close(states[step - 1]["running_var"], seen.var(1).mean(0))
            assert states[step - 1]["num_batches_tracked"] == step


def test_groups_are_separate_and_survive_a_copy():
    data = torch.randn(4, 3, 2)

    def step(rank: int):
        groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
        layer = SyncBatchNorm(2, process_group=groups[rank in (1, 2)])
        twin = copy.deepcopy(layer)
        assert twin.process_group is layer.process_group
        assert twin.weight is not layer.weight
        layer(data[rank])
        twin(data[rank])
        assert torch.equal(twin.running_mean, layer.running_mean)
        return layer.running_mean

    means = on_ranks(4, step)
    for pair in ((0, 3), (1, 2)):
        for rank in pair:
            torch.testing.assert_close(means[rank], 0.1 * data[list(pair)].mean((0, 1)))


def test_a_process_outside_the_group():
    def step(rank: int):
        group = dist.new_group([0])
        layer = SyncBatchNorm(2, process_group=group)
        if rank == 0:
            layer(torch.randn(3, 2))
        else:
            with pytest.raises(UserError, match="this process has to be in the layer's process_group"):
                layer(torch.randn(3, 2))

    on_ranks(2, step)


def test_one_value_on_all_ranks_together():
    def step(rank: int):
        layer = SyncBatchNorm(2)
        with pytest.raises(UserError, match=r"Expected more than 1 value per channel .* on all ranks together"):
            layer(torch.randn(rank, 2))
        assert torch.equal(layer.running_var, torch.ones(2))
        assert layer.num_batches_tracked == 0

    on_ranks(2, step)


def test_nothing_on_all_ranks():
    def step(rank: int):
        layer, x = SyncBatchNorm(2), torch.randn(0, 2, 3, requires_grad=True)
        layer(x).sum().backward()
        assert torch.equal(layer.running_mean, torch.zeros(2))
        assert torch.equal(layer.running_var, torch.ones(2))
        assert torch.equal(layer.weight.grad, torch.zeros(2))

    on_ranks(2, step)


def test_skip_nonfinite_on_one_rank_is_skipped_on_all():
    def step(rank: int):
        layer, x = SyncBatchNorm(2, skip_nonfinite=True), torch.randn(4, 2)
        if rank == 1:
            x[0, 0] = math.inf
        layer(x)
        return layer

    for layer in on_ranks(2, step):
        assert layer.num_batches_tracked == 0
        assert torch.equal(layer.running_mean, torch.zeros(2))
        assert torch.equal(layer.running_var, torch.ones(2))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_each_batch_once(use_reentrant):
    data = torch.randn(2, 4, 3)

    def step(rank: int):
        layer, x = SyncBatchNorm(3), data[rank].clone().requires_grad_()
        checkpoint(layer, x, use_reentrant=use_reentrant).pow(3).sum().backward()
        return layer, x.grad

    whole, x = bnkit.nn.BatchNorm1d(3), data.flatten(0, 1).requires_grad_()
    whole(x).pow(3).sum().backward()
    (first, dx), (_, other_dx) = on_ranks(2, step)
    assert first.num_batches_tracked == 1
    torch.testing.assert_close(first.running_var, whole.running_var)
    torch.testing.assert_close(torch.cat([dx, other_dx]), x.grad)


def test_autocast():
    def step(rank: int):
        conv, layer = nn.Conv2d(3, 4, 3), SyncBatchNorm(4, activation="relu")
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(conv(torch.randn(2, 3, 8, 8)))
        y.backward(torch.randn_like(y))
        assert y.dtype == torch.bfloat16
        assert layer.weight.grad.dtype == layer.running_var.dtype == torch.float32

    on_ranks(2, step)


def test_ranks_in_different_layers_are_told_so():
    def step(rank: int):
        layers = [SyncBatchNorm(3) for _ in range(2)]
        x = torch.randn(4, 3)
        for layer in layers:
            layer(x)
        with pytest.raises(
            SyncError, match=rf"rank {1 - rank} was in the forward pass of SyncBatchNorm\(3\) \(layer {2 - rank}"
        ):
            layers[rank](x)
        return len(layers)

    assert on_ranks(2, step) == [2, 2]


@pytest.mark.parametrize("training", [True, False])
def test_a_single_process_has_batch_norm(training):
    case = make_case((12, 4), activation="silu", residual=True)
    layer = make_layer(case).train(training)
    twin = bnkit.nn.BatchNorm1d(4, activation="silu", momentum=case.momentum).train(training)
    twin.load_state_dict(layer.state_dict())

    def same(rank: int = 0):
        assert torch.equal(layer(case.x, case.residual), twin(case.x, case.residual))
        assert torch.equal(layer.running_var, twin.running_var)

    same()
    on_ranks(1, same)


def test_eval_does_not_communicate():
    """Only one rank evaluates: anything else would wait for the other. Without statistics, eval takes the batch's."""

    def step(rank: int):
        if rank == 0:
            for options in ({}, {"track_running_stats": False}):
                SyncBatchNorm(3, timeout=1, **options).eval()(torch.randn(4, 3))

    on_ranks(2, step)


@pytest.mark.parametrize(
    ("layer", "batch", "error", "message"),
    [
        (SyncBatchNorm(3), torch.zeros(4), ValueError, r"expected input of shape \(N, C\)"),
        (SyncBatchNorm(3), torch.zeros(4, 2), ValueError, "expected 3 channels"),
        (SyncBatchNorm(3), torch.zeros(4, 3, dtype=torch.long), NotImplementedError, "not implemented for torch.int64"),
        (SyncBatchNorm(3, eps=0.0), torch.zeros(4, 3), ValueError, "eps must be positive"),
    ],
    ids=["dimensions", "channels", "type", "eps"],
)
def test_refuses_before_it_communicates(layer, batch, error, message):
    """On one rank alone, which therefore does not wait."""

    def step(rank: int):
        if rank == 0:
            with pytest.raises(error, match=message):
                layer(batch)
            assert layer.num_batches_tracked == 0

    on_ranks(2, step)


def test_refuses_a_residual_of_another_shape():
    def step(rank: int):
        with pytest.raises(ValueError, match="residual must have the input's shape"):
            SyncBatchNorm(3)(torch.zeros(4, 3), torch.zeros(1, 3))

    on_ranks(2, step)


def test_is_a_batch_norm_to_others():
    layer = SyncBatchNorm(4, 1e-3, 0.2, True, True, None, "cpu", torch.float64)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)  # DistributedDataParallel refuses those on CPUs
    assert (layer.eps, layer.momentum, layer.weight.dtype) == (1e-3, 0.2, torch.float64)
    nn.SyncBatchNorm(4).load_state_dict(layer.state_dict())
    assert repr(SyncBatchNorm(3, activation="relu", timeout=30)).endswith("activation=relu, timeout=30)")
    assert repr(pickle.loads(pickle.dumps(layer))) == repr(layer)
    model = nn.Sequential(nn.Linear(4, 4), SyncBatchNorm(4))
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]


def test_a_timeout_has_to_be_positive():
    with pytest.raises(UserError, match="timeout must be positive, got 0"):
        SyncBatchNorm(3, timeout=0)
    with pytest.raises(UserError, match="timeout must be positive, got '5'"):
        SyncBatchNorm(3, timeout="5")


@pytest.mark.parametrize("group", [3, "nccl", print])
def test_a_process_group_has_to_be_one(group):
    with pytest.raises(UserError, match="process_group must be a process group, or None for all ranks, got"):
        SyncBatchNorm(3, process_group=group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_are_merged_at_once_as_one_by_one(dtype):
    parts = [(1e4 + torch.randn(n, 3, dtype=torch.float64)).to(dtype) for n in (5, 0, 1, 40)]
    found = on_ranks(4, lambda rank: Moments.of(parts[rank], (0,)).all_reduce())
    whole = torch.cat(parts).double()
    for moments in found:
        assert moments.count == 46
        exact_mean = moments.mean.double() + moments.mean_error
        torch.testing.assert_close(exact_mean, whole.mean(0), rtol=1e-9 if dtype == torch.float32 else 1e-15, atol=0)
        torch.testing.assert_close(moments.variance().double(), whole.var(0, correction=0), rtol=1e-6, atol=0)
        for field in dataclasses.fields(moments):
            assert torch.equal(getattr(moments, field.name), getattr(found[0], field.name))
