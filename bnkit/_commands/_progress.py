"""The bar of a long loop."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress


def progress(as_json: bool) -> Progress:
    """A bar on standard error that disappears at the end; none with `--json`, nor where there is no terminal."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=as_json or not console.is_terminal)
