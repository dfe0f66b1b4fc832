"""Colours for light and dark backgrounds that stay apart for colour-blind readers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """The colours of one background; `curves[i]` is palette colour i, `ramp` runs from a heat map's low to its high."""

    background: str
    ink: str
    faint: str
    grid: str
    failed: str
    curves: tuple[str, ...]
    ramp: tuple[str, ...]

    def curve_color(self, color: int | str | None, position: int) -> str:
        """The colour of a curve that asks for `color` and stands at `position` in its plot."""
        if isinstance(color, str):
            return color
        return self.curves[(position if color is None else color) % len(self.curves)]


# After Okabe and Ito (2008), darkened or lightened until each has a contrast of 3:1 or more with its background.
LIGHT = Theme(
    background="#ffffff",
    ink="#1b2028",
    faint="#59616e",
    grid="#e3e6ea",
    failed="#eceef1",
    curves=("#0072b2", "#d55e00", "#1fa66a", "#963465", "#5c3e00", "#20231e"),
    ramp=("#f3f7fb", "#c9dff0", "#86b9dd", "#3f87bd", "#14568f", "#0a3058"),
)
DARK = Theme(
    background="#171b21",
    ink="#e8ebef",
    faint="#a3acb8",
    grid="#2e353e",
    failed="#252b33",
    curves=("#56b4f0", "#ff9a52", "#49ddaa", "#d48cb7", "#fef38d", "#ccdde8"),
    ramp=("#1d2a38", "#22476b", "#2c6da3", "#4a97d2", "#7fbae8", "#b5daf7"),
)
