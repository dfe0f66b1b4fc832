from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from bnkit.report._palette import DARK, LIGHT, Theme

# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
_VISION = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def _linear(color: str) -> np.ndarray:
    srgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _contrast(a: str, b: str) -> float:
    dark, light = sorted(float(_linear(c) @ _TO_XYZ[1]) for c in (a, b))
    return (light + 0.05) / (dark + 0.05)


def _lab(linear: np.ndarray) -> np.ndarray:
    t = (_TO_XYZ @ np.clip(linear, 0, 1)) / [0.9505, 1, 1.089]
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_curves_and_text_stand_out_from_the_background(theme: Theme) -> None:
    assert min(_contrast(color, theme.background) for color in theme.curves) >= 3
    assert min(_contrast(color, theme.background) for color in (theme.ink, theme.faint)) >= 4.5


@pytest.mark.parametrize("vision", _VISION)
@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_curves_stay_apart_for_colour_blind_readers(theme: Theme, vision: str) -> None:
    seen = [_lab(np.asarray(_VISION[vision]) @ _linear(color)) for color in theme.curves]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) >= 14


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_the_ramp_runs_from_the_background_steadily_away(theme: Theme) -> None:
    steps = [_contrast(color, theme.background) for color in theme.ramp]
    assert steps == sorted(steps)


def test_a_curve_color_is_an_index_a_color_or_its_position() -> None:
    assert LIGHT.curve_color(1, position=0) == LIGHT.curves[1]
    assert LIGHT.curve_color(None, position=2) == LIGHT.curves[2]
    assert LIGHT.curve_color(7, position=0) == LIGHT.curves[1]
    assert LIGHT.curve_color("#123456", position=0) == "#123456"
