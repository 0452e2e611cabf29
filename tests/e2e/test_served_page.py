"""The page of ``transfer serve``, used in headless Chromium."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi")

from serving_cases import loaded_model, running

from transfer.serving.models import ServedModel
from transfer.serving.reading import Limits

DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how the W3C's WebDriver marks an element

pytestmark = pytest.mark.skipif(not DRIVER or not shutil.which("chromium"), reason="needs chromium and chromedriver")


class Browser:
    """Headless Chromium through the W3C's WebDriver protocol, which is JSON over HTTP."""

    def __init__(self, driver: str) -> None:
        self.driver = driver
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,700"]
        logging = {"goog:loggingPrefs": {"browser": "ALL"}}
        wanted = {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}, **logging}}
        self.session = f"/session/{self.call('/session', {'capabilities': wanted})['sessionId']}"

    def call(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.driver + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()) from None

    def open(self, address: str) -> None:
        self.call(f"{self.session}/url", {"url": address})

    def run(self, script: str) -> Any:
        return self.call(f"{self.session}/execute/sync", {"script": script, "args": []})

    def write(self, selector: str, text: str) -> None:
        """Type into a field, or choose a file."""
        place = self.call(f"{self.session}/element", {"using": "css selector", "value": selector})[ELEMENT]
        self.call(f"{self.session}/element/{place}/value", {"text": text})

    def wait_for(self, script: str) -> Any:
        until = time.monotonic() + 30
        while not (found := self.run(f"return {script}")):
            assert time.monotonic() < until, f"{script}\n{self.run('return document.body.innerText')}"
            time.sleep(0.05)
        return found

    def errors(self) -> list[str]:
        """Return what the console says, refused requests to other servers among it."""
        return [entry["message"] for entry in self.call(f"{self.session}/se/log", {"type": "browser"})]

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call(f"{self.session}/screenshot")))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(DRIVER), f"--port={port}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        started: Browser | None = None
        try:
            until = time.monotonic() + 30
            while started is None:
                try:
                    started = Browser(f"http://127.0.0.1:{port}")
                except urllib.error.URLError:
                    assert time.monotonic() < until
                    time.sleep(0.1)
            yield started
        finally:
            if started:
                started.call(started.session, method="DELETE")
            driver.terminate()


@pytest.fixture
def address(tiny: None) -> Iterator[str]:
    points = ServedModel("points", loaded_model({"name": "dense"}, "point", ("near", "far")))
    pictures = {"name": "resnet18", "weights": None, "image_size": 32}
    shapes = ServedModel("shapes", loaded_model(pictures, "image", ("circle", "square", "triangle")))
    with running([points, shapes], limits=Limits(body_bytes=200_000)) as server:
        yield server.address


def test_a_person_types_chooses_and_is_told(browser: Browser, address: str, tmp_path: Path) -> None:
    browser.open(address)
    browser.wait_for("document.querySelector('textarea')")
    browser.write("textarea", "1,2,3,4")
    browser.run("document.querySelector('#ask').click()")
    label = browser.wait_for("document.querySelector('#answer').checkVisibility() && label.innerText")
    assert label.startswith(("near", "far"))
    rows = browser.run("return [...document.querySelectorAll('#bars tr')].map(row => row.innerText)")
    shares = [float(row.split()[1]) for row in rows]
    assert {row.split()[0] for row in rows} == {"near", "far"}
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert shares == sorted(shares, reverse=True)

    # A mistake is told in words, and the next answer takes their place.
    browser.write("textarea", ",5")
    browser.run("document.querySelector('#ask').click()")
    assert "a point has 4 numbers" in browser.wait_for("error.checkVisibility() && error.innerText")

    # Another model takes a picture, and answers as soon as it is chosen.
    browser.run("const menu = document.querySelector('#model'); menu.selectedIndex = 1; menu.onchange()")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    browser.write("input[type=file]", str(tmp_path / "red.png"))
    browser.wait_for("document.querySelectorAll('#bars tr').length == 3 && answer.checkVisibility()")
    assert browser.run("return document.querySelector('.drop img').naturalWidth") == 40

    (tmp_path / "large.png").write_bytes(bytes(300_000))
    browser.write("input[type=file]", str(tmp_path / "large.png"))
    assert "large.png is too large" in browser.wait_for("error.checkVisibility() && error.innerText")
    assert [error for error in browser.errors() if "422" not in error] == []


def test_the_page_asks_no_other_server(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.wait_for("document.querySelector('textarea')")
    loaded = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded
    assert all(name.startswith((address, "data:")) for name in loaded)
