"""Headless Chromium for tests of HTML pages."""

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in WebDriver's JSON

needs_chromium = pytest.mark.skipif(
    not DRIVER or not shutil.which("chromium"), reason="needs chromium and chromedriver"
)


class Browser:
    """Headless Chromium, controlled through the WebDriver protocol: JSON over HTTP."""

    def __init__(self, driver: str) -> None:
        self.driver = driver
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,700"]
        logging = {"goog:loggingPrefs": {"browser": "ALL"}}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}, **logging}}
        self.session = f"/session/{self.call('/session', {'capabilities': capabilities})['sessionId']}"

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
        element = self.call(f"{self.session}/element", {"using": "css selector", "value": selector})[ELEMENT]
        self.call(f"{self.session}/element/{element}/value", {"text": text})

    def wait_for(self, script: str) -> Any:
        until = time.monotonic() + 30
        while not (value := self.run(f"return {script}")):
            assert time.monotonic() < until, f"{script}\n{self.run('return document.body.innerText')}"
            time.sleep(0.05)
        return value

    def errors(self) -> list[str]:
        """Return the errors on the console, which include refused requests to other servers."""
        return [entry["message"] for entry in self.call(f"{self.session}/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call(f"{self.session}/screenshot")))


@contextmanager
def started_browser() -> Iterator[Browser]:
    """Start Chromium and its driver, and end both."""
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
