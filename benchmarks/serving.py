"""Requests per second of a served model, compared with direct calls of the same model.

A server listens on loopback in a separate process. Threads of this process send requests over persistent connections,
with a bounded number of concurrent requests. The direct calls run the same model on the same texts in this process,
one by one and in batches, from the text to the label. On two cores the client threads compete with the server.

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
    """Serve the model of a run under the name ``model``; yield the port."""
    command = [sys.executable, "-u", "-m", "transfer", "serve", f"model={run}", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            address = re.match(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
            assert address, "the server did not start"
            yield int(address[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def send_requests(port: int, texts: Sequence[str], at_once: int) -> tuple[float, list[float]]:
    """Request all texts, ``at_once`` concurrently; return the total seconds and those of each request."""

    def request_all(chunk: Sequence[str]) -> list[float]:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        seconds = []
        for text in chunk:
            started = time.perf_counter()
            body = json.dumps({"text": text})
            connection.request("POST", "/models/model/predict", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            assert response.status == 200, response.status
            seconds.append(time.perf_counter() - started)
        connection.close()
        return seconds

    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        chunks = [texts[i::at_once] for i in range(at_once)]
        latencies = [seconds for chunk in threads.map(request_all, chunks) for seconds in chunk]
    return time.perf_counter() - started, latencies


def call(model: ServedModel, texts: Sequence[str], size: int) -> tuple[float, list[float]]:
    """Call the model directly with batches of ``size``; return the total seconds and those of each call."""
    seconds = []
    for start in range(0, len(texts), size):
        started = time.perf_counter()
        model.predict([{"text": text.encode()} for text in texts[start : start + size]])
        seconds.append(time.perf_counter() - started)
    return sum(seconds), seconds


def row(name: str, texts: int, measured: tuple[float, list[float]]) -> dict[str, str]:
    """Return a row of the table."""
    total, latencies = measured
    return {
        "": name,
        "texts per second": f"{texts / total:,.0f}",
        "median, ms": f"{statistics.median(latencies) * 1e3:.1f}",
        "95th percentile, ms": f"{statistics.quantiles(latencies, n=20)[-1] * 1e3:.1f}",
    }


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory of a text model; by default, a model is trained")
    parser.add_argument("--requests", type=int, default=500, help="requests per row")
    parser.add_argument("--at-once", type=int, default=16, help="concurrent requests")
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or transfer.run(CONFIG, output=folder).folder
        reviews = "A warm, funny film that I would gladly watch again. ", "Two hours of my life that I never get back. "
        texts = [f"{reviews[i % 2] * (1 + i % 5)}{i}" for i in range(arguments.requests)]
        model = ServedModel.read("model", run)
        call(model, texts[:BATCH], 1)
        rows = [
            row("direct calls, one text each", len(texts), call(model, texts, 1)),
            row(f"direct calls, {BATCH} texts each", len(texts), call(model, texts, BATCH)),
        ]
        concurrent = arguments.at_once
        for name, options in (
            ("served", []),
            ("served, without batching", ["--batch-size", "1"]),
        ):
            with served(run, *options) as port:
                send_requests(port, texts[:BATCH], 1)
                rows.append(row(f"{name}, 1 concurrent request", len(texts), send_requests(port, texts, 1)))
                rows.append(
                    row(f"{name}, {concurrent} concurrent requests", len(texts), send_requests(port, texts, concurrent))
                )
    print(f"{arguments.requests} texts of 8 to 51 words in each row")
    print_table(rows)


if __name__ == "__main__":
    main()
