"""Random states that belong to one training run."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


class RandomState:
    """The random states of torch, numpy and Python as one run sees them.

    They are in force only inside `active()`. Hence what a model draws while it trains depends on its seed alone: not
    on another model trained in turns with it, nor on what the caller draws, and the caller's draws don't depend on
    the training.

    Args:
        seed: Zero or positive.
        device: Whose generator is kept beside the CPU's.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        caller = self._capture()
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self._state = self._capture()
        self._restore(caller)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Put this run's states in force, and the caller's back afterwards."""
        caller = self._capture()
        self._restore(self._state)
        try:
            yield
        finally:
            self._state = self._capture()
            self._restore(caller)

    def state_dict(self) -> State:
        """Tensors, numbers and tuples only, so that it loads with `weights_only=True`."""
        return self._state

    def load_state_dict(self, state: State) -> None:
        """Go on from `state`, which is tried first: it raises if it is none."""
        caller = self._capture()
        try:
            self._restore(state)
        finally:
            self._restore(caller)
        self._state = state

    def _capture(self) -> State:
        name, keys, *rest = np.random.get_state(legacy=True)
        assert name == "MT19937"
        state = {
            "torch": torch.get_rng_state(),
            "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
            "python": random.getstate(),
        }
        if self._device.type == "cuda":
            state["device"] = torch.cuda.get_rng_state(self._device)
        elif self._device.type == "mps":
            state["device"] = torch.mps.get_rng_state()
        return state

    def _restore(self, state: State) -> None:
        torch.set_rng_state(state["torch"])
        keys, *rest = state["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
        random.setstate(state["python"])
        if "device" in state and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["device"], self._device)
        elif "device" in state and self._device.type == "mps":
            torch.mps.set_rng_state(state["device"])
