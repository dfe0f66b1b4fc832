"""How a long measurement tells how far it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Progress = Callable[[int, int | None], None]
"""Called with the number of batches done, and of all there are to do, None where that is not known."""


@contextlib.contextmanager
def shown(progress: bool | Progress, total: int | None, passes: int) -> Iterator[Callable[[], None]]:
    """What to call after each batch; `progress` is True for a bar in the terminal, or a function."""
    total = None if total is None else total * passes
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(_bar(total)) if progress is True else progress or (lambda done, total: None)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            tell(done, total)

        yield step


@contextlib.contextmanager
def _bar(total: int | None) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Measuring statistics", total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
