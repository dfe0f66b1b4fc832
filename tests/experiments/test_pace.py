"""When steps leave and take up the other threads again; the clock is the test's own."""

import pytest
import torch

from bnkit.experiments import _pace
from bnkit.experiments._pace import Pace


@pytest.fixture
def machine(monkeypatch):
    """Steps take `seconds[threads]`."""
    torch.set_num_threads(2)
    now = {"time": 0.0, 1: 1.0, 2: 0.6}
    monkeypatch.setattr(_pace.time, "perf_counter", lambda: now["time"])
    monkeypatch.setattr(_pace, "_PATIENCE", 20)
    yield now
    torch.set_num_threads(1)


def run(pace, machine, count):
    """Threads of each step."""
    used = []

    def step():
        used.append(torch.get_num_threads())
        machine["time"] += machine[torch.get_num_threads()]

    for _ in range(count):
        pace.run(step)
    return used


def test_all_threads_after_a_probe_on_one(machine):
    with Pace(adapt=True) as pace:
        assert run(pace, machine, 100) == [1] * 10 + [2] * 90


def test_one_thread_where_two_are_slower_and_another_try_later(machine):
    machine[2] = 5.0
    with Pace(adapt=True) as pace:
        assert run(pace, machine, 70) == [1] * 10 + [2] * 10 + [1] * 20 + [2] * 10 + [1] * 20


def test_two_threads_again_when_the_machine_is_free(machine):
    machine[2] = 5.0
    with Pace(adapt=True) as pace:
        run(pace, machine, 30)
        machine[2] = 0.6
        assert run(pace, machine, 60) == [1] * 10 + [2] * 50


def test_threads_are_restored_also_after_an_error(machine):
    with pytest.raises(RuntimeError, match="boom"), Pace(adapt=True):
        raise RuntimeError("boom")
    assert torch.get_num_threads() == 2


def test_without_adapting_nothing_changes(machine):
    with Pace(adapt=False) as pace:
        assert run(pace, machine, 30) == [2] * 30


def test_seconds_are_the_steps(machine):
    with Pace(adapt=False) as pace:
        assert pace.run(lambda: machine.update(time=machine["time"] + 3.0)) == 3.0
