"""The page in a real browser: no console errors, no requests, legible everywhere and in print.

Debian's packages chromium and chromium-driver are used where they are installed; with
CL_RAY_REQUIRE_BROWSER=1 it is a failure if they are not.
"""

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.reported_run import EPOCHS, RECORDS, TEST
from plotly.offline import get_plotlyjs
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from cl_ray.data.dataset import RowBatch
from cl_ray.report.embedding import _map_chart

pytestmark = pytest.mark.browser

PHONE, DESKTOP = 400, 1280


class Browser:
    """Chromium without a window."""

    def __init__(self, program: str, driver: str):
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
            options.add_argument(f"--{flag}")
        options.add_argument("--disable-dev-shm-usage")  # it is small in a container
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, Service(driver))

    def open(self, page: Path, width: int, dark: bool = False, media: str = "screen") -> None:
        """Load a page anew, on a screen or as if printed."""
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.command("Emulation.setEmulatedMedia", media=media, features=theme)
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=800, deviceScaleFactor=1, mobile=width == PHONE,
        )  # fmt: skip
        self.console(), self.requests()  # of the page before
        self.driver.get(page.as_uri())

    def command(self, name: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, arguments)

    def evaluate(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def console(self) -> list[str]:
        """Return the messages of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        """Return the requested URLs since the last call, without data: URIs."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == SENT]
        return {url for url in sent if not url.startswith("data:")}


SENT = "Network.requestWillBeSent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        reason = "needs a browser: apt-get install chromium chromium-driver"
        if os.environ.get("CL_RAY_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    opened = Browser(program, driver)
    yield opened
    opened.driver.quit()


def test_no_console_message_and_no_request_but_for_the_file(browser: Browser, page: Path) -> None:
    browser.open(page, DESKTOP)
    assert browser.requests() == {page.as_uri()}
    assert browser.console() == []
    assert browser.evaluate("document.title") == "demo – cl_ray"


def test_requests_and_console_messages_are_seen_and_the_page_forbids_requests(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.html"
    text = page.read_text()
    image = '<img src="nowhere.png"></main>'
    changed.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</main>", image))
    browser.open(changed, DESKTOP)
    assert (tmp_path / "nowhere.png").as_uri() in browser.requests()
    assert any("nowhere.png" in message for message in browser.console())
    changed.write_text(text.replace("</main>", image))
    browser.open(changed, DESKTOP)
    assert any("Content Security Policy" in message for message in browser.console())


def test_every_image_is_shown_and_described(browser: Browser, page: Path) -> None:
    browser.open(page, DESKTOP)
    images = browser.evaluate(
        "[...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.width, i.alt])"
    )
    # Samples 2, an epoch each, pairs, interpolations 2, eight samples with their neighbours.
    assert len(images) == 2 + EPOCHS + 1 + 2 + 8 * 2
    for width, height, shown, alt in images:
        assert min(width, height) >= 28
        assert shown > 20
        assert alt.endswith(".")
    described = browser.evaluate(
        "[...document.querySelectorAll('[role=img]')].map(e => e.ariaLabel)"
    )
    assert len(described) > 12
    assert all(described)


@pytest.mark.parametrize(("width", "dark"), [(320, False), (PHONE, True), (768, False)])
def test_nothing_extends_beyond_the_page(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    browser.open(page, width, dark)
    assert browser.evaluate("document.documentElement.clientWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    beyond = browser.evaluate(
        "[...document.querySelectorAll('body *')]"
        ".filter(e => !e.closest('table, pre, .main-svg'))"
        f".filter(e => e.getBoundingClientRect().right > {width} + 0.5)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert beyond == []


def test_text_is_large_enough_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, PHONE)
    smallest = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('p, dd, dt, td, th, span, svg text')]"
        ".filter(e => e.textContent.trim() && e.getClientRects().length)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 9


DRAWN = (
    "[...document.querySelectorAll('{} .plot')].map(plot => ["
    "plot.calcdata.map(points => points.length),"
    " [...plot.querySelectorAll('.scatterlayer .trace')].map(trace => ["
    "trace.querySelector('.js-line')?.getTotalLength() ?? 0,"
    " trace.querySelector('.js-line') && getComputedStyle(trace.querySelector('.js-line')).stroke,"
    " trace.querySelectorAll('.point').length])])"
)
"""For each chart: points in its data; of each trace, length and colour of its line, points."""


def test_charts_draw_every_point(browser: Browser, page: Path) -> None:
    browser.open(page, DESKTOP)
    charts = browser.evaluate(DRAWN.format("#curves"))
    charts += browser.evaluate(DRAWN.format("#balance"))[:2]
    assert [len(traces) for _, traces in charts] == [2, 1, 1, 2, 1, 1, 1, 2, 1]
    for points, traces in charts:
        assert set(points) == {RECORDS}
        assert len({colour for _, colour, _ in traces}) == len(traces)  # told apart by colour
        assert min(length for length, *_ in traces) > 100
    ((points, traces),) = browser.evaluate(DRAWN.format("#embeddings"))
    assert sum(points) == sum(drawn for *_, drawn in traces) == TEST
    assert len(traces) == 10


def test_values_can_be_read_off_a_chart(browser: Browser, page: Path) -> None:
    browser.open(page, DESKTOP)
    plot = browser.driver.find_element(By.CSS_SELECTOR, "#curves .plot")
    browser.driver.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot
    )
    ActionChains(browser.driver).move_to_element(plot).perform()
    shown = "document.querySelector('#curves .hoverlayer').textContent"
    WebDriverWait(browser.driver, 20).until(lambda _: browser.evaluate(shown))
    assert re.search(r"D [−-]?[\d.]+", browser.evaluate(shown))


def test_headings_are_in_order_and_links_lead_somewhere(browser: Browser, page: Path) -> None:
    browser.open(page, PHONE)
    levels = browser.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    broken = browser.evaluate(
        "[...document.querySelectorAll('nav a')]"
        ".filter(a => !document.querySelector(a.hash)).length"
    )
    assert broken == 0


CONTRAST = """(() => {
  const light = (rgb) => rgb.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const style = getComputedStyle(document.body), back = light(style.backgroundColor);
  const ratio = (rgb) => {
    const ink = light(rgb);
    return (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
  };
  const of = (selector, name) => ratio(getComputedStyle(document.querySelector(selector))[name]);
  return [back, ratio(style.color), of(".note", "color"), of("#curves .xtick text", "fill"),
    of("#curves .js-line", "stroke")];
})()"""
"""Lightness of the background and contrasts with it, by WCAG 2.2, section 1.4.3."""


@pytest.mark.parametrize(("dark", "media"), [(False, "screen"), (True, "screen"), (True, "print")])
def test_it_is_dark_where_that_is_preferred_and_always_legible(
    browser: Browser, page: Path, dark: bool, media: str
) -> None:
    browser.open(page, PHONE, dark, media)
    back, *text, line = browser.evaluate(CONTRAST)
    assert back < 0.1 if dark and media == "screen" else back > 0.9
    assert min(text) >= 4.5
    assert line >= 3


def test_print_opens_folds_and_draws_charts_that_fit(browser: Browser, page: Path) -> None:
    fold = "document.querySelector('details pre').checkVisibility()"
    browser.open(page, DESKTOP)
    assert browser.evaluate(fold) is False
    browser.open(page, DESKTOP, dark=True, media="print")
    assert browser.evaluate(fold) is True
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    cut = browser.evaluate(
        "[...document.querySelectorAll('img, figure, tr')]"
        ".filter(e => getComputedStyle(e).breakInside !== 'avoid').length"
    )
    assert cut == 0
    browser.driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    wide = browser.evaluate(
        "[...document.querySelectorAll('.plot')].filter(plot => Math.abs("
        "plot.querySelector('.main-svg').clientWidth - plot.clientWidth) > 1).length"
    )
    assert wide == 0
    assert browser.evaluate("document.body.clientWidth") < 700  # 182 mm
    browser.driver.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.evaluate("document.querySelector('details').open") is False
    paper = browser.command("Page.printToPDF", printBackground=False, paperWidth=8.27)
    document = base64.b64decode(paper["data"])
    assert document.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", document))
    assert 3 <= pages <= 12


def test_without_javascript_charts_are_described(page: Path) -> None:
    text = page.read_text()
    assert len(re.findall(r"<noscript>.*?over 30 steps: .*?</noscript>", text, re.DOTALL)) >= 9


def test_class_names_are_text(browser: Browser, tmp_path: Path) -> None:
    names = ['<a href="https://x.example">a</a>', "<b>%{x}</b>&amp;", "[/a]"]
    rows = RowBatch(np.arange(3), np.zeros((3, 28, 28, 1), np.uint8), np.arange(3))
    chart = _map_chart(np.eye(3)[:, :2] * 9, names, rows)
    page = tmp_path / "page.html"
    page.write_text(
        f"<meta charset=utf-8><div id=chart></div><script>{get_plotlyjs()}</script>"
        f"<script>Plotly.newPlot('chart', {chart.to_json()})</script>"
    )
    browser.open(page, DESKTOP)
    texts = "[...document.querySelectorAll('.{}')].map(text => text.textContent)"
    assert browser.evaluate(texts.format("legendtext")) == names
    assert browser.evaluate(texts.format("annotation-text")) == [names[1]]  # the others overlap
    assert (
        browser.evaluate("document.querySelectorAll('#chart svg a, #chart svg tspan').length") == 0
    )
