"""Numbers and names as a reader sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping


def printable(text: str) -> str:
    """`text` on one line and without control characters, so that no name can upset a file or a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shortened(text: str, length: int) -> str:
    """`text` as far as `length` characters show it, ending in an ellipsis where it is longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def number(value: float, percent: bool = False) -> str:
    """`value` to a few digits, with thousands separated: `0.9731` → `97.31%` or `0.9731`, `50000` → `50,000`."""
    if not math.isfinite(value):
        return "–"
    if percent:
        return f"{100 * value:.4g}%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def setting(value: object) -> str:
    """The value of a configuration or environment entry as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {setting(entry)}" for key, entry in value.items()) or "–"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(setting(entry) for entry in value) or "–"
    return str(value)


def is_quantity(text: str) -> bool:
    """Whether a table's cell reads as a quantity (`97.3%`, `1,200 ± 30`, `4.1×`) or stands for a missing one."""
    text = text.strip()
    return not text or text[0] in "0123456789–-−+±.<>≈~×" or text.lower() in {"never", "nan", "inf"}
