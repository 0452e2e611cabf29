"""Serving: batches, limits, predictions, and a server on a socket."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import os
import random
import re
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")

from conftest import Dense, PointPreprocessing
from fastapi import Request
from forked_python import ForkedPython
from serving_cases import Running, loaded_model, running
from starlette.types import Message

import transfer
from transfer import UserError, register
from transfer.deployment.serving.batching import Batcher, Batching, BusyError
from transfer.deployment.serving.models import RefusedError, ServedModel
from transfer.deployment.serving.reading import LIMITS, Limits, read_inputs
from transfer.deployment.serving.server import is_loopback, listen, name_runs
from transfer_vision.images.decoding import open_upload

POINT = {"point": "1,2,3,4"}
WITH_POINTS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
sys.stdout.reconfigure(line_buffering=True)
from conftest import Dense
from transfer import register
from transfer.cli.app import main
register("backbone", "dense")(Dense)
main()
"""


# -------------------------------------------------------------------------------------------------------------- batches


def batched(items: Sequence[int], **options: Any) -> tuple[list[Any], list[list[int]]]:
    """Submit items at the same time; return the result of each, and the batches."""
    batches: list[list[int]] = []

    def work(batch: Sequence[int]) -> list[int | Exception]:
        batches.append(list(batch))
        return [10 * item if item >= 0 else ValueError("negative") for item in batch]

    async def submit() -> list[Any]:
        settings = {"max_size": 4, "wait_seconds": 0.0, "max_waiting": 100} | options
        async with Batcher(work, Batching(**settings)) as batcher:

            async def result(item: int) -> int:
                return await batcher.submit(item)

            return await asyncio.gather(*map(result, items), return_exceptions=True)

    return asyncio.run(submit()), batches


def test_batcher_collects_items_in_order() -> None:
    results, batches = batched(range(10))
    assert results == [10 * item for item in range(10)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_batcher_raises_the_error_of_one_item_only_for_it() -> None:
    results, _ = batched([1, -1, 2])
    assert results[::2] == [10, 20]
    assert str(results[1]) == "negative"


def test_batcher_refuses_items_beyond_max_waiting() -> None:
    results, _ = batched(range(5), max_waiting=3)
    assert results[:3] == [0, 10, 20]
    assert all(isinstance(result, BusyError) for result in results[3:])


def test_batcher_continues_after_a_failed_batch() -> None:
    def work(batch: Sequence[int]) -> list[int | Exception]:
        if 0 in batch:
            raise RuntimeError("broken")
        return list(batch)

    async def submit() -> list[Any]:
        async with Batcher(work, Batching(max_size=2, wait_seconds=0.0, max_waiting=9)) as batcher:
            return await asyncio.gather(*map(batcher.submit, range(4)), return_exceptions=True)

    first, second, *others = asyncio.run(submit())
    assert str(first) == str(second) == "broken"
    assert others == [2, 3]


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def points(tiny: None) -> ServedModel:
    return ServedModel("points", loaded_model({"name": "dense"}, "point", ("near", "far")))


def test_predictions_do_not_depend_on_the_batch(points: ServedModel) -> None:
    with torch.inference_mode():
        outputs = points.loaded.model(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]))
    asked = [{"point": b"1,2,3,4"}, {"point": b"1,2"}, {"point": b"nonsense"}, {"point": b"0,0,0,0"}]
    first, short, nonsense, last = points.predict(asked)
    for answer, expected in zip((first, last), points.loaded.task.interpret(outputs), strict=True):
        assert isinstance(answer, dict)
        assert answer["probability"] == pytest.approx(expected["probability"])
    assert isinstance(short, RefusedError)
    assert "a point has 4 numbers" in str(short)
    assert isinstance(nonsense, RefusedError)


def test_model_that_fails_on_one_value_predicts_the_others(
    points: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = points.loaded.model.stages["first"]
    forward = first.forward

    def fail_on_nines(inputs: torch.Tensor) -> torch.Tensor:
        if bool((inputs == 9).any()):
            raise RuntimeError("nine")
        return forward(inputs)

    monkeypatch.setattr(first, "forward", fail_on_nines)
    good, bad = points.predict([{"point": b"1,2,3,4"}, {"point": b"9,9,9,9"}])
    assert isinstance(good, dict)
    assert isinstance(bad, RuntimeError)


def test_long_values_get_a_batch_of_their_own(points: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PointPreprocessing, "length", lambda self, encoded: int(encoded[0]))
    encoded = {index: torch.tensor([length]) for index, length in enumerate([60_000, 10, 20_000, 30])}
    assert list(points._batches(encoded)) == [[1, 3, 2], [0]]


def test_read_bytes_defaults_to_reading_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PointPreprocessing, "read_bytes")
    monkeypatch.setattr(PointPreprocessing, "read", lambda self, source: Path(source).read_bytes())
    assert PointPreprocessing().read_bytes(b"/etc/hostname") == b"/etc/hostname"


