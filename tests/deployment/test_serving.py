"""Batches, limits, and a server that answers over a socket."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")

from conftest import PointPreprocessing
from serving_cases import Running, loaded_model, running

import transfer
from transfer import UserError
from transfer.deployment.serving.app import Batching
from transfer.deployment.serving.batching import Batcher, BusyError
from transfer.deployment.serving.models import RefusedError, ServedModel
from transfer.deployment.serving.reading import Limits
from transfer.deployment.serving.server import is_loopback, listen, name_runs

POINT = {"point": "1,2,3,4"}
WITH_POINTS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from conftest import Dense
from transfer import register
from transfer.cli.app import main
register("backbone", "dense")(Dense)
main()
"""


# -------------------------------------------------------------------------------------------------------------- batches


def batched(items: Sequence[int], **options: Any) -> tuple[list[Any], list[list[int]]]:
    """Submit items at once; return what each got, and the batches."""
    batches: list[list[int]] = []

    def work(batch: Sequence[int]) -> list[int | Exception]:
        batches.append(list(batch))
        return [10 * item if item >= 0 else ValueError("negative") for item in batch]

    async def submit() -> list[Any]:
        settings = {"most": 4, "wait_seconds": 0.0, "most_waiting": 100} | options
        async with Batcher(work, **settings) as batcher:
            return await asyncio.gather(*map(batcher.submit, items), return_exceptions=True)

    return asyncio.run(submit()), batches


def test_what_comes_together_goes_together_in_order() -> None:
    results, batches = batched(range(10))
    assert results == [10 * item for item in range(10)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_error_of_one_is_not_that_of_the_others() -> None:
    results, _ = batched([1, -1, 2])
    assert results[::2] == [10, 20]
    assert str(results[1]) == "negative"


def test_more_than_may_wait_are_refused() -> None:
    results, _ = batched(range(5), most_waiting=3)
    assert results[:3] == [0, 10, 20]
    assert all(isinstance(result, BusyError) for result in results[3:])


def test_work_that_fails_is_told_to_all_and_the_next_batch_is_worked_on() -> None:
    def work(batch: Sequence[int]) -> list[int | Exception]:
        if 0 in batch:
            raise RuntimeError("broken")
        return list(batch)

    async def submit() -> list[Any]:
        async with Batcher(work, most=2, wait_seconds=0.0, most_waiting=9) as batcher:
            return await asyncio.gather(*map(batcher.submit, range(4)), return_exceptions=True)

    first, second, *others = asyncio.run(submit())
    assert str(first) == str(second) == "broken"
    assert others == [2, 3]


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def points(tiny: None) -> ServedModel:
    return ServedModel("points", loaded_model({"name": "dense"}, "point", ("near", "far")))


def test_answers_are_those_of_predict_whatever_they_are_batched_with(points: ServedModel) -> None:
    with torch.inference_mode():
        outputs = points.loaded.model(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]))
    asked = [{"point": b"1,2,3,4"}, {"point": b"1,2"}, {"point": b"nonsense"}, {"point": b"0,0,0,0"}]
    first, short, nonsense, last = points.answer(asked)
    for answer, expected in zip((first, last), points.loaded.task.interpret(outputs), strict=True):
        assert isinstance(answer, dict)
        assert answer["probability"] == pytest.approx(expected["probability"])
    assert isinstance(short, RefusedError)
    assert "a point has 4 numbers" in str(short)
    assert isinstance(nonsense, RefusedError)


