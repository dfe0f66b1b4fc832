"""A real browser's judgement of a page: `check_page(path)`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

DESKTOP, PHONE = 1280, 390
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_IMAGES = "return [...document.images].map(i => [i.complete, i.naturalWidth, i.currentSrc, i.alt])"
_OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium; skips the test, with the reason, where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
        try:
            chrome.get("about:blank")
            for log in ("browser", "performance"):
                chrome.get_log(log)  # what the browser's own start page left there
            yield chrome
        finally:
            chrome.quit()


def open_page(chrome: Any, path: Path, width: int, scheme: str) -> None:
    """Show the file at `path` in a window `width` pixels wide, for a reader who prefers `scheme` (light or dark)."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    preference = {"name": "prefers-color-scheme", "value": scheme}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
    chrome.get(path.resolve().as_uri())


def check_page(path: Path) -> None:
    """Assert that a report renders at desktop and phone width, in light and dark, all by itself.

    No console message, no sideways scrolling, every image decoded and described and different between light and dark,
    and no request for anything but the file itself.
    """
    page = path.resolve().as_uri()
    with open_browser() as chrome:
        images = {}
        for width in (DESKTOP, PHONE):
            for scheme in ("light", "dark"):
                where = f"{path.name} at {width} px, {scheme}"
                open_page(chrome, path, width, scheme)
                assert chrome.title, f"{where}: no title"
                assert chrome.execute_script(_OVERFLOW) <= 0, f"{where}: wider than the window"
                images[scheme] = _check_images(chrome, where)
        assert not set(images["light"]) & set(images["dark"]), f"{path.name}: an image is the same in light and dark"
        assert chrome.get_log("browser") == []
        assert {url for url in _requests(chrome) if not url.startswith("data:")} == {page}


def _check_images(chrome: Any, where: str) -> list[str]:
    images = chrome.execute_script(_IMAGES)
    for complete, width, _, alt in images:
        assert complete, f"{where}: an image did not load: {alt}"
        assert width > 0, f"{where}: an image did not decode: {alt}"
        assert alt, f"{where}: an image has no description"
    return [source for _, _, source, _ in images]


def _requests(chrome: Any) -> Iterator[str]:
    for entry in chrome.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]