def test_served_model_refuses_a_missing_device(tiny: None) -> None:
    loaded = loaded_model({"name": "dense"}, "point", ("near", "far"))
    assert next(ServedModel("points", loaded, "cpu").loaded.model.parameters()).device.type == "cpu"
    with pytest.raises(UserError, match=r"device 'cuda:99' is not on this machine") as caught:
        ServedModel("points", loaded, "cuda:99")
    assert caught.value.problems[0].where == "--device"


def test_fusion_has_an_input_for_each_part(tiny: None) -> None:
    @register("backbone", "other_dense")
    class OtherDense(Dense):
        """The backbone of points, for another field."""

        field = "other"

    parts = {"left": {"name": "dense"}, "right": {"name": "other_dense"}}
    model = ServedModel("both", loaded_model({"name": "fusion", "parts": parts}, "point", ("near", "far")))
    assert model.describe()["inputs"] == {"left": "text/plain", "right": "text/plain"}
    (answer,) = model.predict([{"left": b"1,2,3,4", "right": b"0,0,0,0"}])
    assert isinstance(answer, dict)


# --------------------------------------------------------------------------------------------------------------- server


@pytest.fixture
def server(points: ServedModel) -> Iterator[Running]:
    backbone = {"name": "resnet18", "weights": None, "image_size": 32}
    shapes = ServedModel("shapes", loaded_model(backbone, "image", ("circle", "square", "triangle")))
    with running([points, shapes], limits=Limits(body_bytes=20_000, text_bytes=1_000, seconds=1.0)) as server:
        yield server


def test_server_accepts_json_and_forms(server: Running) -> None:
    status, answer = server.predict("points", POINT)
    assert status == 200
    assert answer["label"] in ("near", "far")
    assert sum(answer["probabilities"].values()) == pytest.approx(1)

    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG")
    status, in_json = server.predict("shapes", {"image": base64.b64encode(file.getvalue()).decode()})
    assert status == 200
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="red.png"\r\n\r\n'
    form = head + file.getvalue() + b"\r\n--x--\r\n"
    sent = {"Content-Type": "multipart/form-data; boundary=x"}
    status, in_form = server.ask("POST", "/models/shapes/predict", form, sent)
    assert status == 200
    assert in_form == in_json
    assert len(in_form["probabilities"]) == 3


def test_server_lists_health_models_and_openapi(server: Running) -> None:
    assert server.ask("GET", "/health") == (200, {"status": "ok", "waiting": {"points": 0, "shapes": 0}})
    _, listed = server.ask("GET", "/models")
    assert [(model["name"], model["inputs"]) for model in listed["models"]] == [
        ("points", {"point": "text/plain"}),
        ("shapes", {"image": "image/*"}),
    ]
    _, described = server.ask("GET", "/openapi.json")
    operation = described["paths"]["/models/shapes/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert set(operation["responses"]) >= {"200", "408", "413", "415", "422", "503"}
    assert operation["responses"]["200"]["content"]["application/json"]["example"]["label"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        (b'{"point": "1,2"}', "application/json", 422, "a point has 4 numbers"),
        (b'{"point": 3}', "application/json", 422, "point is not a string"),
        (b'{"points": "1,2,3,4"}', "application/json", 422, "expected 'point', got 'points'"),
        (b'["1,2,3,4"]', "application/json", 422, "not a JSON object"),
        (b'{"point": ', "application/json", 422, "not valid JSON"),
        (b"[" * 15_000, "application/json", 422, "not valid JSON"),
        (b'{"point": "\\ud800"}', "application/json", 422, "not a valid text"),
        (b"\xff\xfe", "application/json", 422, "not valid JSON"),
        (b'{"point": "' + b"1," * 600 + b'"}', "application/json", 413, "at most 1,000 bytes"),
        (b"1,2,3,4", "text/csv", 415, "expected application/json"),
        (b"1,2,3,4", "multipart/form-data", 400, "boundary"),
        (
            b"--x\r\nContent-Disposition: form-data; name=point\r\n\r\n1",
            "multipart/form-data; boundary=x",
            400,
            "its end",
        ),
        (b"--x\r\n\r\n1\r\n--x--", "multipart/form-data; boundary=x", 400, "no name"),
        (b"\r\n--x" * 2_000, "multipart/form-data; boundary=x", 400, "its end"),
        (b"x" * 20_001, "application/json", 413, "at most 20,000 bytes"),
    ],
)
def test_server_refuses_malformed_and_large_requests(
    points: ServedModel, body: bytes, kind: str, status: int, words: str
) -> None:
    with running([points], limits=Limits(body_bytes=20_000, text_bytes=1_000)) as server:
        refused, answer = server.ask("POST", "/models/points/predict", body, {"Content-Type": kind})
        assert (refused, server.predict("points", POINT)[0]) == (status, 200)
    assert words in answer["detail"]


