"""The collectives of SyncBatchNorm: one at a time, in step, and with a name for the rank that stays away.

In every call each rank sends, beside its numbers, which layer it is in; ranks in different ones find out at once. A
call that some rank never makes ends with the timeout. To tell which costs nothing while all goes well: only a rank that
has waited for `PATIENCE` writes into the process group's store where it waits, and in the end those who have not are
named.

Compiled graphs and, unless a timeout is asked for, accelerators don't look at what they exchange, since that would wait
for the device: there the process group's own timeout is all there is.
"""

from __future__ import annotations

import contextlib
import datetime
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING or dist.is_available():  # else there are no process groups either
    import torch.distributed._functional_collectives as functional_collectives
    from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, PrefixStore, Store
    from torch.distributed.distributed_c10d import _get_default_store

PATIENCE = 1.0
"""Seconds after which a rank that waits says so; and for how long, in the end, to look for those who say so."""

_REMEDY = (
    "Every rank has to call each SyncBatchNorm equally often, with an empty batch if it has no data: "
    "look for branches, loaders of unequal length and processes that died."
)


class SyncError(RuntimeError):
    """Ranks fell out of step: one left out a `SyncBatchNorm`, was in another one, or died. The message names it."""


@dataclass(eq=False)
class _Roll:
    """What this process knows of the calls of all `SyncBatchNorm`s in a process group.

    Layers are numbered by their first call, so that a program whose ranks call them in the same order numbers them
    alike, whatever else its ranks have built.
    """

    ranks: list[int]
    rank: int
    store: Store
    calls: int = 0
    layers: weakref.WeakKeyDictionary[nn.Module, int] = field(default_factory=weakref.WeakKeyDictionary)

    def number(self, layer: nn.Module) -> int:
        return self.layers.setdefault(layer, len(self.layers) + 1)

    def report(self, place: str) -> None:
        """Tell the others that this rank waits at `place`."""
        self.store.set(str(self.rank), place)

    def withdraw(self) -> None:
        with contextlib.suppress(RuntimeError):  # not every store can delete
            self.store.delete_key(str(self.rank))

    def places(self) -> dict[int, str]:
        """Where those ranks wait that have reported, once all have or some time has passed."""
        found: dict[int, str] = {}
        deadline = time.monotonic() + 2 * PATIENCE
        while len(found) < len(self.ranks) and time.monotonic() < deadline:
            missing = [rank for rank in self.ranks if rank not in found]
            found |= {rank: self.store.get(str(rank)).decode() for rank in missing if self.store.check([str(rank)])}
            time.sleep(0.01)
        return found


_rolls: weakref.WeakKeyDictionary[dist.ProcessGroup, _Roll] = weakref.WeakKeyDictionary()


def _roll(group: dist.ProcessGroup) -> _Roll:
    if group not in _rolls:
        store = PrefixStore(f"bnkit.sync/{group.group_name}", _get_default_store())
        _rolls[group] = _Roll(dist.get_process_group_ranks(group), dist.get_rank(), store)
    return _rolls[group]


@dataclass(frozen=True)
class Exchange:
    """How one call of a layer, forward and backward, talks to the other ranks.

    Attributes:
        group: The ranks that share statistics.
        number: Of the layer among those of the group.
        label: What messages call it.
        timeout: Seconds to wait for the others; None for the process group's own.
    """

    group: dist.ProcessGroup
    number: int
    label: str
    timeout: float | None

    @staticmethod
    def of(layer: nn.Module, group: dist.ProcessGroup, label: str, timeout: float | None) -> Exchange:
        number = 0 if torch.compiler.is_compiling() else _roll(group).number(layer)
        return Exchange(group, number, label, timeout)

    def gather(self, vector: Tensor) -> Tensor:
        """The vectors of all ranks, (R, n), on each of them."""
        if torch.compiler.is_compiling():
            return functional_collectives.all_gather_tensor(vector[None], 0, self.group)
        code = 2.0 * self.number
        sent = torch.cat([vector.new_full((1,), code), vector])
        received = sent.new_empty(self.group.size(), len(sent))
        options = AllgatherOptions()
        self._limit(options)
        start = lambda: self.group._allgather_base(received.view(-1), sent, options)  # noqa: E731
        self._run("forward", start, received, lambda: bool((received[:, 0] == code).all()))
        return received[:, 1:]

    def sum(self, vector: Tensor) -> Tensor:
        """The sum of the ranks' vectors, on each of them."""
        if torch.compiler.is_compiling():
            return functional_collectives.all_reduce(vector, "sum", self.group)
        code, size = 2.0 * self.number + 1.0, self.group.size()
        # Numbers are equal to `code` where they and their squares add up to what `code` would.
        total = torch.cat([vector.new_full((1,), code), vector.new_full((1,), code * code), vector])
        options = AllreduceOptions()
        self._limit(options)
        start = lambda: self.group.allreduce([total], options)  # noqa: E731
        self._run("backward", start, total, lambda: total[:2].tolist() == [size * code, size * code * code])
        return total[2:]

    def _limit(self, options: AllgatherOptions | AllreduceOptions) -> None:
        if self.timeout is not None:
            options.timeout = datetime.timedelta(seconds=self.timeout)

    def _run(self, direction: str, start: Callable[[], dist.Work], result: Tensor, same: Callable[[], bool]) -> None:
        roll = _roll(self.group)
        roll.calls += 1
        if not result.is_cpu and self.timeout is None:
            start().wait()
            return
        place = f"the {direction} pass of {self.label} (layer {self.number} by first call, call {roll.calls})"
        began = time.monotonic()
        try:
            waited = self._wait(start(), lambda: roll.report(place))
        except RuntimeError as error:
            raise SyncError(_account(roll, place, time.monotonic() - began)) from error
        if not same():
            raise SyncError(_account(roll, place, time.monotonic() - began))
        if waited:
            roll.withdraw()

    def _wait(self, work: dist.Work, report: Callable[[], None]) -> bool:
        """Wait for the collective; report if it takes long, and return whether it did."""
        patience = PATIENCE if self.timeout is None else min(PATIENCE, self.timeout / 2)
        try:
            work.wait(datetime.timedelta(seconds=patience))
        except RuntimeError:
            # Not done yet, or it failed, or this backend knows no such waiting: then the second time tells.
            waits = not work.is_completed()
            if waits:
                report()
            work.wait()
            return waits
        return False


def _account(roll: _Roll, place: str, seconds: float) -> str:
    """Who is where, for the message of an error."""
    here = f"rank {roll.rank} waited {seconds:.1f} s in {place}"
    try:
        roll.report(place)
        places = roll.places()
    except RuntimeError:
        return (
            f"{here}, and now the store does not answer either: the process or machine that keeps it is gone. {_REMEDY}"
        )
    missing = [rank for rank in roll.ranks if rank not in places]
    elsewhere = [f"rank {rank} was in {there}" for rank, there in places.items() if there != place]
    words = [here]
    if missing:
        names = ", ".join(map(str, missing))
        words.append(f"rank {names} did not take part" if len(missing) == 1 else f"ranks {names} did not take part")
    return f"{'; '.join(words + elsewhere)}. {_REMEDY}"