def test_a_model_that_fails_on_one_answers_the_others(points: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = points.loaded.model.forward

    def fail_on_nines(inputs: torch.Tensor) -> torch.Tensor:
        if bool((inputs == 9).any()):
            raise RuntimeError("nine")
        return forward(inputs)

    monkeypatch.setattr(points.loaded.model, "forward", fail_on_nines)
    good, bad = points.answer([{"point": b"1,2,3,4"}, {"point": b"9,9,9,9"}])
    assert isinstance(good, dict)
    assert isinstance(bad, RuntimeError)


def test_long_values_do_not_make_a_whole_batch_as_long(points: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PointPreprocessing, "length", lambda self, encoded: int(encoded[0]))
    encoded = {place: torch.tensor([length]) for place, length in enumerate([60_000, 10, 20_000, 30])}
    assert list(points._batches(encoded)) == [[1, 3, 2], [0]]


def test_by_default_content_is_read_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PointPreprocessing, "read_bytes")
    monkeypatch.setattr(PointPreprocessing, "read", lambda self, source: Path(source).read_bytes())
    assert PointPreprocessing().read_bytes(b"/etc/hostname") == b"/etc/hostname"


def test_a_fusion_takes_an_input_for_each_part(tiny: None) -> None:
    parts = {"left": {"name": "dense"}, "right": {"name": "dense"}}
    model = ServedModel("both", loaded_model({"name": "fusion", "parts": parts}, "point", ("near", "far")))
    assert model.describe()["inputs"] == {"left": "text/plain", "right": "text/plain"}
    (answer,) = model.answer([{"left": b"1,2,3,4", "right": b"0,0,0,0"}])
    assert isinstance(answer, dict)


# --------------------------------------------------------------------------------------------------------------- server


@pytest.fixture
def server(points: ServedModel) -> Iterator[Running]:
    pictures = {"name": "resnet18", "weights": None, "image_size": 32}
    shapes = ServedModel("shapes", loaded_model(pictures, "image", ("circle", "square", "triangle")))
    with running([points, shapes], limits=Limits(body_bytes=20_000, text_bytes=1_000, seconds=1.0)) as server:
        yield server


def test_several_models_answer_in_json_and_forms(server: Running) -> None:
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


def test_health_models_and_openapi(server: Running) -> None:
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
        (b'{"point": 3}', "application/json", 422, "point is no string"),
        (b'{"points": "1,2,3,4"}', "application/json", 422, "send 'point'"),
        (b'["1,2,3,4"]', "application/json", 422, "no JSON object"),
        (b'{"point": ', "application/json", 422, "no JSON"),
        (b"[" * 15_000, "application/json", 422, "no JSON"),
        (b'{"point": "\\ud800"}', "application/json", 422, "not a text"),
        (b"\xff\xfe", "application/json", 422, "no JSON"),
        (b'{"point": "' + b"1," * 600 + b'"}', "application/json", 413, "1,000 are the most"),
        (b"1,2,3,4", "text/csv", 415, "send application/json"),
        (b"1,2,3,4", "multipart/form-data", 400, "boundary"),
        (b"x" * 20_001, "application/json", 413, "at most 20,000 bytes"),
    ],
)
def test_what_is_malformed_or_huge_is_refused_in_words(
    points: ServedModel, body: bytes, kind: str, status: int, words: str
) -> None:
    with running([points], limits=Limits(body_bytes=20_000, text_bytes=1_000)) as server:
        refused, answer = server.ask("POST", "/models/points/predict", body, {"Content-Type": kind})
        assert (refused, server.predict("points", POINT)[0]) == (status, 200)
    assert words in answer["detail"]


def test_a_path_is_never_opened(server: Running, tmp_path: Path) -> None:
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


def test_slow_and_endless_requests_are_refused_and_do_not_stop_the_others(server: Running) -> None:
    head = b"POST /models/points/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    requests = {
        "ignore_events": b"",
        "half a head": head,
        "half a body": head + b'Content-Length: 50\r\n\r\n{"point',
        "too long, as it says": head + b"Content-Length: 99999999999\r\n\r\n",
        "too long": head + b"Transfer-Encoding: chunked\r\n\r\n" + b"4e20\r\n" + b" " * 20_000 + b"\r\n1\r\n \r\n",
    }
    began = time.monotonic()
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
        "ignore_events": b"",
        "half a head": b"",
        "half a body": b"408",
        "too long, as it says": b"413",
        "too long": b"413",
    }
    assert time.monotonic() - began < 15
    assert server.predict("points", POINT)[0] == 200


