"""The page in a real browser: nothing complained of, nothing fetched, all of it to be seen.

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

import pytest
from helpers.reported_run import EPOCHS, RECORDS, TEST
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

PHONE, DESKTOP = 360, 1280


class Browser:
    """Chromium without a window."""

    def __init__(self, program: str, driver: str):
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, Service(driver))

    def open(self, page: Path, width: int, dark: bool = False, media: str = "screen") -> None:
        """Load a page anew, on a screen or as if printed."""
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.tell("Emulation.setEmulatedMedia", media=media, features=theme)
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=800, deviceScaleFactor=1, mobile=width == PHONE,
        )  # fmt: skip
        self.complaints(), self.requests()  # what is left of the page before
        self.driver.get(page.as_uri())

    def tell(self, what: str, **how: Any) -> Any:
        return self.driver.execute_cdp_cmd(what, how)

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def complaints(self) -> list[str]:
        """What the console says since the last time."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        """What was asked for since the last time, besides data that the page itself holds."""
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
    there = Browser(program, driver)
    yield there
    there.driver.quit()


def test_no_complaint_and_no_request_but_for_the_file(browser: Browser, page: Path) -> None:
    browser.open(page, DESKTOP)
    assert browser.requests() == {page.as_uri()}
    assert browser.complaints() == []
    assert browser.ask("document.title") == "demo – cl_ray"


def test_the_test_would_see_a_request_and_a_complaint(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    spoilt = tmp_path / "spoilt.html"
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    spoilt.write_text(text.replace("</main>", '<img src="nowhere.png"></main>'))
    browser.open(spoilt, DESKTOP)
    assert (tmp_path / "nowhere.png").as_uri() in browser.requests()
    assert any("nowhere.png" in complaint for complaint in browser.complaints())
    # The page's own rule would keep even such a picture from being fetched.
    spoilt.write_text(page.read_text().replace("</main>", '<img src="nowhere.png"></main>'))
    browser.open(spoilt, DESKTOP)
    assert any("Content Security Policy" in complaint for complaint in browser.complaints())


def test_every_picture_is_there_and_described(browser: Browser, page: Path) -> None:
    browser.open(page, DESKTOP)
    images = browser.ask(
        "[...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.width, i.alt])"
    )
    # Samples 2, an epoch each, pairs 2 blocks, ways 2, eight samples with their neighbours.
    assert len(images) == 2 + EPOCHS + 2 + 2 + 8 * 2
    for width, height, shown, alt in images:
        assert width >= 28
        assert height >= 28
        assert shown > 20
        assert alt.endswith(".")
    charts = browser.ask("[...document.querySelectorAll('svg')].map(s => s.ariaLabel)")
    assert all(charts)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, PHONE, 768, DESKTOP])
def test_nothing_reaches_beyond_the_page(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    browser.open(page, width, dark)
    assert browser.ask("document.documentElement.clientWidth") == width
    assert browser.ask("document.documentElement.scrollWidth") <= width
    beyond = browser.ask(
        "[...document.querySelectorAll('body *')]"
        ".filter(e => !e.closest('.scroll, pre'))"
        f".filter(e => e.getBoundingClientRect().right > {width} + 0.5)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert beyond == []


def test_letters_are_large_enough_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, PHONE)
    smallest = browser.ask(
        "Math.min(...[...document.querySelectorAll('p, dd, dt, td, th, span, svg text')]"
        ".filter(e => e.textContent.trim() && e.getClientRects().length)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)"
        " * (e.ownerSVGElement ? e.ownerSVGElement.clientWidth / 360 : 1)))"
    )
    assert smallest >= 9


def test_the_plots_hold_every_point(browser: Browser, page: Path) -> None:
    browser.open(page, DESKTOP)
    plots = browser.ask(
        "[...document.querySelectorAll('#curves .plot, #balance .plot[data-xs]')]"
        ".map(s => [...s.querySelectorAll('.line')].map(p => [p.getAttribute('d'),"
        " p.getTotalLength(), p.dataset.values.split('|').length, getComputedStyle(p).stroke]))"
    )
    assert [len(lines) for lines in plots] == [2, 1, 1, 2, 1, 1, 1, 2, 1]
    for lines in plots:
        assert len({stroke for *_, stroke in lines}) == len(lines)  # told apart by colour
        for path, length, values, _ in lines:
            assert path.count("L") + 1 == values == RECORDS
            assert length > 100
    outside = browser.ask(
        "[...document.querySelectorAll('.plot .line')].filter(p => { const b = p.getBBox();"
        " return b.x < 39 || b.y < 7 || b.x + b.width > 349 || b.y + b.height > 301 }).length"
    )
    assert outside == 0
    groups = browser.ask(
        "[...document.querySelectorAll('.map path')].map(p => p.getAttribute('d'))"
    )
    assert sum(path.count("M") for path in groups) == TEST
    labels = browser.ask("[...document.querySelectorAll('.map text')].map(t => t.textContent)")
    digits = [str(digit) for digit in range(10)]
    assert set(labels) <= set(digits)  # those that lie on no other
    names = "[...document.querySelectorAll('.map .legend span')].map(s => s.innerText)"
    assert browser.ask(names) == digits
    over = browser.ask(
        "(() => { const boxes = [...document.querySelectorAll('.map text')].map(t => t.getBBox());"
        " return boxes.some((a, i) => boxes.slice(i + 1).some(b => a.x < b.x + b.width"
        " && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height)) })()"
    )
    assert over is False
    assert len(groups) == 10


def test_values_can_be_read_off(browser: Browser, page: Path) -> None:
    browser.open(page, DESKTOP)
    plot = browser.driver.find_element(By.CSS_SELECTOR, "#curves .plot")
    legend = browser.driver.find_element(By.CSS_SELECTOR, "#curves .legend")
    usual = legend.text
    browser.driver.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot
    )
    at = browser.ask("document.querySelector('#curves .plot').dataset.at").split("|")
    ActionChains(browser.driver).move_to_element_with_offset(
        plot, -plot.size["width"] // 2 + 5, 0
    ).perform()
    assert f"step {at[0]}" in legend.text
    values = plot.find_element(By.CSS_SELECTOR, ".line").get_attribute("data-values")
    assert values
    assert f"D {values.split('|')[0]} " in legend.text.replace("\n", " ")
    heading = browser.driver.find_element(By.CSS_SELECTOR, "#curves h2")
    ActionChains(browser.driver).move_to_element(heading).perform()
    assert legend.text == usual


def test_headings_are_in_order_and_every_entry_leads_somewhere(
    browser: Browser, page: Path
) -> None:
    browser.open(page, PHONE)
    levels = browser.ask("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    lost = browser.ask(
        "[...document.querySelectorAll('nav a')]"
        ".filter(a => !document.querySelector(a.hash)).length"
    )
    assert lost == 0


CONTRAST = """(() => {
  const light = (rgb) => rgb.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const style = getComputedStyle(document.body), back = light(style.backgroundColor);
  const ratio = (rgb) => {
    const ink = light(rgb);
    return (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
  };
  const note = getComputedStyle(document.querySelector(".note"));
  return [back, ratio(style.color), ratio(note.color)];
})()"""
"""Lightness of the background and contrasts of text with it, by WCAG 2.2, section 1.4.3."""


def test_it_is_dark_where_that_is_preferred_and_always_legible(
    browser: Browser, page: Path
) -> None:
    for dark, media in ((False, "screen"), (True, "screen"), (True, "print")):
        browser.open(page, PHONE, dark, media)
        back, *ratios = browser.ask(CONTRAST)
        assert back < 0.1 if dark and media == "screen" else back > 0.9
        assert min(ratios) >= 4.5


def test_in_print_folds_are_open_and_pictures_whole(browser: Browser, page: Path) -> None:
    fold = "document.querySelector('details pre').getBoundingClientRect().height"
    browser.open(page, DESKTOP)
    assert browser.ask("document.querySelector('details pre').checkVisibility()") is False
    browser.open(page, DESKTOP, dark=True, media="print")
    assert browser.ask("document.querySelector('details').open") is False
    assert browser.ask("document.querySelector('details pre').checkVisibility()") is True
    assert browser.ask(fold) > 400
    assert browser.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    cut = browser.ask(
        "[...document.querySelectorAll('img, svg, figure, tr')]"
        ".filter(e => getComputedStyle(e).breakInside !== 'avoid').length"
    )
    assert cut == 0
    paper = browser.tell("Page.printToPDF", printBackground=False, paperWidth=8.27)
    document = base64.b64decode(paper["data"])
    assert document.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", document))
    assert 3 <= pages <= 12
