"""The order in which training visits the examples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .._checks import require, unknown

SHUFFLES = ("all", "within-shards", "shards")
_SHARD = 1024


class BatchOrder:
    """Endless shuffled batches of example indices, resumable from two integers.

    Each epoch's permutation follows from (seed, epoch) alone, so the place in the data is the pair (epoch, position),
    and an order resumed from it goes on exactly as the uninterrupted one would.

    Arguments:
        n: number of examples.
        batch_size: examples a batch.
        seed: any integer; equal seeds give equal orders.
        drop_last: leave out an epoch's last, smaller batch. With False it is yielded.
        shuffle: `"all"` examples anew in each epoch; or, as where they are read from shards of 1,024, drawn once,
            `"shards"`, which then always hold the same examples in the same order, or `"within-shards"`, which are
            shuffled too (Ioffe and Szegedy 2015, section 4.2.1).

    Yields:
        int64 tensors of indices in [0, n), (batch_size,).

    Raises:
        UserError: `n` or `batch_size` is below 1, or `drop_last` leaves an epoch without batches; an unknown
            `shuffle`.
    """

    def __init__(self, n: int, batch_size: int, seed: int, *, drop_last: bool = True, shuffle: str = "all") -> None:
        require(n >= 1, f"the number of examples must be at least 1, got {n}: choose a data set that has some.")
        require(batch_size >= 1, f"the batch size must be at least 1, got {batch_size}: choose a larger one.")
        require(
            batch_size <= n or not drop_last,
            f"the batch size {batch_size} exceeds the {n} training examples: choose a smaller one.",
        )
        if shuffle not in SHUFFLES:
            raise unknown("shuffle", shuffle, SHUFFLES)
        self.n, self.batch_size, self.seed, self.drop_last, self.shuffle = n, batch_size, seed, drop_last, shuffle
        self.batches_per_epoch = n // batch_size if drop_last else -(-n // batch_size)
        self._epoch, self._position = 0, 0
        self._batches: tuple[Tensor, ...] = ()

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self._epoch

    @property
    def position(self) -> int:
        """The next batch's place in its epoch, from 0."""
        return self._position

    def __iter__(self) -> BatchOrder:
        return self

    def __next__(self) -> Tensor:
        if not self._batches:
            self._batches = self._permutation().split(self.batch_size)
        batch = self._batches[self._position]
        self._position += 1
        if self._position == self.batches_per_epoch:
            self._epoch, self._position, self._batches = self._epoch + 1, 0, ()
        return batch

    def state_dict(self) -> dict[str, int]:
        """The place in the data: `{"epoch": ..., "position": ...}`."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state`.

        Raises:
            UserError: the place does not exist in this order, as where the data or the batch size differ.
        """
        epoch, position = state["epoch"], state["position"]
        require(
            epoch >= 0 and 0 <= position < self.batches_per_epoch,
            f"there is no batch {position} in epoch {epoch}, which has {self.batches_per_epoch} batches: "
            "resume with the data and the batch size of the run that was saved.",
        )
        self._epoch, self._position, self._batches = epoch, position, ()

    def _permutation(self) -> Tensor:
        generator = self._generator(str(self._epoch))
        if self.shuffle == "all":
            return torch.randperm(self.n, generator=generator)
        shards = torch.randperm(self.n, generator=self._generator("shards")).split(_SHARD)
        order = torch.randperm(len(shards), generator=generator).tolist()
        if self.shuffle == "shards":
            return torch.cat([shards[i] for i in order])
        return torch.cat([shards[i][torch.randperm(len(shards[i]), generator=generator)] for i in order])

    def _generator(self, purpose: str) -> torch.Generator:
        # Hashed, so that (seed 0, epoch 1) and (seed 1, epoch 0) have nothing in common, as they would if added.
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
