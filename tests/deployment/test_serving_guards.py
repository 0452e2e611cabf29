"""Guards of the server: deadlines, hosts, tokens, limits on connections and memory, logs, metrics and reloads."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from conftest import PointPreprocessing
from fastapi import FastAPI, HTTPException
from safetensors import SafetensorError
from serving_cases import Running, loaded_model, running, running_app

from transfer import UserError
from transfer.cli import deployment_commands
from transfer.deployment.serving import decoders as decoders_module
from transfer.deployment.serving.app import make_app, replace_models
from transfer.deployment.serving.batching import Batcher, Batching, BusyError
from transfer.deployment.serving.decoders import Decoders, pack, unpack
from transfer.deployment.serving.guards import RateLimit, Tokens
from transfer.deployment.serving.models import RefusedError, ServedModel
from transfer.deployment.serving.reading import Intake, Limits
from transfer.deployment.serving.server import Publication, allowed_hosts, listen_on_path, read_tokens

POINT = {"point": "1,2,3,4"}


@pytest.fixture
def points(tiny: None) -> ServedModel:
    return ServedModel("points", loaded_model({"name": "dense"}, "point", ("near", "far")), version="one")


@pytest.fixture
def files(points: ServedModel, monkeypatch: pytest.MonkeyPatch) -> ServedModel:
    """A model of files."""
    monkeypatch.setattr(PointPreprocessing, "media_type", "application/x-point")
    return ServedModel("points", points.loaded)


def _crash(pickled_encoder: bytes, request: dict[str, bytes]) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def ask_app(
    app: FastAPI, method: str, path: str, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Call an application without a server; return the status, headers and body."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"host": "localhost"} | (headers or {})
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("10.0.0.1", 1),
        "server": ("localhost", 80),
    }
    asyncio.run(app(scope, receive, send))
    start, *bodies = sent
    answered = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], answered, b"".join(message.get("body", b"") for message in bodies)


# ----------------------------------------------------------------------------------------------- deadlines and threads


def test_batcher_drops_items_of_cancelled_callers() -> None:
    batches: list[list[int]] = []

    def work(batch: Sequence[int]) -> list[int | Exception]:
        batches.append(list(batch))
        time.sleep(0.05)
        return list(batch)

    async def submit() -> None:
        async with Batcher(work, Batching(max_size=1, wait_seconds=0.0, max_waiting=2)) as batcher:
            first = batcher.submit(0)
            await asyncio.sleep(0.02)
            waiting = [batcher.submit(item) for item in (1, 2)]
            waiting[0].cancel()
            await asyncio.sleep(0)
            assert batcher.waiting == 1  # its place is free again
            assert await asyncio.gather(first, waiting[1], batcher.submit(3)) == [0, 2, 3]

    asyncio.run(submit())
    assert batches == [[0], [2], [3]]


def test_request_over_its_deadline_gets_504(points: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    proceed = threading.Event()
    predict = points.predict
    monkeypatch.setattr(points, "predict", lambda requests: (proceed.wait(20), predict(requests))[1])
    with running([points], limits=Limits(answer_seconds=0.2)) as server:
        try:
            status, answer = server.predict("points", POINT)
            assert (status, answer["detail"]) == (504, "the request was not answered within 0.2 seconds")
            assert server.ask("GET", "/health/live")[0] == 200
            time.sleep(0.1)  # the batch is a few milliseconds younger than the request
            assert server.ask("GET", "/health/ready") == (503, {"status": "stuck", "stuck": ["points"]})
        finally:
            proceed.set()


def test_request_of_a_disconnected_client_never_reaches_the_model(
    points: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, proceed = threading.Event(), threading.Event()
    predict, predicted = points.predict, []

    def slow(requests: Sequence[Any]) -> Any:
        predicted.extend(request["point"] for request in requests)
        started.set()
        proceed.wait(20)
        return predict(requests)

    monkeypatch.setattr(points, "predict", slow)

    def wait_until_waiting(server: Running, count: int) -> None:
        until = time.monotonic() + 20
        while server.ask("GET", "/health")[1]["waiting"]["points"] != count:
            assert time.monotonic() < until

    with running([points]) as server, ThreadPoolExecutor(1) as thread:
        try:
            first = thread.submit(server.predict, "points", POINT)
            assert started.wait(20)
            gone = HTTPConnection("127.0.0.1", server.port)
            body = json.dumps({"point": "0,0,0,0"})
            gone.request("POST", "/models/points/predict", body, {"Content-Type": "application/json"})
            wait_until_waiting(server, 1)
            gone.close()
            wait_until_waiting(server, 0)
        finally:
            proceed.set()
        assert first.result()[0] == 200
    assert predicted == [b"1,2,3,4"]


def test_slow_file_stalls_no_other_request(files: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    started, proceed = threading.Event(), threading.Event()
    encode = files.encode

    def slow(request: Any) -> Any:
        if request["point"] == b"9,9,9,9":
            started.set()
            proceed.wait(20)
        return encode(request)

    monkeypatch.setattr(files, "encode", slow)
    with running([files]) as server, ThreadPoolExecutor(1) as thread:
        try:
            large = thread.submit(server.predict, "points", {"point": "OSw5LDksOQ=="})
            assert started.wait(20)
            assert server.predict("points", {"point": "MSwyLDMsNA=="})[0] == 200
            assert server.ask("GET", "/health")[1]["waiting"] == {"points": 1}
        finally:
            proceed.set()
        assert large.result()[0] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="processes are copied only on Linux")
def test_processes_decode_like_the_model(points: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PointPreprocessing, "media_type", "application/x-point")
    files = ServedModel("points", points.loaded)
    decoders = Decoders(processes=True)

    async def decode() -> tuple[Any, Any]:
        right, wrong = {"point": b"1,2,3,4"}, {"point": b"1,2"}
        decoded, refused = await asyncio.gather(decoders.encode(files, right), decoders.encode(files, wrong))
        return decoded, refused

    try:
        decoded, refused = asyncio.run(decode())
    finally:
        decoders.close()
    assert list(decoded) == [1, 2, 3, 4]
    assert isinstance(refused, RefusedError)
    assert "a point has 4 numbers" in str(refused)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are copied only on Linux")
def test_crashed_decoder_is_replaced(files: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders_module, "_encode", _crash)
    monkeypatch.setattr(decoders_module, "_DECODERS", 1)
    decoders = Decoders(processes=True)
    started = decoders_module._Process
    methods: list[str] = []

    def start(method: Any) -> Any:
        methods.append(method)
        return started("fork")  # a fresh process would need seconds

    monkeypatch.undo()
    monkeypatch.setattr(PointPreprocessing, "media_type", "application/x-point")
    monkeypatch.setattr(decoders_module, "_Process", start)
    try:
        with pytest.raises(BusyError):
            asyncio.run(decoders.encode(files, {"point": b"1,2,3,4"}))
        assert list(asyncio.run(decoders.encode(files, {"point": b"1,2,3,4"}))) == [1, 2, 3, 4]
    finally:
        decoders.close()
    assert methods == ["spawn"]


def test_decoders_answer_without_pickles(files: ServedModel) -> None:
    tensor, other = torch.arange(4, dtype=torch.uint8), torch.zeros(2, 3)
    assert torch.equal(unpack(pack(tensor)), tensor)
    assert [part.shape for part in unpack(pack((tensor, other)))] == [(4,), (2, 3)]
    assert str(unpack(pack(RefusedError("no image")))) == "no image"
    executed = b"cos\nsystem\n(S'exit 1'\ntR."
    for answer in (executed, b"T" + executed, b"T" + pack((tensor, other))[1:], b"", b"R\xff"):
        with pytest.raises((ValueError, SafetensorError)):
            unpack(answer)
    assert pack(["other", "objects"]) == b"U"


# ------------------------------------------------------------------------------------------------- the app's own guards


def test_app_refuses_other_hosts_but_answers_probes(points: ServedModel) -> None:
    app = make_app([points])
    assert ask_app(app, "GET", "/models", {"host": "rebound.example"})[0] == 400
    assert ask_app(app, "GET", "/health/live", {"host": "10.1.2.3"})[0] == 200
    published = make_app([points], hosts=["models.example"])
    assert ask_app(published, "GET", "/models", {"host": "models.example"})[0] == 200


def test_app_accepts_only_its_tokens(points: ServedModel) -> None:
    tokens = Tokens(["secret"])
    app = make_app([points], tokens=tokens)
    status, headers, body = ask_app(app, "GET", "/models")
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert b"Authorization: Bearer TOKEN" in body
    assert ask_app(app, "GET", "/models", {"authorization": "Bearer secre"})[0] == 401
    assert ask_app(app, "GET", "/models", {"authorization": "Basic secret"})[0] == 401
    assert ask_app(app, "GET", "/models", {"authorization": "Bearer secret"})[0] == 200
    assert ask_app(app, "GET", "/health/ready")[0] == 200
    tokens.replace(Tokens(["other"]))
    assert ask_app(app, "GET", "/models", {"authorization": "Bearer secret"})[0] == 401


def test_app_answers_head_with_request_ids(points: ServedModel) -> None:
    app = make_app([points])
    status, headers, body = ask_app(app, "HEAD", "/health", {"x-request-id": "abc-1"})
    assert (status, headers["x-request-id"], body) == (200, "abc-1", b"")
    assert int(headers["content-length"]) > 0
    forged = ask_app(app, "GET", "/health", {"x-request-id": "a b"})[1]["x-request-id"]
    assert len(forged) == 32


def test_access_log_escapes_paths(points: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "transfer.access"):
        ask_app(make_app([points], access_log="json"), "GET", "/health?token=secret".partition("?")[0])
        ask_app(make_app([points], access_log="text"), "GET", "/a\nb")
    entry = json.loads(caplog.messages[0])
    assert (entry["peer"], entry["status"], entry["path"]) == ("10.0.0.1", 200, "/health")
    assert '"GET /a\\nb" 404 ' in caplog.messages[1]
    assert "\n" not in caplog.messages[1]


def test_app_counts_requests_by_route(points: ServedModel) -> None:
    app = make_app([points])
    ask_app(app, "GET", "/models")
    ask_app(app, "GET", "/invented")
    lines = ask_app(app, "GET", "/metrics")[2].decode().splitlines()
    assert 'transfer_requests_total{path="/models",status="200"} 1.0' in lines
    assert 'transfer_requests_total{path="other",status="404"} 1.0' in lines
    assert 'transfer_model_info{model="points",version="one"} 1.0' in lines


def test_reload_uses_the_new_model_and_refuses_other_inputs(points: ServedModel) -> None:
    app = make_app([points])
    newer = ServedModel("points", loaded_model({"name": "dense"}, "point", ("close", "far")), version="two")
    replace_models(app, [newer])
    listed = json.loads(ask_app(app, "GET", "/models")[2])["models"][0]
    assert (listed["version"], listed["classes"]) == ("two", ["close", "far"])
    assert 'version="one"' not in ask_app(app, "GET", "/metrics")[2].decode()
    renamed = ServedModel("others", newer.loaded)
    with pytest.raises(UserError, match="model others has other inputs"):
        replace_models(app, [renamed])


def test_response_names_the_version_of_its_model(points: ServedModel) -> None:
    with running([points]) as server:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
        sent = {"Content-Type": "application/json"}
        connection.request("POST", "/models/points/predict", json.dumps(POINT), sent)
        assert connection.getresponse().headers["X-Model-Version"] == "one"
        connection.close()


def test_reload_under_load_loses_no_request(points: ServedModel) -> None:
    newer = ServedModel("points", loaded_model({"name": "dense"}, "point", ("near", "far")), version="two")
    with torch.no_grad():
        for parameter in newer.loaded.model.parameters():
            parameter.neg_()
    expected = [json.dumps(model.predict([{"point": b"1,2,3,4"}])[0]) for model in (points, newer)]
    assert expected[0] != expected[1]
    replaced = threading.Event()

    def ask(server: Running) -> list[str]:
        answers = []
        while not replaced.is_set() or len(answers) < 20:
            status, answer = server.predict("points", POINT)
            assert status == 200
            answers.append(json.dumps(answer))
        return [*answers, json.dumps(server.predict("points", POINT)[1])]

    app = make_app([points], hosts=["127.0.0.1"])
    with running_app(app) as server, ThreadPoolExecutor(4) as threads:
        clients = [threads.submit(ask, server) for _ in range(4)]
        time.sleep(0.1)
        replace_models(app, [newer])
        replaced.set()
        for client in clients:
            answers = client.result()
            # A batch has the size of the moment, which may change the last digits.
            kinds = [min((0, 1), key=lambda kind: _distance(answer, expected[kind])) for answer in answers]
            assert (kinds, kinds[0], kinds[-1]) == (sorted(kinds), 0, 1)


def _distance(answer: str, other: str) -> float:
    probabilities = [json.loads(one)["probabilities"]["near"] for one in (answer, other)]
    return abs(float(probabilities[0] - probabilities[1]))


@pytest.mark.parametrize(("trusted", "peer"), [((), "127.0.0.1"), (("127.0.0.0/8",), "203.0.113.7")])
def test_forwarded_address_counts_only_from_a_trusted_proxy(
    points: ServedModel, caplog: pytest.LogCaptureFixture, trusted: tuple[str, ...], peer: str
) -> None:
    caplog.set_level(logging.INFO, "transfer.access")
    with running([points], publication=Publication(trusted_proxies=trusted, access_log="json")) as server:
        # The first address was sent by the client itself.
        server.ask("GET", "/models", headers={"X-Forwarded-For": "198.51.100.1, 203.0.113.7"})
    (line,) = [json.loads(record.getMessage()) for record in caplog.records if record.name == "transfer.access"]
    assert line["peer"] == peer


# --------------------------------------------------------------------------------------------------------------- limits


def test_bodies_of_all_requests_are_limited_together() -> None:
    intake = Intake(Limits(body_bytes=10, requests=2))
    with intake.request() as first, intake.request() as second:
        with pytest.raises(HTTPException, match="too many requests are in progress"), intake.request():
            pass
        first(100)
        second(60)
        with pytest.raises(HTTPException, match="too large together"):
            second(1)
    assert (intake.requests, intake.body_bytes) == (0, 0)


def test_large_json_of_many_values_is_refused_before_it_is_parsed(
    points: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: (parsed.append(len(text)), loads(text))[1])
    with running([points]) as server:
        lists = b'{"point": [' + b"[]," * 50_000 + b"0]}"
        kind = {"Content-Type": "application/json"}
        assert server.ask("POST", "/models/points/predict", lists, kind)[0] == 422
        assert max(parsed) < 1000  # the answer, by this test
        blanks = b'{"point": "1,2,3,4' + b" " * 70_000 + b'"}'
        assert server.ask("POST", "/models/points/predict", blanks, kind)[0] == 200


@pytest.mark.parametrize("sent", [b"", b"GET /models HTTP/1.1\r\nHost: x\r\n"], ids=["idle", "half a head"])
def test_open_connections_do_not_silence_health(
    points: ServedModel, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("transfer.deployment.serving.protocol.max_connections", lambda: 8)
    with running([points]) as server:
        opened = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(30)]
        for connection in opened:
            connection.sendall(sent)
        assert server.ask("GET", "/health")[0] == 200
        for connection in opened:
            connection.close()


def _exchange(server: Running, sent: bytes) -> bytes:
    """Send bytes, and return everything that the server sends until it closes the connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(sent)
        while some := connection.recv(65_536):
            received += some
    return received


