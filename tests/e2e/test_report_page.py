"""The report of a run, opened in headless Chromium."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, needs_chromium, started_browser

import transfer

pytestmark = needs_chromium

MARKUP = "</p><script>document.title='owned'</script><img src=http://127.0.0.1:9/a onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of a run with texts and class names that contain markup."""
    folder = tmp_path_factory.mktemp("page")
    words = {MARKUP: ["dull", "poor", "weary"], "good & <b>bold": ["bright", "fine", "superb"]}
    rows = [
        {"text": f"{MARKUP} a {word} film {number}", "label": label}
        for number in range(12)
        for label, some in words.items()
        for word in some
    ]
    for name, part in (("train", rows[12:]), ("test", rows[:12])):
        lines = "".join(f"{json.dumps(row)}\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    data = {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "validation": 0.2}
    config: dict[str, Any] = {
        "data": {"name": "text_csv", "text": "text", "label": "label", **data},
        "backbone": {"name": "textcnn", "vectors": None, "dimensions": 8, "filters": 4, "kernel_sizes": [2]},
        "train": {"batch_size": 16, "phases": [{"epochs": 1}, {"epochs": 1, "freeze": "backbone"}]},
    }
    return transfer.run(config, output=folder / "runs").folder / "report.html"


def test_page_loads_without_errors_or_requests(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    assert browser.errors() == []
    assert browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert browser.run("return document.scripts.length") == 0
    assert browser.run("return document.title").startswith("textcnn on text_csv: run-")


def test_page_escapes_texts_and_class_names(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    assert browser.run("return document.querySelectorAll('section img, section b, script').length") == 0
    # The bold row of sums is markup of the page.
    assert MARKUP in browser.run("return document.querySelector('#data').innerText")
    assert MARKUP in browser.run("return document.querySelector('#top-losses article .text').innerText")


def test_page_shows_every_section_within_its_width(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    headings = browser.run("return [...document.querySelectorAll('h2')].map(h => h.innerText)")
    assert headings == ["Training", "Test", "Calibration", "Top losses", "Setup", "Data", "Environment"]
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    # No chart is empty.
    sizes = browser.run("return [...document.querySelectorAll('svg')].map(s => s.getBBox().width)")
    assert len(sizes) == 7
    assert min(sizes) > 50


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_follows_the_color_scheme_of_the_browser(browser: Browser, page: Path, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.call(f"{browser.session}/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": media})
    browser.open(page.as_uri())
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    line = browser.run("return getComputedStyle(document.querySelector('.chart .title')).fill")
    brightness = {name: sum(map(int, color[4:-1].split(","))) for name, color in (("ground", ground), ("line", line))}
    assert (brightness["ground"] > brightness["line"]) == (scheme == "light")


def test_page_prints_on_a_few_sheets(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    printed = base64.b64decode(browser.call(f"{browser.session}/print", {}))
    assert printed.startswith(b"%PDF")
    assert 2 <= printed.count(b"/Type /Page\n") <= 8


def test_plot_is_a_standalone_svg(browser: Browser, page: Path) -> None:
    browser.open((page.parent / "plots" / "confusion.svg").as_uri())
    assert browser.errors() == []
    assert browser.run("return document.documentElement.tagName") == "svg"
    assert browser.run("return document.querySelectorAll('.cell').length") == 4
