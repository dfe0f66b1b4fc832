import os
import signal
import time

import pytest
import torch

from bnkit.experiments import _side_by_side
from bnkit.experiments._side_by_side import possible, side_by_side

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes can't be forked here")


class Counter:
    def __init__(self, start):
        self.value = start

    def __call__(self, step):
        self.value += step
        return self.value, os.getpid(), torch.get_num_threads()


@forks
def test_calls_keep_their_state_in_processes_of_their_own_with_one_thread_each():
    counters = [Counter(0), Counter(10)]
    with side_by_side(counters) as run:
        first, second = run(1), run(5)
    assert [value for value, _, _ in first] == [1, 11]
    assert [value for value, _, _ in second] == [6, 16]
    pids = {pid for _, pid, _ in first}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert {threads for _, _, threads in first} == {1}
    assert [counter.value for counter in counters] == [0, 10]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_single_call_is_made_here_on_one_thread():
    before = torch.get_num_threads()
    with side_by_side([Counter(0)]) as run:
        assert run(3) == [(3, os.getpid(), 1)]
    assert torch.get_num_threads() == before


@forks
def test_what_a_call_raises_is_raised_here():
    def divide(x):
        return 1 / x

    with side_by_side([divide, divide]) as run:
        assert run(2) == [0.5, 0.5]
        with pytest.raises(ZeroDivisionError):
            run(0)


@forks
def test_a_process_that_is_killed_is_an_error_and_not_a_wait_without_end():
    with (
        side_by_side([lambda _: os.kill(os.getpid(), signal.SIGKILL), lambda x: x]) as run,
        pytest.raises(RuntimeError, match="ended with exit code -9"),
    ):
        run(0)


@forks
def test_an_orphan_ends(tmp_path):
    """A process whose parent is killed does not stay behind."""
    note = tmp_path / "pids"
    parent = os.fork()
    if parent == 0:
        try:
            with side_by_side([Counter(0), Counter(0)]) as run:
                aside = tmp_path / "aside"
                aside.write_text(" ".join(str(pid) for _, pid, _ in run(1)))
                aside.rename(note)
                time.sleep(60)
        finally:
            os._exit(0)
    wait_for(note.exists)
    pids = [int(pid) for pid in note.read_text().split()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_for(lambda: not any(map(runs, pids)))


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("waited for 30 seconds")


def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_where_processes_cannot_be_forked_nothing_runs_side_by_side(monkeypatch):
    monkeypatch.setattr(_side_by_side.sys, "platform", "darwin")
    assert possible() == 1
