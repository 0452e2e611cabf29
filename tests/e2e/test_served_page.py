"""The page of ``transfer serve``, used in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("fastapi")

from browser import Browser, needs_chromium, started_browser
from serving_cases import loaded_model, running

from transfer.deployment.serving.models import ServedModel
from transfer.deployment.serving.reading import Limits

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as browser:
        yield browser


@pytest.fixture
def address(tiny: None) -> Iterator[str]:
    points = ServedModel("points", loaded_model({"name": "dense"}, "point", ("near", "far")))
    backbone = {"name": "resnet18", "weights": None, "image_size": 32}
    shapes = ServedModel("shapes", loaded_model(backbone, "image", ("circle", "square", "triangle")))
    with running([points, shapes], limits=Limits(body_bytes=200_000)) as server:
        yield server.address


def test_page_predicts_texts_and_images_and_shows_errors(browser: Browser, address: str, tmp_path: Path) -> None:
    browser.open(address)
    browser.wait_for("document.querySelector('textarea')")
    browser.write("textarea", "1,2,3,4")
    browser.run("document.querySelector('#predict').click()")
    label = browser.wait_for("document.querySelector('#prediction').checkVisibility() && label.innerText")
    assert label.startswith(("near", "far"))
    rows = browser.run("return [...document.querySelectorAll('#bars tr')].map(row => row.innerText)")
    percentages = [float(row.split()[1]) for row in rows]
    assert {row.split()[0] for row in rows} == {"near", "far"}
    assert sum(percentages) == pytest.approx(100, abs=0.2)
    assert percentages == sorted(percentages, reverse=True)

    # The page shows the reason of an error until the next prediction.
    browser.write("textarea", ",5")
    browser.run("document.querySelector('#predict').click()")
    assert "a point has 4 numbers" in browser.wait_for("error.checkVisibility() && error.innerText")

    # An image model predicts as soon as an image is chosen.
    browser.run("const menu = document.querySelector('#model'); menu.selectedIndex = 1; menu.onchange()")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    browser.write("input[type=file]", str(tmp_path / "red.png"))
    browser.wait_for("document.querySelectorAll('#bars tr').length == 3 && prediction.checkVisibility()")
    assert browser.run("return document.querySelector('.drop img').naturalWidth") == 40

    (tmp_path / "large.png").write_bytes(bytes(300_000))
    browser.write("input[type=file]", str(tmp_path / "large.png"))
    assert "large.png is too large" in browser.wait_for("error.checkVisibility() && error.innerText")
    assert [error for error in browser.errors() if "422" not in error] == []


def test_page_requests_no_other_server(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.wait_for("document.querySelector('textarea')")
    loaded = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded
    assert all(name.startswith((address, "data:")) for name in loaded)
