"""Tables and pages in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from ._model import Page, Table
from ._words import is_quantity, printable

_UNBOUNDED = 10_000


def print_page(page: Page, console: Console) -> None:
    """Print a page's heading, notice, tables and summary; figures and settings are for the files."""
    console.print(_text(page.title, "bold"))
    if page.claim:
        console.print(_text(page.claim, "dim"))
    if page.partial is not None:
        console.print(Panel(_text(page.partial), title="Partial run", title_align="left", border_style="yellow"))
    for table in page.tables:
        console.print()
        print_table(table, console)
    console.print()
    for position, sentence in enumerate(page.summary):
        console.print(_text(sentence, "bold" if position == 0 else ""))


def print_table(table: Table, console: Console) -> None:
    """Print a table; one too wide for the console is turned, its columns becoming rows, if that makes it narrower."""
    grid = _grid(table.title, table.columns, table.rows)
    if _width(grid, console) > console.width:
        lines = list(zip(table.columns, *table.rows, strict=True))
        turned = _grid(table.title, lines[0], lines[1:])
        grid = min(grid, turned, key=lambda one: _width(one, console))
    console.print(grid)
    if table.note:
        console.print(_text(table.note, "dim"))


def _grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
    grid = RichTable(title=_text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        right = position > 0 and all(is_quantity(row[position]) for row in rows)
        grid.add_column(_text(column), justify="right" if right else "left")
    for row in rows:
        grid.add_row(*(_text(cell) for cell in row))
    return grid


def _width(grid: RichTable, console: Console) -> int:
    return grid.__rich_measure__(console, console.options.update(max_width=_UNBOUNDED)).maximum


def _text(text: str, style: str = "") -> Text:
    """Plain text: rich would read `[name]` in a plain string as markup."""
    return Text(printable(text), style=style)
