"""Training-mode forward passes that leave the running statistics alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ._layers import batch_norms, refuse_lazy, unwrapped


@contextlib.contextmanager
def preserve_statistics(model: nn.Module) -> Iterator[None]:
    """Forward passes inside leave every batch norm's running statistics and `num_batches_tracked` as they are.

    In training mode batches are normalized with their own statistics as ever, in eval mode with the running ones. For
    the second pass of a GAN's discriminator, adversarial examples, a warm-up with dummy data, or the inner loop of
    meta-learning. Gradients flow as ever, and `backward` may come after the end. Nests, and ends well on an exception.

    The layers are told through `track_running_stats`, which torch.nn's, this package's and timm's heed. What a batch
    norm of another make does to its buffers all the same is undone at the end.

    Activation checkpointing with torch.nn's layers runs the forward pass again in the backward pass: with it, call
    `backward` inside.

    Args:
        model: any model; one that trains statistics only in parts may be given by that part.

    Raises:
        UserError: a lazy batch norm has no statistics yet; it makes them only where they are tracked.
    """
    named = batch_norms(unwrapped(model))
    refuse_lazy(named)
    layers = list(named.values())
    before = [(layer, layer.track_running_stats) for layer in layers]
    buffers = [(b, b.clone()) for layer in layers if not _heeds(layer) for b in layer.buffers(recurse=False)]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracked in before:
            layer.track_running_stats = tracked
        with torch.no_grad():
            for buffer, old in buffers:
                if not torch.equal(buffer, old):  # writing would spoil a backward pass that is still to come
                    buffer.copy_(old)


def _heeds(layer: nn.Module) -> bool:
    return type(layer).forward.__module__.split(".")[0] in ("torch", "timm", __name__.split(".")[0])
