"""How a long experiment tells what it is doing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Whoever shows progress implements this; an experiment never prints."""

    def phase(self, title: str, steps: int) -> None:
        """A new part of the work begins, of so many steps."""
        ...

    def update(self, step: int, accuracies: Mapping[str, float]) -> None:
        """So many steps of the phase are done; the accuracies are the latest measured, by network."""
        ...


class Silent:
    """Shows nothing."""

    def phase(self, title: str, steps: int) -> None:
        """Ignored."""

    def update(self, step: int, accuracies: Mapping[str, float]) -> None:
        """Ignored."""
