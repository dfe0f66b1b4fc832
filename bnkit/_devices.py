"""The device that a name means on this machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._checks import require, unknown


def chosen_device(name: str, kinds: Sequence[str] = ("cuda", "mps", "cpu")) -> torch.device:
    """The device called `name`; `"auto"` is the first of `kinds` that this machine has.

    Raises:
        UserError: `name` is not one of these, or this machine has no such device.
    """
    if name not in ("auto", *kinds):
        raise unknown("device", name, ("auto", *kinds))
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = next(kind for kind in kinds if present[kind]) if name == "auto" else name
    require(present[kind], f"this machine has no {kind} device: choose device='cpu'.")
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
