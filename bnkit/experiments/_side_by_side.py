"""Calls that run at the same time, each on one CPU thread in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

import torch

Call = Callable[[Any], Any]


def possible() -> int:
    """How many calls can run side by side: as many as PyTorch has threads, where processes can be forked."""
    # macOS's own libraries don't survive a fork, and a daemon may not have children.
    forks = sys.platform == "linux" and not multiprocessing.current_process().daemon
    return torch.get_num_threads() if forks else 1


@contextlib.contextmanager
def side_by_side(calls: Sequence[Call]) -> Iterator[Callable[[Any], list]]:
    """Make the calls as often as wanted; what they leave behind between two calls stays in their processes.

    Threads would not do: operators this small are over before the next thread has got hold of Python's lock. A single
    call is made in this process, without PyTorch's other threads.

    Yields:
        A function that gives its argument to all of them and returns what they return, in order. What a call raises,
        it raises.
    """
    if len(calls) == 1:
        with threads(1):
            yield lambda argument: [calls[0](argument)]
        return
    with contextlib.ExitStack() as stack:
        forked = [stack.enter_context(contextlib.closing(_Forked(call))) for call in calls]

        def run(argument: Any) -> list:
            for fork in forked:
                fork.send(argument)
            return [fork.receive() for fork in forked]

        yield run


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run PyTorch's operators on `count` threads, by default as many as now. In small ones several only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Forked:
    """A call that lives in a forked process."""

    def __init__(self, call: Call) -> None:
        self.connection, other = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=_serve, args=(call, other), daemon=True)
        with warnings.catch_warnings():
            # The child takes up no lock that another thread could hold: it computes and writes to its pipe.
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            self.process.start()
        other.close()

    def send(self, argument: Any) -> None:
        self.connection.send(argument)

    def receive(self) -> Any:
        try:
            raised, value = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"A training process ended with exit code {self.process.exitcode}.") from None
        if raised:
            raise value
        return value

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(call: Call, pipe: connection.Connection) -> None:
    """Answer until the process that asks is gone."""
    # An interrupt from the keyboard reaches all processes; the one that asks ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    while pipe in connection.wait([pipe, parent.sentinel]):
        try:
            answer = (False, call(pipe.recv()))
        except BaseException as error:
            answer = (True, error)
        pipe.send(answer)