_START = b"POST /models/points/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
_BODY = json.dumps(POINT).encode()
_LENGTH = b"Content-Length: %d\r\n" % len(_BODY)
_CHUNKS = b"%x\r\n%s\r\n0\r\n" % (len(_BODY), _BODY)
_CLOSE = b"Connection: close\r\n"


def test_server_refuses_requests_that_proxies_may_read_differently(points: ServedModel) -> None:
    hidden = b"GET /models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n"
    heads = {
        "length and chunks": _LENGTH + chunked,
        "two lengths": _LENGTH + b"Content-Length: 0\r\n",
        "list of lengths": b"Content-Length: 0, 5\r\n",
        "signed length": b"Content-Length: +5\r\n",
        "other encoding": b"Transfer-Encoding: xchunked\r\n",
        "blank before the colon": b"Transfer-Encoding : chunked\r\n",
        "folded header": b"Transfer-Encoding:\r\n chunked\r\n",
        "bare return": b"X: a\rContent-Length: 5\r\n",
        "null": b"X: a\0b\r\n",
    }
    requests = {name: _START + head + b"\r\n" + _CHUNKS + b"\r\n" + hidden for name, head in heads.items()}
    body = _START + chunked + b"\r\n"
    requests["size with prefix"] = body + b"0x5\r\nabcde\r\n0\r\n\r\n" + hidden
    requests["signed size"] = body + b"+5\r\nabcde\r\n0\r\n\r\n" + hidden
    requests["longer chunk"] = body + b"1\r\nabcde\r\n0\r\n\r\n" + hidden
    with running([points]) as server:
        for name, sent in requests.items():
            received = _exchange(server, sent)
            assert received.startswith(b"HTTP/1.1 400"), (name, received)
            assert received.count(b"HTTP/1.1") == 1, (name, received)


