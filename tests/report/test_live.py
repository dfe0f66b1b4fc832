"""The live display, on a console that writes into memory."""

import io

import pytest
from rich.console import Console

from bnkit.report import LiveProgress


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def test_a_terminal_shows_steps_time_left_and_accuracies():
    screen = console(terminal=True)
    progress = LiveProgress(screen)
    with progress.shown():
        progress.phase("training", 400)
        progress.update(100, {"without BN": 0.1135, "with BN": 0.9})
        with screen.capture() as captured:
            screen.print(progress._render())
    text = captured.get()
    for part in ("training", "100/400", "left", "without BN", "11.35%", "with BN", "90.00%"):
        assert part in text


def test_a_new_phase_completes_the_last_and_forgets_its_accuracies():
    screen = console(terminal=True)
    progress = LiveProgress(screen)
    with progress.shown():
        progress.phase("grid", 10)
        progress.update(4, {"with BN": 0.5})
        progress.phase("training", 20)
        with screen.capture() as captured:
            screen.print(progress._render())
    text = captured.get()
    assert "10/10" in text
    assert "0/20" in text
    assert "with BN" not in text


def test_a_log_gets_a_line_a_phase():
    screen = console(terminal=False)
    progress = LiveProgress(screen)
    with progress.shown():
        progress.phase("training", 50_000)
        progress.update(10, {"with BN": 0.5})
    assert screen.file.getvalue().strip().splitlines() == ["training: 50,000 steps"]


def test_the_display_goes_away_when_the_work_fails():
    screen = console(terminal=True)
    progress = LiveProgress(screen)

    def fail():
        with progress.shown():
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert not progress._live.is_started
