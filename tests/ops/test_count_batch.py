"""A layer's count of batches: written to where it lies, or by PyTorch's operator where others look at operators."""

from __future__ import annotations

import pytest
import torch
from _cases import Record
from torch.fx.experimental.proxy_tensor import make_fx

from bnkit.ops.dispatch import count_batch


class Tagged(torch.Tensor):
    """A subclass like any other."""


COUNTS = {
    "plain": lambda: torch.tensor(3),
    "one of several": lambda: torch.tensor([7, 3, 9])[1],
    "several": lambda: torch.tensor([3, 3]),
    "int32": lambda: torch.tensor(3, dtype=torch.int32),
    "float64": lambda: torch.tensor(3.0, dtype=torch.float64),
    "subclass": lambda: torch.tensor(3).as_subclass(Tagged),
    "shared between processes": lambda: torch.tensor(3).share_memory_(),
}


@pytest.mark.parametrize("name", COUNTS)
def test_it_grows_by_one_and_its_version_says_so(name):
    count = COUNTS[name]()
    version = count._version
    count_batch(count)
    assert (count == 4).all()
    assert count._version > version


def test_its_neighbours_stay():
    counts = torch.tensor([7, 3, 9])
    count_batch(counts[1])
    assert counts.tolist() == [7, 4, 9]


def test_beyond_32_bits():
    count = torch.tensor(2**40)
    count_batch(count)
    assert count.item() == 2**40 + 1


@pytest.mark.parametrize(("name", "by_operator"), [("plain", False), ("int32", True), ("subclass", True)])
def test_a_plain_count_goes_past_the_operators(name, by_operator):
    count = COUNTS[name]()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        count_batch(count)
    assert any(event.key == "aten::add_" for event in profile.key_averages()) == by_operator


def test_those_who_look_at_operators_see_it():
    count = torch.tensor(3)
    with Record() as mode:
        count_batch(count)
    assert mode.seen == ["aten.add_.Tensor"]
    assert count == 4


def test_it_is_recorded():
    def counted(count):
        count_batch(count)
        return count * 2

    for made in (make_fx(counted)(torch.tensor(0)), torch.jit.trace(counted, torch.tensor(0))):
        count = torch.tensor(5)
        assert made(count) == 12
        assert count == 6
    count = torch.tensor(5)
    assert torch.compile(counted, backend="eager", fullgraph=True)(count) == 12
    assert count == 6


def test_vmap_maps_over_it():
    counts = torch.tensor([1, 5])
    torch.vmap(lambda count: (count_batch(count), count)[1])(counts)
    assert counts.tolist() == [2, 6]
