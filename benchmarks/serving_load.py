"""Behavior of a server under load and attack: latency beside a hostile client, memory, health under many connections.

A server with a text and an image model listens on loopback in a separate process. Clients in this process send requests
over persistent connections. Quiet rounds and rounds with one hostile client in sixteen alternate, so that other load on
the machine affects both. The hostile client sends, one after the other: the largest accepted image, a text of 250 KiB,
JSON and forms of 9 MiB, and damaged images.

    .venv/bin/python benchmarks/serving_load.py                       # trains the packaged quickstart configs first
    .venv/bin/python benchmarks/serving_load.py --text runs/A --images runs/B --json load.json
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
from common import machine, print_table
from PIL import Image

import transfer

CONFIGS = Path(__file__).parents[1] / "configs"
CLIENTS = 16
MEBIBYTE = 2**20
REVIEW = "Two hours of my life that I never get back. "


@contextmanager
def served(text: Path, images: Path, log: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Serve both models under the names ``text`` and ``images``; yield the port and the process."""
    command = [sys.executable, "-u", "-m", "transfer", "serve", f"text={text}", f"images={images}", "--port", "0"]
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout
        try:
            address = re.match(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
            assert address, "the server did not start"
            yield int(address[1]), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


class Client:
    """A persistent connection for requests in HTTP/1.1. It takes less of the shared processors than ``http.client``.

    Args:
        port: Port of the server.
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def post(self, model: str, body: bytes, kind: str = "application/json") -> int:
        """Request a prediction; return the status."""
        head = f"POST /models/{model}/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._receive()
        answered, _, content = received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", answered)
        assert length
        missing = int(length[1]) - len(content)
        while missing > 0:
            missing -= len(self._receive())
        return int(answered[9:12])

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _receive(self) -> bytes:
        received = self._socket.recv(65_536)
        assert received, "the server closed the connection"
        return received


def send_texts(port: int, until: float) -> list[float]:
    """Request predictions of texts until a time; return the seconds of each."""
    client = Client(port)
    bodies = [json.dumps({"text": REVIEW * count}).encode() for count in range(1, 6)]
    seconds = []
    while time.perf_counter() < until:
        started = time.perf_counter()
        status = client.post("text", bodies[len(seconds) % len(bodies)])
        assert status == 200, status
        seconds.append(time.perf_counter() - started)
    client.close()
    return seconds


def image_json(content: bytes) -> bytes:
    """Return the body of a request for an image."""
    return json.dumps({"image": base64.b64encode(content).decode()}).encode()


def hostile_bodies() -> list[tuple[str, bytes, str]]:
    """Return the model, body and content type of each request of the hostile client."""
    file = io.BytesIO()
    Image.new("RGB", (7000, 7000), "red").save(file, "PNG")
    large = file.getvalue()
    values = b'{"image": [' + b"[]," * (3 * MEBIBYTE) + b"0]}"
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    form = head + b"\r\n-" * (3 * MEBIBYTE) + b"\r\n--x--\r\n"
    return [
        ("images", image_json(large), "application/json"),
        ("text", json.dumps({"text": "film " * 50_000}).encode(), "application/json"),
        ("images", values, "application/json"),
        ("images", form, "multipart/form-data; boundary=x"),
        ("images", image_json(large[: len(large) // 2]), "application/json"),
    ]


def send_hostile(port: int, until: float, bodies: list[tuple[str, bytes, str]]) -> list[float]:
    """Send hostile requests until a time; return the seconds of each."""
    seconds = []
    for model, body, kind in cycle(bodies):
        started = time.perf_counter()
        if started > until:
            break
        client = Client(port)  # the server closes the connection after some requests
        client.post(model, body, kind)
        client.close()
        seconds.append(time.perf_counter() - started)
    return seconds


def measure_round(
    port: int, server: psutil.Process, seconds: float, bodies: list[tuple[str, bytes, str]] | None
) -> dict[str, Any]:
    """Send requests from sixteen clients, one of which is hostile if bodies are given; return the measurements."""
    until = time.perf_counter() + seconds
    before = sum(server.cpu_times()[:2])
    with ThreadPoolExecutor(CLIENTS) as threads:
        hostile = threads.submit(send_hostile, port, until, bodies) if bodies else None
        clients = [threads.submit(send_texts, port, until) for _ in range(CLIENTS - bool(bodies))]
        latencies = [latency for client in clients for latency in client.result()]
    percentiles = statistics.quantiles(latencies, n=100)
    return {
        "requests_per_second": len(latencies) / seconds,
        # Without the processes that decode images. It does not depend on other load as much as the latencies.
        "server_cpu_ms": (sum(server.cpu_times()[:2]) - before) / len(latencies) * 1e3,
        "p50_ms": percentiles[49] * 1e3,
        "p99_ms": percentiles[98] * 1e3,
        "hostile_requests": len(hostile.result()) if hostile else 0,
    }


def memory_bytes(server: psutil.Process) -> int:
    """Return the memory of the server and its processes; what they share counts once."""
    return sum(process.memory_full_info().pss for process in [server, *server.children(recursive=True)])


def measure_memory(port: int, server: psutil.Process, requests: int) -> dict[str, Any]:
    """Send bad requests; return the memory of the server after a tenth of them and after all."""
    file = io.BytesIO()
    Image.new("RGB", (1500, 1500), "red").save(file, "PNG")
    truncated, noise = file.getvalue()[: len(file.getvalue()) // 2], b"\xff\xd8\xff" + bytes(1000)
    bad = [
        ("images", image_json(truncated)),
        ("images", image_json(noise)),
        ("images", b'{"image": 3}'),
        ("text", b'{"text": ""}'),
        ("text", b'{"text": '),
    ]

    def send(number: int) -> None:
        client = Client(port)
        for model, body in bad * (number // len(bad)):
            status = client.post(model, body)
            assert 400 <= status < 500, status
        client.close()

    # The first tenth fills caches and the arenas of the allocator.
    send(requests // 10)
    before = memory_bytes(server)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(send, [requests // 4] * 4))
    after = memory_bytes(server)
    return {"before_mib": before / MEBIBYTE, "after_mib": after / MEBIBYTE, "ratio": after / before}


def measure_health(port: int, connections: int, sent: bytes) -> dict[str, Any]:
    """Request the health while connections are open on which only ``sent`` has been sent."""
    statuses, seconds = [], []
    with ExitStack() as stack:
        for _ in range(connections):
            opened = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            opened.sendall(sent)
        for _ in range(20):
            connection = HTTPConnection("127.0.0.1", port, timeout=10)
            started = time.perf_counter()
            try:
                connection.request("GET", "/health")
                statuses.append(connection.getresponse().status)
            except OSError:
                statuses.append(0)
            seconds.append(time.perf_counter() - started)
            connection.close()
    return {"statuses": sorted(set(statuses)), "slowest_ms": max(seconds) * 1e3}


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="run directory of a text model; by default, a model is trained")
    parser.add_argument("--images", type=Path, help="run directory of an image model; by default, a model is trained")
    parser.add_argument("--seconds", type=float, default=5, help="duration of a round")
    parser.add_argument("--rounds", type=int, default=4, help="quiet and hostile rounds, each")
    parser.add_argument("--bad-requests", type=int, default=10_000, help="requests of the measurement of memory")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    # Every idle connection is a file of this process.
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    print(machine())
    threading.stack_size(MEBIBYTE)
    bodies = hostile_bodies()
    with tempfile.TemporaryDirectory() as folder:
        text = arguments.text or transfer.run(CONFIGS / "quickstart_text.yaml", output=folder).folder
        images = arguments.images or transfer.run(CONFIGS / "quickstart_vision.yaml", output=folder).folder
        log = Path(folder) / "log.txt"
        with served(text, images, log) as (port, server):
            measure_round(port, server, 1, None)
            rounds = [
                {"hostile": hostile, **measure_round(port, server, arguments.seconds, bodies if hostile else None)}
                for _ in range(arguments.rounds)
                for hostile in (False, True)
            ]
            head = b"POST /models/text/predict HTTP/1.1\r\nHost: localhost\r\n"
            body = head + b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
            health = {
                "256 half-open heads": measure_health(port, 256, head),
                "256 half-open bodies": measure_health(port, 256, body),
                "1,300 idle": measure_health(port, 1300, b""),
            }
            time.sleep(11)  # the server closes the connections after 10 s
            memory = measure_memory(port, server, arguments.bad_requests)
        log_bytes = log.stat().st_size
    ratios = [hostile["p99_ms"] / quiet["p99_ms"] for quiet, hostile in zip(rounds[::2], rounds[1::2], strict=True)]
    results = {
        "rounds": rounds,
        "p99_ratio_median": statistics.median(ratios),
        "health": health,
        "memory": memory,
        "log_bytes": log_bytes,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_table(
        [
            {key: f"{value:,.1f}" if isinstance(value, float) else str(value) for key, value in row.items()}
            for row in rounds
        ]
    )
    print(f"99th percentile with the hostile client: {results['p99_ratio_median']:.2f} times (median of the rounds)")
    print_table(
        [{"connections": name} | {key: str(value) for key, value in row.items()} for name, row in health.items()]
    )
    print(
        f"memory after {arguments.bad_requests:,} bad requests: {memory['before_mib']:,.0f} MiB, then "
        f"{memory['after_mib']:,.0f} MiB ({memory['ratio']:.3f} times); log: {log_bytes:,} bytes"
    )


if __name__ == "__main__":
    main()