@pytest.mark.parametrize("size", [0, 1, 2**18 - 3, 2**18, 2**20 + 1])
def test_files_are_the_same_in_json_and_forms(size: int) -> None:
    content = random.Random(0).randbytes(size)
    delimiter = b"--" + b"x" * 70
    head = b'\r\nContent-Type: image/png\r\ncontent-disposition: form-data; name="image"; filename="a;b"\r\n\r\n'
    form = b"preamble\r\n" + delimiter + head + content + b"\r\n" + delimiter + b"--\r\n"
    sent = json.dumps({"image": base64.b64encode(content).decode()}).encode()

    async def read(body: bytes, kind: str) -> dict[str, bytes]:
        async def receive() -> Message:
            return {"type": "http.request", "body": body}

        scope = {"type": "http", "headers": [(b"content-type", kind.encode())]}
        return await read_inputs(Request(scope, receive), {"image": "image/*"}, LIMITS)

    kind = "multipart/form-data; boundary=" + "x" * 70
    assert asyncio.run(read(form, kind)) == asyncio.run(read(sent, "application/json")) == {"image": content}


def test_server_opens_no_path_of_a_request(server: Running, tmp_path: Path) -> None:
    (tmp_path / "point.txt").write_text("1,2,3,4", encoding="utf-8")
    assert server.predict("points", {"point": str(tmp_path / "point.txt")})[0] == 422
    status, answer = server.predict("shapes", {"image": base64.b64encode(b"/etc/passwd").decode()})
    assert status == 422
    assert "not an image" in answer["detail"]


def receive(connection: socket.socket) -> bytes:
    """Read until the server closes."""
    received = b""
    while some := connection.recv(65_536):
        received += some
    return received


def test_server_refuses_slow_and_endless_requests(server: Running) -> None:
    head = b"POST /models/points/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    requests = {
        "silent": b"",
        "half a head": head,
        "half a body": head + b'Content-Length: 50\r\n\r\n{"point',
        "too long, as it says": head + b"Content-Length: 99999999999\r\n\r\n",
        "too long": head + b"Transfer-Encoding: chunked\r\n\r\n" + b"4e20\r\n" + b" " * 20_000 + b"\r\n1\r\n \r\n",
    }
    started = time.monotonic()
    open_ = {name: socket.create_connection(("127.0.0.1", server.port), timeout=20) for name in requests}
    try:
        for name, sent in requests.items():
            open_[name].sendall(sent)
        assert server.predict("points", POINT)[0] == 200
        statuses = {name: receive(connection)[9:12] for name, connection in open_.items()}
    finally:
        for connection in open_.values():
            connection.close()
    assert statuses == {
        "silent": b"",
        "half a head": b"",
        "half a body": b"408",
        "too long, as it says": b"413",
        "too long": b"413",
    }
    assert time.monotonic() - started < 15
    assert server.predict("points", POINT)[0] == 200


