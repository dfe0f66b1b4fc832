from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from report.samples import accuracy_figure, activations_figure, grid_figure

from bnkit._checks import UserError
from bnkit.report import Curve, LinePlot, Panels, save_svg
from bnkit.report._palette import DARK, LIGHT
from bnkit.report._render import render_panels, render_plot

_SVG = "{http://www.w3.org/2000/svg}"


def _comments(svg: str) -> set[str]:
    """Matplotlib notes each text it draws as outlines in a comment."""
    return {match.strip() for match in re.findall(r"<!--(.*?)-->", svg, re.DOTALL)}


@pytest.mark.parametrize("panels", [accuracy_figure(), activations_figure(), grid_figure(), Panels("none", "None", [])])
def test_a_figure_is_one_wide_valid_file_on_white(panels: Panels, tmp_path: Path) -> None:
    path = tmp_path / "figures" / f"{panels.name}.svg"
    save_svg(panels, path)
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{_SVG}svg"
    assert root.findtext(f"{_SVG}title") == panels.title
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert width == 350 * max(len(panels.plots), 1)
    assert 265 <= height <= 400
    background = root.find(f"{_SVG}g/{_SVG}g/{_SVG}path")
    assert background is not None
    assert "fill: #ffffff" in background.attrib["style"]


def test_a_figure_holds_its_words_and_nothing_from_elsewhere() -> None:
    svg = render_panels(activations_figure())
    words = {"Without BN", "With BN", "training step", "85%", "50%", "15%", "50,000", "drift in standard deviations"}
    assert words <= _comments(svg)
    assert any(comment.startswith("How far the median moved") for comment in _comments(svg))
    assert "<text" not in svg
    assert not re.search(r'(href|src)="(?!#)', svg)
    assert {"best", "run failed", "percent", "79.3"} <= _comments(render_panels(grid_figure()))


def test_a_page_s_image_leaves_title_and_note_to_the_page() -> None:
    (plot,) = accuracy_figure().plots
    words = _comments(render_plot(plot, LIGHT))
    assert "training step" in words
    assert not {plot.title, plot.note} & words


def test_light_and_dark_differ_in_color_only() -> None:
    (plot,) = accuracy_figure().plots
    light, dark = render_plot(plot, LIGHT), render_plot(plot, DARK)
    assert LIGHT.curves[1] in light
    assert LIGHT.curves[1] not in dark
    assert DARK.curves[1] in dark
    color_or_name = re.compile(r"#[0-9a-f]{6}\b|\bm[0-9a-f]{10}\b")  # a marker is named by a hash of its style
    assert color_or_name.sub("", light) == color_or_name.sub("", dark)


def test_the_same_figure_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    save_svg(grid_figure(), tmp_path / "here.svg")
    code = "import sys; from report.samples import grid_figure; from bnkit.report import save_svg\n"
    code += "save_svg(grid_figure(), sys.argv[1])"
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": paths, "SOURCE_DATE_EPOCH": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there.svg")], check=True, env=environment)
    assert (tmp_path / "here.svg").read_bytes() == (tmp_path / "there.svg").read_bytes()


def test_the_user_s_matplotlib_settings_neither_show_nor_change() -> None:
    expected = render_panels(accuracy_figure())
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "text.usetex": True}):
        assert render_panels(accuracy_figure()) == expected
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_a_curve_of_many_points_stays_small() -> None:
    x = np.arange(50_000.0)
    y = np.random.default_rng(0).normal(size=len(x))
    svg = render_plot(LinePlot("t", "x", "y", [Curve("a", x, y, low=y - 1, high=y + 1)]), LIGHT)
    assert len(svg) < 120_000


@pytest.mark.filterwarnings("error")
def test_hostile_names_and_broken_numbers_give_valid_xml(tmp_path: Path) -> None:
    name = "<script>alert(1)</script> $x_ & \x00 --> \udcff"
    curves = [Curve(name, [0, 1, 2, 3], [1, math.nan, math.inf, -math.inf]), Curve("b" * 200, [], [])]
    plots = [LinePlot(name, name, name, curves, note=name, xlog=log, ylog=log) for log in (False, True)]
    save_svg(Panels("hostile", name, plots), tmp_path / "hostile.svg")
    root = ElementTree.parse(tmp_path / "hostile.svg").getroot()
    assert not list(root.iter(f"{_SVG}script"))
    assert root.findtext(f"{_SVG}title") == "<script>alert(1)</script> $x_ & \ufffd --> \ufffd"


def test_a_folder_that_cannot_be_made_is_the_user_s_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"can't write .*a\.svg: .*; choose another folder"):
        save_svg(accuracy_figure(), tmp_path / "file" / "a.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_drawing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    path.write_text("old")
    with pytest.raises(ValueError, match="no colour"):
        save_svg(Panels("a", "a", [LinePlot("t", "x", "y", [Curve("a", [0], [0], color="no colour")])]), path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.svg"]
