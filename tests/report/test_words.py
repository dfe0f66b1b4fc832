from __future__ import annotations

import math
from pathlib import Path

import pytest

from bnkit.report._words import is_quantity, number, printable, setting, shortened


def test_printable_drops_what_could_upset_a_file_or_terminal() -> None:
    assert printable("β = 0.9, naïve") == "β = 0.9, naïve"
    assert printable("two\nlines\tand\x00\x1b[31m\udcff") == "two lines and\ufffd\ufffd[31m\ufffd"


def test_shortened() -> None:
    assert shortened("0.001", 5) == "0.001"
    assert shortened("0.0001", 5) == "0.00…"


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        (0.97314, True, "97.31%"),
        (1.0, True, "100%"),
        (0.97314, False, "0.9731"),
        (50_000, False, "50,000"),
        (12.5, False, "12.5"),
        (math.nan, True, "–"),
        (math.inf, False, "–"),
    ],
)
def test_number(value: float, percent: bool, text: str) -> None:
    assert number(value, percent) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (False, "no"),
        (0.1, "0.1"),
        ([100, 100], "100, 100"),
        ((), "–"),
        ({"lr": 0.5, "nesterov": False}, "lr: 0.5, nesterov: no"),
        (Path("runs/a"), "runs/a"),
    ],
)
def test_setting(value: object, text: str) -> None:
    assert setting(value) == text


@pytest.mark.parametrize("text", ["97.3%", "1,200 ± 30", "4.1×", "−0.5", "–", "", "never", "> 50,000", "NaN"])
def test_quantities(text: str) -> None:
    assert is_quantity(text)


@pytest.mark.parametrize("text", ["with BN", "sgd", "not measured"])
def test_words_are_no_quantities(text: str) -> None:
    assert not is_quantity(text)
