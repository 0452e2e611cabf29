"""How many requests a second a served model answers, beside plain calls of the same model.

A server listens on loopback in a process of its own; threads of this one ask over connections that stay open, a bounded
number of times. The plain calls are of the same model on the same texts in this process, one by one and in batches,
from the text to the label. On two cores the asking threads take from the server what they need for themselves.

    .venv/bin/python benchmarks/serving.py                      # trains the packaged quickstart_text first
    .venv/bin/python benchmarks/serving.py --run runs/NAME --requests 2000 --at-once 32
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from common import machine, print_table

import transfer
from transfer.deployment.serving.models import ServedModel

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart_text.yaml"
BATCH = 32


@contextmanager
def served(run: Path, *options: str) -> Iterator[int]:
    """Serve a run's model as ``model``; give the port."""
    command = [sys.executable, "-u", "-m", "transfer", "serve", f"model={run}", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            found = re.match(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
            assert found, "the server did not start"
            yield int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def ask(port: int, texts: Sequence[str], at_once: int) -> tuple[float, list[float]]:
    """Ask for all texts, so many at once; return the seconds in all and those of each request."""

    def ask_some(some: Sequence[str]) -> list[float]:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        seconds = []
        for text in some:
            began = time.perf_counter()
            body = json.dumps({"text": text})
            connection.request("POST", "/models/model/predict", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            assert response.status == 200, response.status
            seconds.append(time.perf_counter() - began)
        connection.close()
        return seconds

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        each = [s for some in threads.map(ask_some, [texts[i::at_once] for i in range(at_once)]) for s in some]
    return time.perf_counter() - began, each


def call(model: ServedModel, texts: Sequence[str], size: int) -> tuple[float, list[float]]:
    """Call the model itself, with so many texts at once; return the seconds in all and those of each call."""
    seconds = []
    for first in range(0, len(texts), size):
        began = time.perf_counter()
        model.answer([{"text": text.encode()} for text in texts[first : first + size]])
        seconds.append(time.perf_counter() - began)
    return sum(seconds), seconds


def row(name: str, texts: int, measured: tuple[float, list[float]]) -> dict[str, str]:
    """Return a line of the table."""
    whole, each = measured
    return {
        "": name,
        "texts per second": f"{texts / whole:,.0f}",
        "median, ms": f"{statistics.median(each) * 1e3:.1f}",
        "95th percentile, ms": f"{statistics.quantiles(each, n=20)[-1] * 1e3:.1f}",
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="of a text model; by default one is trained")
    parser.add_argument("--requests", type=int, default=500, help="of each row")
    parser.add_argument("--at-once", type=int, default=16, help="connections")
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or transfer.run(CONFIG, output=folder).folder
        reviews = "A warm, funny film that I would gladly watch again. ", "Two hours of my life that I never get back. "
        texts = [f"{reviews[i % 2] * (1 + i % 5)}{i}" for i in range(arguments.requests)]
        model = ServedModel.read("model", run)
        call(model, texts[:BATCH], 1)
        rows = [
            row("plain calls, one text each", len(texts), call(model, texts, 1)),
            row(f"plain calls, {BATCH} texts each", len(texts), call(model, texts, BATCH)),
        ]
        many = arguments.at_once
        for name, options in (
            ("served", []),
            ("served, without batches", ["--batch-size", "1"]),
        ):
            with served(run, *options) as port:
                ask(port, texts[:BATCH], 1)
                rows.append(row(f"{name}, 1 request at once", len(texts), ask(port, texts, 1)))
                rows.append(row(f"{name}, {many} at once", len(texts), ask(port, texts, many)))
    print(f"{arguments.requests} texts of 8 to 51 words in each row")
    print_table(rows)


if __name__ == "__main__":
    main()
