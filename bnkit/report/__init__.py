"""Findings and curves as terminal text, SVG and one self-contained HTML page."""

from ._live import LiveProgress
from ._model import Curve, HeatMap, LinePlot, Page, Panels, Plot, Table
from ._page import save_page
from ._svg import save_svg
from ._terminal import print_page, print_table

__all__ = [
    "Curve",
    "HeatMap",
    "LinePlot",
    "LiveProgress",
    "Page",
    "Panels",
    "Plot",
    "Table",
    "print_page",
    "print_table",
    "save_page",
    "save_svg",
]
