"""A network's run over calibration batches: the moments of its layers' outputs, and its own to compare others with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._modes import buffers_kept, evaluating, hooked
from ..graph import Forward, apart, feed, tensors_in
from ..moments import Moments
from ._insert_sites import Site
from ._verify import relative_error, run_changed

_KEPT_BYTES = 2**28


class Witness:
    """Batches and what a network made of them, of which as many are kept as fit into 256 MiB."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, Any, list[Tensor]]] = []
        self._left = _KEPT_BYTES

    def note(self, index: int, batch: Any, output: Any) -> None:
        """Keep copies of the `index`-th batch and of the output, which was made `drawing(index)`, if they fit."""
        outputs = [tensor.detach() for tensor in tensors_in(output)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in (*tensors_in(batch), *outputs))
        if size <= self._left:
            self._left -= size
            self._seen.append((index, apart(batch), apart(outputs)))

    def largest_error(self, model: nn.Module, forward: Forward, verb: str) -> float:
        """`relative_error` of a changed model's outputs on the batches kept, in eval mode."""
        errors = [0.0]
        for index, batch, outputs in self._seen:
            with drawing(index):
                errors.append(relative_error(run_changed(model, batch, forward, verb), outputs))
        return max(errors)


@contextlib.contextmanager
def drawing(index: int) -> Iterator[None]:
    """Random numbers of one's own, the same ones whenever the index is."""
    with torch.random.fork_rng():
        torch.manual_seed(index)
        yield


def measure(
    model: nn.Module, sites: Iterable[Site], batches: Iterable[Any], forward: Forward, witness: Witness
) -> dict[nn.Module, Moments]:
    """The moments of each site's outputs over all batches, in eval mode. All but the first go to the witness."""
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
            if index:
                witness.note(index, batch, output)
    return moments
