"""As many threads as pay."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from types import TracebackType

import torch

_PROBE = 10
_PATIENCE = 5000


class Pace:
    """Runs steps on PyTorch's threads while that is faster than one thread, and on one where it is not.

    A thread that waits for another one spins. Where something else uses its core, both wait for the scheduler at
    every operator, and a step takes ten to a hundred times as long as on one thread. So the first steps are timed on
    one thread, every later handful is held against them, and after some thousand steps on one thread all are tried
    again. The number of threads is restored at the end.
    """

    def __init__(self, adapt: bool) -> None:
        self.most = torch.get_num_threads()
        self.adapt = adapt and self.most > 1
        self.alone = math.inf
        self.times: list[float] = []
        self.patience = 0

    def __enter__(self) -> Pace:
        if self.adapt:
            torch.set_num_threads(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.adapt:
            torch.set_num_threads(self.most)

    def run(self, step: Callable[[], object]) -> float:
        """Run one step; its seconds."""
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        if self.adapt:
            self._judge(seconds)
        return seconds

    def _judge(self, seconds: float) -> None:
        if self.patience > 0:
            self.patience -= 1
            if self.patience == 0:
                torch.set_num_threads(self.most)
            return
        self.times.append(seconds)
        if len(self.times) < _PROBE:
            return
        median, self.times = statistics.median(self.times), []
        if self.alone == math.inf:
            self.alone = median
            torch.set_num_threads(self.most)
        elif median > self.alone:
            torch.set_num_threads(1)
            self.patience = _PATIENCE
