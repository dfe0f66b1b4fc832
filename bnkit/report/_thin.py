"""Fewer points for the same picture."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_BINS = 250


def thin(position: NDArray[np.float64], *heights: NDArray[np.float64], bins: int = _BINS) -> NDArray[np.intp]:
    """Indices of the points that draw the same picture when the x axis is only `bins` strokes wide.

    Consecutive points that fall in one bin are reduced to the lowest and highest of each of `heights`, and to one of
    the points that are not finite, so that peaks and gaps survive. The first and the last point always stay.

    Args:
        position: where each point stands along the axis, after any logarithm, shape (n,).
        heights: what is drawn there (a line, the edges of a band), each of shape (n,).
    """
    if len(position) <= 2 * bins:
        return np.arange(len(position))
    bounds = _run_starts(_bin_of(position, bins))
    kept = {0, len(position) - 1}
    for start, end in pairwise(bounds):
        for height in heights:
            kept.update(start + offset for offset in _extremes(height[start:end]))
    return np.array(sorted(kept), dtype=np.intp)


def _bin_of(position: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    finite = np.isfinite(position)
    if not finite.any():
        return np.full(len(position), -1)
    low, high = position[finite].min(), position[finite].max()
    share = (np.where(finite, position, low) - low) / ((high - low) or 1.0)
    return np.where(finite, np.minimum((share * bins).astype(np.int64), bins - 1), -1)


def _run_starts(bin_of: NDArray[np.int64]) -> list[int]:
    changes = np.flatnonzero(np.diff(bin_of)) + 1
    return [0, *changes.tolist(), len(bin_of)]


def _extremes(height: NDArray[np.float64]) -> set[int]:
    finite = np.isfinite(height)
    kept = set() if finite.all() else {int(np.argmin(finite))}
    if finite.any():
        kept |= {int(np.argmin(np.where(finite, height, np.inf))), int(np.argmax(np.where(finite, height, -np.inf)))}
    return kept
