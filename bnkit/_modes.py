"""Context managers that put a model back as it was, exceptions or not: training flags, buffers, hooks; and random
generators. They nest.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn


class RemovableHandle(Protocol):
    """What registering a hook returns."""

    def remove(self) -> None: ...


@contextlib.contextmanager
def training_flags_kept(model: nn.Module) -> Iterator[None]:
    """Put `training` of the model and of every module in it back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # Set and not called: train() of a frozen module would not do as it is told, and that of others does more.
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the time being."""
    with training_flags_kept(model):
        model.eval()
        yield


@contextlib.contextmanager
def buffers_kept(buffers: nn.Module | Iterable[Tensor]) -> Iterator[None]:
    """Put a model's buffers, or the tensors given, back as they were: their values in place, and the model's own
    tensors where others have come in their stead.
    """
    modules = buffers.modules() if isinstance(buffers, nn.Module) else ()
    registries = [module._buffers for module in modules if isinstance(module._buffers, dict)]  # a scripted one's is not
    entries = [dict(registry) for registry in registries]
    tensors = list(buffers.buffers() if isinstance(buffers, nn.Module) else buffers)
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for registry, old in zip(registries, entries, strict=True):
            registry.clear()
            registry.update(old)
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                if not torch.equal(tensor, old):  # some can't be written to: expanded ones, those of inference mode
                    tensor.copy_(old)


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks of these handles in the end, also those that were registered before registering failed."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Leave the generators of torch, numpy and Python as they were."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
