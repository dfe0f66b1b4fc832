from __future__ import annotations

import base64
import html
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report.browser import PHONE, check_page, open_browser, open_page
from report.samples import accuracy_figure, sample_page

from bnkit._checks import UserError
from bnkit.report import Curve, HeatMap, LinePlot, Page, Panels, Table, save_page
from bnkit.report._page import render_page

HOSTILE = "</title></style><script>document.title = 'taken'</script>\"'><img src=x onerror=alert(1)>"


def _small_page(**changes: object) -> Page:
    page = Page("Title", "The claim", ["The answer."], [Table("T", ["a", "b"], [["x", "1"]])])
    return replace(page, **changes)  # pyright: ignore


@pytest.fixture(scope="module")
def sample_html() -> str:
    return render_page(sample_page())


def test_the_sample_page_passes_a_browser_s_check(tmp_path: Path) -> None:
    save_page(sample_page(partial="Stopped after 21,300 of 50,000 steps."), tmp_path / "report.html")
    check_page(tmp_path / "report.html")


def test_wide_tables_scroll_by_themselves_on_a_phone(sample_html: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(sample_html, encoding="utf-8")
    with open_browser() as chrome:
        open_page(chrome, tmp_path / "report.html", PHONE, "light")
        measure = "const s = document.querySelector('.scroll'); return [s.scrollWidth, s.clientWidth]"
        content, container = chrome.execute_script(measure)
        assert content > container
        assert container <= PHONE
        widths = chrome.execute_script("return [...document.images].map(i => i.getBoundingClientRect().width)")
        assert all(320 <= width <= PHONE for width in widths)


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    curve, cell = Curve(HOSTILE, [0, 1], [0, 1]), HeatMap(HOSTILE, HOSTILE, HOSTILE, [HOSTILE], ["y"], [[1.0]], 0, 1)
    line = LinePlot(HOSTILE, HOSTILE, HOSTILE, [curve], note=HOSTILE)
    page = Page(
        HOSTILE,
        HOSTILE,
        [HOSTILE],
        [Table(HOSTILE, [HOSTILE, "b"], [[HOSTILE, HOSTILE]], note=HOSTILE)],
        [Panels(HOSTILE, HOSTILE, [line, cell], caption=HOSTILE, alt=HOSTILE)],
        {HOSTILE: HOSTILE},
        {"folder": "\udcff\x00"},
        HOSTILE,
        HOSTILE,
    )
    path = tmp_path / "report.html"
    save_page(page, path)
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=x" not in text
    assert html.escape(HOSTILE).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text
    check_page(path)
    with open_browser() as chrome:
        open_page(chrome, path, PHONE, "light")
        assert chrome.title.startswith("</title>")


def test_the_page_is_one_file_of_modest_size(sample_html: str) -> None:
    assert len(sample_html) < 1_500_000
    assert not re.search(r"https?://", sample_html)
    assert not re.search(r"<script|<link(?! rel=\"icon\" href=\"data:,\")|@import|@font-face|url\(", sample_html)
    for source in re.findall(r'(?:src|srcset|href)="([^"]*)"', sample_html):
        assert source.startswith("data:")


def test_every_plot_is_embedded_for_light_and_dark(sample_html: str) -> None:
    page = sample_page()
    images = re.findall(r'"data:image/svg\+xml;base64,([^"]+)"', sample_html)
    assert len(images) == 2 * sum(len(figure.plots) for figure in page.figures)
    titles = [ElementTree.fromstring(base64.b64decode(image))[0].text for image in images]
    assert titles == [plot.title for figure in page.figures for plot in figure.plots for _ in range(2)]


def test_the_answer_comes_first(sample_html: str) -> None:
    page = sample_page()
    order = [page.title, page.claim, page.summary[0], page.tables[0].title, page.figures[0].title, page.command]
    body = sample_html[sample_html.index("<body>") :]
    places = [body.index(html.escape(text, quote=False).replace("'", "&#39;")) for text in order]
    assert places == sorted(places)
    assert body.index("Configuration") < body.index("Environment")


def test_the_page_is_marked_up_for_readers_of_every_kind(sample_html: str) -> None:
    assert sample_html.startswith('<!doctype html>\n<html lang="en">')
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in sample_html
    assert re.findall(r"<h(\d)", sample_html)[:3] == ["1", "2", "2"]
    assert sample_html.count("<h1") == 1
    assert f'aria-label="{sample_page().figures[0].alt}"' in sample_html
    assert "At the end: without BN" in sample_html


def test_a_table_holds_its_cells_and_lines_up_quantities() -> None:
    rows = [["a", "1,200", "sgd"], ["b", "never", "adam"]]
    table = Table("Speed", ["net", "steps", "optimizer"], rows, note="A note.")
    text = re.sub(r"\n", "", render_page(_small_page(tables=[table])))
    assert '<th scope="col">net</th><th scope="col" class="quantity">steps</th><th scope="col">optimizer</th>' in text
    assert '<th scope="row">a</th><td class="quantity">1,200</td><td>sgd</td>' in text
    assert '<th scope="row">b</th><td class="quantity">never</td><td>adam</td>' in text
    assert '<p class="note">A note.</p>' in text


def test_settings_are_listed() -> None:
    configuration = {"hidden": [100, 100], "compile": True, "gpu": None}
    text = re.sub(r"\n", "", render_page(_small_page(configuration=configuration)))
    assert "<dt>hidden</dt><dd>100, 100</dd>" in text
    assert "<dt>compile</dt><dd>yes</dd>" in text
    assert "<dt>gpu</dt><dd>–</dd>" in text
    assert "Environment" not in text


def test_only_a_partial_run_says_so() -> None:
    notice = '<p class="partial" role="note"><strong>Partial run.</strong> Stopped at step 9.</p>'
    assert notice in render_page(_small_page(partial="Stopped at step 9."))
    assert "Partial run" not in render_page(_small_page(partial=None))


def test_empty_parts_are_left_out() -> None:
    text = render_page(Page("Title", "", [], figures=[Panels("none", "No plots", [])]))
    body = text[text.index("<body>") :]
    for absent in ("The claim", "<section", "<details", "No plots"):
        assert absent not in body


def test_a_folder_that_cannot_be_made_is_the_user_s_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"can't write .*report\.html: .*; choose another folder"):
        save_page(_small_page(), tmp_path / "file" / "report.html")


def test_a_failed_page_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    bad = replace(accuracy_figure(), plots=[LinePlot("t", "x", "y", [Curve("a", [0], [0], color="no colour")])])
    with pytest.raises(ValueError, match="no colour"):
        save_page(_small_page(figures=[bad]), path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, bnkit.report; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
