"""What a long job is doing, live in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class LiveProgress:
    """A bar a phase with steps done and time left, and under them each network's current test accuracy.

    Where the console is no terminal, such as in a log, a line as each phase begins.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._accuracies: Mapping[str, float] = {}
        self._live = Live(console=console, get_renderable=self._render, transient=True, refresh_per_second=4)

    @contextlib.contextmanager
    def shown(self) -> Iterator[LiveProgress]:
        """Show it; it disappears at the end, whatever happens."""
        with self._live:
            yield self

    def phase(self, title: str, steps: int) -> None:
        """Begin a part of the work; the one before it is over."""
        for task in self._bars.tasks:
            self._bars.update(task.id, completed=task.total)
        self._bars.add_task(title, total=steps)
        if not self._console.is_terminal and not self._console.quiet:
            print(f"{title}: {steps:,} steps", file=self._console.file, flush=True)
        self._accuracies = {}

    def update(self, step: int, accuracies: Mapping[str, float]) -> None:
        """So many steps of the phase are done; the accuracies are the latest, by network."""
        self._bars.update(self._bars.task_ids[-1], completed=step)
        self._accuracies = accuracies

    def _render(self) -> Group:
        lines = [Text(f"  {name:<24} {value:7.2%}") for name, value in self._accuracies.items()]
        return Group(self._bars, *lines)