def test_server_limits_heads_and_pipelined_requests(points: ServedModel) -> None:
    with running([points]) as server:
        endless = _exchange(server, b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000)
        pipelined = _exchange(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        few = _exchange(
            server, (_START + _LENGTH + b"\r\n" + _BODY) * 3 + b"GET /health HTTP/1.1\r\nHost: x\r\n" + _CLOSE + b"\r\n"
        )
    assert b"head of the request is too large" in endless
    assert b"400" in pipelined
    assert pipelined.count(b"HTTP/1.1") < 12
    assert few.count(b"HTTP/1.1 200") == 4


def test_trailers_are_no_headers_and_upgrades_are_ignored(points: ServedModel) -> None:
    app = make_app([points], hosts=["127.0.0.1"], tokens=Tokens(["secret"]))
    chunked = _START + b"Transfer-Encoding: chunked\r\n" + _CLOSE
    token = b"Authorization: Bearer secret\r\n"
    with running_app(app) as server:
        assert _exchange(server, chunked + b"\r\n" + _CHUNKS + token + b"\r\n").startswith(b"HTTP/1.1 401")
        assert _exchange(server, chunked + token + b"\r\n" + _CHUNKS + b"\r\n").startswith(b"HTTP/1.1 200")
        upgrade = (
            _START + token + _LENGTH + b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n\r\n" + _BODY
        )
        assert _exchange(server, upgrade).startswith(b"HTTP/1.1 200")


def test_rate_limit_counts_suppressed_records(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("transfer.deployment.serving.guards.time.monotonic", lambda: now[0])
    limit = RateLimit(records=2, seconds=60)

    def passes() -> str | None:
        record = logging.LogRecord("x", logging.WARNING, "", 0, "bad request %s", ("1",), None)
        return record.getMessage() if limit.filter(record) else None

    assert [passes() for _ in range(5)] == ["bad request 1", "bad request 1", None, None, None]
    now[0] = 61
    assert passes() == "bad request 1 (3 similar messages were not logged)"


# -------------------------------------------------------------------------------------------------------------- options


def test_allowed_hosts_extend_those_of_loopback() -> None:
    assert "evil.example" not in allowed_hosts("127.0.0.1", Publication())
    assert {"models.example", "localhost"} <= set(
        allowed_hosts("0.0.0.0", Publication(allowed_hosts=["models.example"]))
    )
    assert allowed_hosts("0.0.0.0", Publication()) == ("*",)


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFER_SERVE_TOKENS", "one two")
    assert read_tokens(None).accepts("Bearer two")
    file = tmp_path / "tokens"
    file.write_text("three\n", encoding="utf-8")
    assert read_tokens(file).accepts("Bearer three")
    assert not read_tokens(file).accepts("Bearer two")
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="contains no token"):
        read_tokens(file)


def test_unix_socket_replaces_a_stale_one_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    stale = socket.socket(socket.AF_UNIX)
    stale.bind("s")
    stale.close()
    with listen_on_path("s"):
        assert Path("s").stat().st_mode & 0o777 == 0o660
        with pytest.raises(UserError, match="another server listens on it"), listen_on_path("s"):
            pass
    assert not Path("s").exists()


@pytest.mark.parametrize("number", [float("inf"), float("nan")], ids=str)
def test_serve_refuses_numbers_that_are_not_finite(number: float) -> None:
    with pytest.raises(UserError, match=r"--max-megabytes is not a finite number"):
        deployment_commands.serve(["runs/none"], max_megabytes=number)
