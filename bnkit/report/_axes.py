"""What the axes of all plots share: ticks in plain numbers, and what to say without data."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator

from ._palette import Theme
from ._words import number, printable

_XLABEL_CHARACTERS = 44
_YLABEL_CHARACTERS = 32
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class PlainFormatter(Formatter):
    """As many decimals as tell the ticks' values, thousands separated, fractions as percentages on demand."""

    def __init__(self, percent: bool = False) -> None:
        self._percent = percent

    def __call__(self, x: float, pos: int | None = None) -> str:
        return number(x, self._percent)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        scale, unit = (100.0, "%") if self._percent else (1.0, "")
        scaled = [scale * value for value in values]
        step = min((b - a for a, b in pairwise(scaled) if b > a), default=0.0)
        if step < 1e-5 or max(map(abs, scaled)) >= 1e8:
            return [f"{value:g}{unit}" for value in scaled]
        decimals = next(d for d in range(8) if all(abs(round(v, d) - v) < step / 100 for v in scaled))
        return [f"{value:,.{decimals}f}{unit}".replace("-", "−") for value in scaled]


class LogFormatter(PlainFormatter):
    """Plain numbers where they are short, powers of ten beyond."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        exponent = math.floor(math.log10(x) + 1e-9)
        if self._percent or -4 <= exponent <= 5:
            return super().__call__(x, pos)
        power = "10" + str(exponent).translate(_SUPERSCRIPTS)
        mantissa = f"{x / 10.0**exponent:.4g}"
        return power if mantissa == "1" else f"{mantissa}·{power}"

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        return [self(value) for value in values]


def set_ticks(axis: Axis, percent: bool = False) -> None:
    """A handful of ticks at round values; on a logarithmic axis powers of ten, or 1, 2, 5 where it is short."""
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        short = high < 100 * low
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,), numticks=7))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(LogFormatter(percent))
    else:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(PlainFormatter(percent))


def set_labels(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Name both axes, breaking names that are longer than the axes."""
    axes.set_xlabel(textwrap.fill(printable(xlabel), _XLABEL_CHARACTERS))
    axes.set_ylabel(textwrap.fill(printable(ylabel), _YLABEL_CHARACTERS))


def say_no_data(axes: Axes, theme: Theme) -> None:
    """Clear the ticks and say why the axes are empty."""
    axes.set(xticks=[], yticks=[])
    axes.minorticks_off()
    axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=theme.faint)
