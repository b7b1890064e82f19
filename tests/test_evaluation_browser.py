"""The evaluation's page in a real headless browser: it needs nothing from outside, and a click shows every pixel."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lora_dae.evaluation.report.examples import PictureGrid, PictureRow
from lora_dae.evaluation.report.page import Page, write_page
from lora_dae.evaluation.report.table import MetricValue, Protocol, ResultsTable

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: the page was NOT tested")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page was NOT tested")

# Screenshots land here when the variable is set, to be looked at.
SCREENSHOTS = os.environ.get("LORA_DAE_SCREENSHOTS")


def _page() -> Page:
    protocol = Protocol(9, 9, "test", 64, "ddim", 4, 2.0, None, [1], "effnet", 20, warnings=["few images"])
    metrics = {f"metric_{k}": MetricValue(k / 3, k / 4, k / 2, "lower") for k in range(1, 9)}
    table = ResultsTable({"one": metrics, "two": metrics}, protocol, {"real, blurred": metrics})
    pictures = [np.random.default_rng(k).integers(0, 256, (64, 64, 3), dtype=np.uint8) for k in range(4)]
    rows = [PictureRow("a caption", list(pictures)), PictureRow("another", [None, *pictures[1:]])]
    return Page("A page", table, "python evaluate.py run=x", grids=[PictureGrid("Grid", list("abcd"), rows)])


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (375, 667)])
def test_the_page_works_offline_and_a_click_shows_whole_pixels(tmp_path: Path, width: int, height: int) -> None:
    path = write_page(tmp_path, _page())
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": width, "height": height}, offline=True).new_page()
        trouble: list[str] = []
        page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: trouble.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else trouble.append(r.url))
        page.goto(path.as_uri())
        if SCREENSHOTS:
            page.screenshot(path=f"{SCREENSHOTS}/report_{width}.png", full_page=True)
        # Wide tables scroll in their own box, the page never sideways.
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.locator("table.grid img").count() == 7
        page.locator("table.grid button").nth(1).click()
        shown = page.locator("dialog img")
        size = shown.bounding_box()["width"]
        assert size % 64 == 0 and size >= 64 and page.evaluate("document.querySelector('dialog').open")
        assert shown.get_attribute("src") == page.locator("table.grid img").nth(1).get_attribute("src")
        page.locator("dialog").click()
        assert not page.evaluate("document.querySelector('dialog').open")
        assert trouble == []
        browser.close()