def test_simultaneous_requests_share_batches(points: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    predict = points.predict
    monkeypatch.setattr(points, "predict", lambda requests: (sizes.append(len(requests)), predict(requests))[1])
    sources = [f"{i},0,{-i},1" for i in range(24)]
    expected = [a["probabilities"] for a in predict([{"point": source.encode()} for source in sources])]  # type: ignore[index]
    with (
        running([points], batching=Batching(max_size=8, wait_seconds=0.2)) as server,
        ThreadPoolExecutor(12) as threads,
    ):
        given = list(threads.map(lambda source: server.predict("points", {"point": source}), sources))
    assert [status for status, _ in given] == [200] * 24
    for (_, one), probabilities in zip(given, expected, strict=True):
        assert one["probabilities"] == pytest.approx(probabilities, rel=1e-4)
    assert sum(sizes) == 24
    assert max(sizes) <= 8
    assert len(sizes) < 24


def test_server_refuses_requests_beyond_max_waiting(points: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    started, proceed = threading.Event(), threading.Event()
    predict = points.predict
    monkeypatch.setattr(points, "predict", lambda requests: (started.set(), proceed.wait(20), predict(requests))[2])
    with running([points], batching=Batching(max_size=1, max_waiting=1)) as server, ThreadPoolExecutor(2) as threads:
        try:
            in_progress = threads.submit(server.predict, "points", POINT)
            assert started.wait(20)
            waiting = threads.submit(server.predict, "points", POINT)
            until = time.monotonic() + 20
            while server.ask("GET", "/health")[1]["waiting"]["points"] == 0:
                assert time.monotonic() < until
            status, refused = server.predict("points", POINT)
        finally:
            proceed.set()
        assert (status, refused["detail"]) == (503, "too many requests are waiting; try again in a second")
        assert in_progress.result()[0] == waiting.result()[0] == 200


def test_server_refuses_other_host_names(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /models HTTP/1.1\r\nHost: rebound.example\r\nConnection: close\r\n\r\n")
        assert receive(connection)[9:12] == b"400"


def test_server_refuses_forms_of_other_sites(server: Running) -> None:
    body = json.dumps(POINT).encode()
    json_type = {"Content-Type": "application/json"}
    for origin, expected in ((f"http://127.0.0.1:{server.port}", 200), ("https://evil.example", 403), ("null", 403)):
        status, answer = server.ask("POST", "/models/points/predict", body, json_type | {"Origin": origin})
        assert status == expected, (origin, answer)


def small_file(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """Return a small PNG file that announces 60 million pixels."""
    content = bytearray(small_file("PNG"))
    content[16:24] = struct.pack(">II", 10_000, 6_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(), "expected at most 50 million pixels, got 10000 x 6000 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n", "not an image that can be read"),
        (small_file("ICO"), "not an image that can be read"),
    ],
    ids=["bomb", "eps", "ico"],
)
def test_server_refuses_images_of_other_formats_and_huge_ones(server: Running, content: bytes, message: str) -> None:
    status, answer = server.predict("shapes", {"image": base64.b64encode(content).decode()})
    assert status == 422
    assert message in answer["detail"]


def test_many_scans_count_as_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    progressive = small_file("JPEG", progressive=True)
    assert open_upload(progressive, "x").size == (64, 48)
    monkeypatch.setattr("transfer_vision.images.decoding.MAX_UPLOAD_SCANNED_PIXELS", 64 * 48 * 5)
    with pytest.raises(ValueError, match=r"64 x 48 pixels in \d+ scans"):
        open_upload(progressive, "x")
    assert open_upload(small_file("JPEG"), "x").size == (64, 48)


def test_refused_requests_are_freed_at_once(server: Running) -> None:
    """No reference cycle keeps a decoded image until the next garbage collection."""
    backbone = {"name": "resnet18", "weights": None, "image_size": 32}
    model = ServedModel("shapes", loaded_model(backbone, "image", ("circle", "square")))
    truncated = small_file("PNG")[:-30]
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            (result,) = model.predict([{"image": truncated}])
            assert isinstance(result, RefusedError)
        del result
        images = [one for one in gc.get_objects() if issubclass(type(one), Image.Image) and one.size == (64, 48)]
        assert images == []
    finally:
        gc.enable()


def test_page_loads_nothing_from_other_servers(server: Running) -> None:
    import urllib.request

    for path in ("/", "/style.css", "/script.js"):
        with urllib.request.urlopen(server.address + path, timeout=20) as page:
            assert "default-src 'none'" in page.headers["Content-Security-Policy"]
            assert not re.search(r"(?:https?:)?//[a-z]", page.read().decode())


# ----------------------------------------------------------------------------------------------------------------- runs


def test_runs_are_named_by_folder_or_explicitly(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert name_runs([str(first), f"other={second}"]) == {"run": str(first), "other": str(second)}
    with pytest.raises(UserError, match="two models have the name 'run'"):
        name_runs([str(first), str(second)])
    with pytest.raises(UserError, match="invalid model name"):
        name_runs(["a/b c"])


def test_response_is_sent_without_nagle_delay() -> None:
    with listen("127.0.0.1", 0) as server, socket.create_connection(server.getsockname()):
        connection, _ = server.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.8.8.8")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org")))


def test_serve_finishes_requests_in_progress_on_sigterm(
    config: dict[str, Any], tmp_path: Path, forked_python: ForkedPython
) -> None:
    run = transfer.run(config, ["train.phases=[{epochs: 1}]"], output=tmp_path)
    arguments = ["serve", f"points={run.folder}", "--port", "0", "--wait-milliseconds", "1000"]
    output, errors = tmp_path / "output", tmp_path / "errors"
    output.touch()
    environment = os.environ | {"COLUMNS": "200"}
    process = forked_python.fork(
        ["-c", WITH_POINTS, *arguments], tmp_path, environment, streams=(os.devnull, output, errors)
    )
    try:
        deadline = time.monotonic() + 60
        while not output.read_text().endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.01)
        match = re.match(r"http://127\.0\.0\.1:(\d+)/models/points/predict\n", output.read_text())
        assert match
        server = Running(int(match[1]))
        with ThreadPoolExecutor(1) as thread:
            in_progress = thread.submit(server.predict, "points", POINT)
            time.sleep(0.4)  # the batch waits for one second
            os.kill(process, signal.SIGTERM)
            status, answer = in_progress.result()
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        ended = forked_python.wait(process)
    assert (ended, errors.read_text()) == (143, "")
    assert status == 200
    assert answer["label"] in ("near", "far")
