"""What a report is made of: plain values, before any drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

Values: TypeAlias = "Sequence[float] | NDArray[Any]"


@dataclass(frozen=True)
class Curve:
    """One line of a plot, with an optional band between `low` and `high`.

    A value that is not finite leaves a gap. No points at all is fine: the legend then says so.

    Args:
        label: what the legend calls it.
        x, y: the points, of equal length.
        low, high: the band's edges at the same `x`; give both or neither.
        color: an index into the palette (the same index is the same colour in every figure), or a CSS hex colour;
            by default the curve's position in its plot.
        dashed: draw the line dashed.
    """

    label: str
    x: Values
    y: Values
    low: Values | None = None
    high: Values | None = None
    color: int | str | None = None
    dashed: bool = False

    def __post_init__(self) -> None:
        assert len(self.x) == len(self.y), f"{self.label}: {len(self.x)} x for {len(self.y)} y"
        assert (self.low is None) == (self.high is None), f"{self.label}: a band needs low and high"
        for edge in (self.low, self.high):
            assert edge is None or len(edge) == len(self.x), f"{self.label}: a band's edge is not as long as x"


@dataclass(frozen=True)
class LinePlot:
    """Curves on one pair of axes.

    Args:
        note: a sentence shown under the plot.
        xlog, ylog: logarithmic axes; values that are not positive are left out.
        ylim: lowest and highest y shown; by default what the curves need.
        percent: y values are fractions, shown as percentages (0.97 reads 97%).
    """

    title: str
    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    note: str = ""
    xlog: bool = False
    ylog: bool = False
    ylim: tuple[float, float] | None = None
    percent: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A grid of runs, one coloured cell each.

    Args:
        xticks, yticks: names of the columns, left to right, and of the rows, bottom to top.
        values: `values[row][column]`; None or a value that is not finite is a failed run, drawn hatched and explained.
        low, high: the values at the two ends of the colour scale.
        percent: values are fractions, shown as percentages (0.97 reads 97).
        best: `(row, column)` of the cell to outline.
        note: a sentence shown under the map.
    """

    title: str
    xlabel: str
    ylabel: str
    xticks: Sequence[str]
    yticks: Sequence[str]
    values: Sequence[Sequence[float | None]]
    low: float
    high: float
    percent: bool = True
    best: tuple[int, int] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        assert len(self.values) == len(self.yticks), f"{self.title}: {len(self.values)} rows, {len(self.yticks)} names"
        for row in self.values:
            assert len(row) == len(self.xticks), f"{self.title}: {len(row)} columns, {len(self.xticks)} names"


Plot: TypeAlias = LinePlot | HeatMap


@dataclass(frozen=True)
class Panels:
    """One figure of one or more plots side by side; `name` is its file's name without `.svg`.

    Args:
        caption: what to see in it, shown beside or under the figure.
        alt: what the figure shows, for readers who can't see it; each plot's own description is derived from its data.
    """

    name: str
    title: str
    plots: Sequence[Plot]
    caption: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of ready-made text; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.columns), f"{self.title}: {len(row)} cells for {len(self.columns)} columns"


@dataclass(frozen=True)
class Page:
    """A whole report.

    Args:
        title: the page's heading.
        claim: the statement that was put to the test.
        summary: the answer, in plain sentences; the first stands out.
        configuration, environment: what was run, and on what.
        partial: why the run is incomplete, shown as a prominent notice; None for a complete run.
        command: what repeats this.
    """

    title: str
    claim: str
    summary: Sequence[str]
    tables: Sequence[Table] = ()
    figures: Sequence[Panels] = ()
    configuration: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    partial: str | None = None
    command: str = ""
