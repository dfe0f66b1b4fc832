"""A network's run over calibration batches: the moments of its layers' outputs, and its own to compare others with."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._modes import buffers_kept, evaluating, hooked
from ..graph import Forward, apart, feed, tensors_in
from ..moments import Moments
from ._insert_sites import Site
from ._verify import largest_values, relative_error, still_runs

_KEPT_BYTES = 2**28


class Witness:
    """The first batches and what a network made of them, in eval mode: as many as fit into 256 MiB."""

    def __init__(self) -> None:
        self._seen: list[tuple[Any, list[Tensor]]] = []
        self._left = _KEPT_BYTES

    def note(self, batch: Any, output: Any) -> None:
        """Keep copies, if they and all before them fit."""
        outputs = [tensor.detach() for tensor in tensors_in(output)]
        self._left -= sum(tensor.numel() * tensor.element_size() for tensor in (*tensors_in(batch), *outputs))
        if self._left >= 0:
            self._seen.append((apart(batch), apart(outputs)))

    def largest_error(self, model: nn.Module, forward: Forward, verb: str) -> float:
        """How far a changed model's outputs are from those, relative to the largest in any batch.

        The batches run in their order, each on the buffers that the one before left.
        """
        largest = [largest_values(outputs) for _, outputs in self._seen]
        floors = [max(values) for values in itertools.zip_longest(*largest, fillvalue=0.0)]
        error = 0.0
        with evaluating(model), buffers_kept(model), torch.no_grad():
            for index, (batch, outputs) in enumerate(self._seen):
                with drawing(index), still_runs(verb):
                    found = feed(model, apart(batch), forward)
                error = max(error, relative_error(found, outputs, floors))
        return error


@contextlib.contextmanager
def drawing(index: int) -> Iterator[None]:
    """Random numbers of one's own, the same ones whenever the index is."""
    with torch.random.fork_rng():
        torch.manual_seed(index)
        yield


def measure(
    model: nn.Module, sites: Iterable[Site], batches: Iterable[Any], forward: Forward, witness: Witness
) -> dict[nn.Module, Moments]:
    """The moments of each site's outputs over all batches, in eval mode. The witness notes them."""
    moments: dict[nn.Module, Moments] = {}

    def watch(site: Site) -> Any:
        def add(module: nn.Module, args: Any, output: Tensor) -> None:
            dims = range(output.dim() - 1) if site.linear else (0, *range(2, output.dim()))
            found = Moments.of(output.detach(), tuple(dims))
            moments[module] = moments[module].merge(found) if module in moments else found

        # Ahead of others' hooks, which may replace the output: the norm comes before them too.
        return site.module.register_forward_hook(add, prepend=True)

    with evaluating(model), buffers_kept(model), torch.no_grad(), hooked(watch(site) for site in sites):
        for index, batch in enumerate(batches):
            with drawing(index):
                output = feed(model, apart(batch), forward)
            witness.note(batch, output)
    return moments