def test_simultaneous_requests_share_batches_and_get_their_own_answers(
    points: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    answer = points.answer
    monkeypatch.setattr(points, "answer", lambda requests: (sizes.append(len(requests)), answer(requests))[1])
    sources = [f"{i},0,{-i},1" for i in range(24)]
    expected = [a["probabilities"] for a in answer([{"point": source.encode()} for source in sources])]  # type: ignore[index]
    with running([points], batching=Batching(most=8, wait_seconds=0.2)) as server, ThreadPoolExecutor(12) as threads:
        given = list(threads.map(lambda source: server.predict("points", {"point": source}), sources))
    assert [status for status, _ in given] == [200] * 24
    for (_, one), probabilities in zip(given, expected, strict=True):
        assert one["probabilities"] == pytest.approx(probabilities, rel=1e-4)
    assert sum(sizes) == 24
    assert max(sizes) <= 8
    assert len(sizes) < 24


def test_what_cannot_wait_is_told_to_come_again(points: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    answer = points.answer
    monkeypatch.setattr(points, "answer", lambda requests: (begun.set(), go_on.wait(20), answer(requests))[2])
    with running([points], batching=Batching(most=1, most_waiting=1)) as server, ThreadPoolExecutor(2) as threads:
        try:
            under_way = threads.submit(server.predict, "points", POINT)
            assert begun.wait(20)
            waiting = threads.submit(server.predict, "points", POINT)
            until = time.monotonic() + 20
            while server.ask("GET", "/health")[1]["waiting"]["points"] == 0:
                assert time.monotonic() < until
            status, refused = server.predict("points", POINT)
        finally:
            go_on.set()
        assert (status, refused["detail"]) == (503, "too many requests wait; try again in a second")
        assert under_way.result()[0] == waiting.result()[0] == 200


def test_a_page_of_another_site_is_refused(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /models HTTP/1.1\r\nHost: rebound.example\r\nConnection: close\r\n\r\n")
        assert receive(connection)[9:12] == b"400"


def test_the_page_may_load_nothing_from_elsewhere(server: Running) -> None:
    import urllib.request

    for path in ("/", "/style.css", "/script.js"):
        with urllib.request.urlopen(server.address + path, timeout=20) as page:
            assert "default-src 'none'" in page.headers["Content-Security-Policy"]
            assert not re.search(r"(?:https?:)?//[a-z]", page.read().decode())


# ----------------------------------------------------------------------------------------------------------------- runs


def test_runs_are_named_by_their_folders_or_by_hand(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert name_runs([str(first), f"other={second}"]) == {"run": str(first), "other": str(second)}
    with pytest.raises(UserError, match="two models are called 'run'"):
        name_runs([str(first), str(second)])
    with pytest.raises(UserError, match="cannot be called"):
        name_runs(["a/b c"])


def test_an_answer_does_not_wait_for_the_asker_to_acknowledge_its_beginning() -> None:
    with listen("127.0.0.1", 0) as server, socket.create_connection(server.getsockname()):
        connection, _ = server.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_only_loopback_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.8.8.8")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org")))


def test_the_command_answers_and_ends_with_143_when_what_is_under_way_is_answered(
    config: dict[str, Any], tmp_path: Path
) -> None:
    run = transfer.run(config, ["train.phases=[{epochs: 1}]"], output=tmp_path)
    arguments = ["serve", f"points={run.folder}", "--port", "0", "--wait-milliseconds", "1000"]
    command = [sys.executable, "-u", "-c", WITH_POINTS, *arguments]
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        try:
            found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/models/points/predict\n", process.stdout.readline())
            assert found
            server = Running(int(found[1]))
            with ThreadPoolExecutor(1) as thread:
                under_way = thread.submit(server.predict, "points", POINT)
                time.sleep(0.4)  # of the second for which its batch waits
                process.send_signal(signal.SIGTERM)
                status, answer = under_way.result()
            ended = process.wait(60)
        finally:
            process.kill()
        assert process.stderr
        told = process.stderr.read()
    assert (ended, told) == (143, "")
    assert status == 200
    assert answer["label"] in ("near", "far")
