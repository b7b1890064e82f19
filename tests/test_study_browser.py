"""The rating page in a real headless browser: from the link to the thanks, by keys, by touch, in two languages."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studies import links, make_study, proxied, serving

from lora_dae.study.store import StudyStore

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: the rating page was NOT tested")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page was NOT tested")
pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'lora-dae[study]'")

# Screenshots land here when the variable is set, to be looked at.
SCREENSHOTS = os.environ.get("LORA_DAE_SCREENSHOTS")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("browser"), raters=5, pairs=4, opinions=2)


@pytest.fixture(scope="module")
def address(study: Path) -> Iterator[str]:
    with serving(study) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def _open(browser: Any, url: str, **options: Any) -> tuple[Any, list[str]]:
    """A page, and what it complained about or asked other hosts for."""
    page = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 800}, **options}).new_page()
    page.set_default_timeout(60_000)
    trouble: list[str] = []
    page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((url[:20], "data:")) else trouble.append(r.url))
    page.goto(url)
    return page, trouble


def _shot(page: Any, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png", full_page=True)


def _ready(page: Any, number: int) -> None:
    page.locator("#count", has_text=re.compile(rf"^{number} /")).wait_for()  # no JavaScript: the page forbids eval
    page.wait_for_selector(".answers button:enabled")


def _answers(study: Path, rater: int) -> list[str]:
    store = StudyStore(study)
    rows = store.rows("SELECT answer FROM votes JOIN trials USING (trial) WHERE rater=? ORDER BY number", (rater,))
    store.close()
    return [row[0] for row in rows]


def test_from_link_to_thanks_by_keyboard(browser: Any, address: str, study: Path) -> None:
    page, trouble = _open(browser, f"{address}/r/{links(study)[1]}")
    page.wait_for_selector("#agree")
    assert "Fashion pictures" in page.inner_text("main") and page.title() == "Fashion pictures"
    _shot(page, "consent_desktop")
    page.focus("#agree")
    page.keyboard.press("Enter")
    given = []
    _ready(page, 1)
    total = int(page.inner_text("#count").split("/")[1])
    for number in range(1, total + 1):
        _ready(page, number)
        opinion = page.locator(".answers button").count() == 5
        assert page.locator("img").count() == (1 if opinion else 3 if "reference" in page.inner_text("h1") else 2)
        _shot(page, f"trial{number}_desktop")
        key, answer = (
            ("4", "4") if opinion else [("ArrowLeft", "left"), ("ArrowDown", "tie"), ("3", "right")][number % 3]
        )
        page.keyboard.press(key)
        given.append(answer)
    page.wait_for_selector("#thanks")
    _shot(page, "thanks_desktop")
    assert _answers(study, 0) == given and len(given) == total
    assert trouble == []
    page.reload()
    page.wait_for_selector("#thanks")


def test_pictures_are_shown_pixel_by_pixel_and_zoom_changes_it(browser: Any, address: str, study: Path) -> None:
    page, trouble = _open(browser, f"{address}/r/{links(study)[2]}", device_scale_factor=1.5)
    page.click("#agree")
    _ready(page, 1)
    measure = """[...document.querySelectorAll('.picture img')]
        .map(i => i.getBoundingClientRect().width * 1.5 / i.naturalWidth)"""
    factors = page.evaluate(measure)
    assert all(abs(f - round(f)) < 1e-3 and f >= 1 for f in factors), factors
    image = page.locator(".picture img").first
    box = image.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#lens:not([hidden])")
    assert "picture" in page.evaluate("document.getElementById('lens').style.backgroundImage")
    _shot(page, "magnifier")
    page.mouse.move(2, 2)
    page.wait_for_selector("#lens", state="hidden")
    page.keyboard.press("z")
    assert page.inner_text("#zoom") == "Zoom: fit" and page.evaluate(measure) != factors
    assert trouble == []


def test_a_phone_in_chinese_by_touch(browser: Any, address: str, study: Path) -> None:
    phone = {"viewport": {"width": 375, "height": 667}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    page, trouble = _open(browser, f"{address}/r/{links(study)[3]}", locale="zh-CN", **phone)
    page.wait_for_selector("#agree")
    assert page.inner_text("#agree") == "我同意,开始" and page.get_attribute("html", "lang") == "zh-CN"
    _shot(page, "consent_phone")
    page.tap("#agree")
    for number in range(1, 5):
        _ready(page, number)
        _shot(page, f"trial{number}_phone")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        boxes = "[...document.querySelectorAll('{}')].map(b => b.getBoundingClientRect().{})"
        sizes = page.evaluate(boxes.format(".answers button", "height"))
        assert min(sizes) >= 44  # a finger's width
        pictures = page.evaluate(boxes.format(".picture img", "top"))
        assert max(pictures) - min(pictures) < 1  # side by side also here
        page.locator(".answers button").first.tap()
    _ready(page, 5)
    with page.expect_response(lambda answer: answer.url.endswith("/consent")):
        page.tap("#language")
    page.wait_for_selector("html[lang=en]")
    _ready(page, 5)
    assert page.inner_text("#language") == "中文" and len(_answers(study, 2)) == 4
    page.reload()
    _ready(page, 5)  # and in the language that was chosen, whatever the phone's own is
    assert page.inner_text("#language") == "中文" and page.get_attribute("html", "lang") == "en"
    assert page.title() == "Fashion pictures"
    assert trouble == []


def test_large_pictures_are_seen_whole(browser: Any, tmp_path: Path) -> None:
    """512 pixels a side are more than there is room for beside each other: nobody votes on a part of a picture."""
    study = make_study(tmp_path, prompts=2, side=512, raters=2, pairs=4, opinions=0)
    cut = """[...document.querySelectorAll('figure')].filter(f => f.scrollWidth > f.clientWidth
        || f.querySelector('img').getBoundingClientRect().right > document.documentElement.clientWidth).length"""
    smoothed = "[...document.querySelectorAll('.picture img')].map(i => getComputedStyle(i).imageRendering)"
    with serving(study) as (address, _):
        for rater, (width, height) in enumerate([(1280, 800), (375, 667)], start=1):
            size = {"width": width, "height": height}
            page, trouble = _open(browser, f"{address}/r/{links(study)[rater]}", viewport=size)
            page.click("#agree")
            _ready(page, 1)
            total, truths = int(page.inner_text("#count").split("/")[1]), 0
            for number in range(1, total + 1):
                _ready(page, number)
                truths += "reference" in page.inner_text("h1")
                assert page.evaluate(cut) == 0, (size, number)
                assert set(page.evaluate(smoothed)) == {"auto"}  # a pixel left out here and there would be a lie
                assert page.inner_text("#zoom") == "Zoom: fit"
                _shot(page, f"large{number}_{width}")
                page.locator(".answers button").first.click()
            page.wait_for_selector("#thanks")
            assert truths == 2 and trouble == []


def test_the_arrow_that_scrolls_is_no_vote(browser: Any, tmp_path: Path) -> None:
    study = make_study(tmp_path, raters=1, pairs=4, opinions=0)
    with serving(study) as (address, _):
        low = {"width": 1280, "height": 400}  # pixels: the buttons are below the window's end
        page, _ = _open(browser, f"{address}/r/{links(study)[1]}", viewport=low)
        page.click("#agree")
        _ready(page, 1)
        assert page.evaluate("document.documentElement.scrollHeight > window.innerHeight")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("1")
        _ready(page, 2)
        page.keyboard.press("2")  # as the hint says
        _ready(page, 3)
    assert _answers(study, 0) == ["left", "tie"]


def test_a_study_under_a_path_is_rated(browser: Any, address: str, study: Path) -> None:
    with proxied(address, "/rate") as public:
        page, trouble = _open(browser, f"{public}/r/{links(study)[5]}")
        page.click("#agree")
        _ready(page, 1)
        assert page.evaluate("[...document.querySelectorAll('main img')].every(i => i.naturalWidth === 32)")
        page.keyboard.press("1")
        _ready(page, 2)
        assert trouble == []


def test_the_servers_reason_is_shown(browser: Any, tmp_path: Path) -> None:
    """A proxy that names itself as the host: each request is refused, though the connection is well."""
    study = make_study(tmp_path, raters=1)
    with serving(study) as (address, _), proxied(address, "", hands_host_on=False) as public:
        page, _ = _open(browser, f"{public}/r/{links(study)[1]}")
        page.click("#agree")
        page.wait_for_selector(".error")
        told = page.inner_text(".error")
        assert "not stored yet" in told and "proxy_set_header Host" in told and "No connection" not in told


def test_a_vote_without_connection_is_sent_again(browser: Any, address: str, study: Path) -> None:
    page, _ = _open(browser, f"{address}/r/{links(study)[4]}")
    page.click("#agree")
    _ready(page, 1)
    page.context.set_offline(True)
    page.locator(".answers button").first.click()
    page.wait_for_selector(".error")
    assert "not stored" in page.inner_text(".error") and _answers(study, 3) == []
    page.context.set_offline(False)
    page.click(".error button")
    _ready(page, 2)
    assert len(_answers(study, 3)) == 1


def test_a_wrong_link_says_so(browser: Any, address: str) -> None:
    page, _ = _open(browser, f"{address}/r/nobody")
    assert "no such link" in page.content()
