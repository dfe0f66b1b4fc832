from __future__ import annotations

import io

from report.samples import sample_page, speed_table
from rich.console import Console

from bnkit.report import Page, Table, print_page, print_table


def _console(width: int) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, color_system=None), stream


def _lines(table: Table, width: int) -> list[str]:
    console, stream = _console(width)
    print_table(table, console)
    return [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]


def test_a_table_lines_up_words_left_and_quantities_right() -> None:
    rows = [["with BN", "900", "sgd"], ["b", "12,000", "adam"]]
    table = Table("Speed", ["net", "steps", "optimizer"], rows, note="N.")
    assert _lines(table, 80) == [
        "Speed",
        " net        steps   optimizer",
        " ────────────────────────────",
        " with BN      900   sgd",
        " b         12,000   adam",
        "N.",
    ]


def test_a_table_too_wide_is_turned() -> None:
    wide, narrow = _lines(speed_table(), 250), _lines(speed_table(), 80)
    assert wide[1].split()[:3] == ["net", "best", "accuracy"]
    assert [line.split()[0] for line in wide[3:6]] == ["without", "with", "speed-up"]
    assert narrow[1].split() == ["net", "without", "BN", "with", "BN", "speed-up"]
    assert ["steps", "to", "95%", "14,200", "2,100", "6.8×"] in [line.split() for line in narrow]
    assert max(map(len, narrow)) <= 80


def test_a_table_with_many_rows_is_not_turned() -> None:
    table = Table("Speed", ["a rather long name of a column", "another such name"], [["net", "1"]] * 20)
    assert sum(line.split() == ["net", "1"] for line in _lines(table, 40)) == 20


def test_markup_and_escape_codes_in_names_are_only_text() -> None:
    lines = _lines(Table("[bold]t[/bold]", ["a"], [["[red]x[/red] \x1b[31m"]]), 80)
    assert lines[0] == "[bold]t[/bold]"
    assert lines[3].strip() == "[red]x[/red] \ufffd[31m"


def test_a_page_prints_its_words_in_order() -> None:
    console, stream = _console(200)
    page = sample_page(partial="Stopped at step 9.")
    print_page(page, console)
    text = stream.getvalue()
    order = [page.title, page.claim, "Partial run", "Stopped at step 9.", page.tables[0].title, *page.summary]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_a_complete_run_has_no_notice() -> None:
    console, stream = _console(80)
    print_page(Page("Title", "", ["Answer."]), console)
    assert stream.getvalue().split() == ["Title", "Answer."]
