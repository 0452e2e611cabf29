"""The server: its socket, its timeouts, and its shutdown."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from transfer.deployment.serving.app import make_app
from transfer.deployment.serving.batching import BATCHING, Batching
from transfer.deployment.serving.models import ServedModel
from transfer.deployment.serving.reading import LIMITS, Limits
from transfer.errors import UserError
from transfer.system.signals import Signals

MAX_CONNECTIONS = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def serve(
    runs: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    limits: Limits = LIMITS,
    batching: Batching = BATCHING,
    started: Callable[[str, list[str]], None] = lambda address, names: None,
) -> None:
    """Serve models over HTTP until SIGTERM or Ctrl-C; requests in progress are finished.

    Args:
        runs: Run directories or model folders, each ``RUN`` or ``NAME=RUN``.
        host: Address to listen on.
        port: Port to listen on; 0 selects a free one.
        device: Device to compute on: auto (CUDA, then MPS, then the CPU), cpu, cuda, cuda:N or mps.
        limits: Limits on one request.
        batching: Settings of the batches that requests are collected into.
        started: Function that is called with the address of the server and the names of the models when it listens.

    Raises:
        UserError: A run is invalid, two models have the same name, the device is not available, or the server cannot
            listen on the address.
        Interrupted: The server was stopped.
    """
    with Signals():
        models = [ServedModel.read(name, run, device) for name, run in name_runs(runs).items()]
        listening = listen(host, port)
        with listening:
            # On loopback, refuse other host names: a page of another site could resolve its own to this machine.
            hosts = ("localhost", "127.0.0.1", "[::1]", "::1", host) if is_loopback(host) else ("*",)
            app = make_app(models, limits=limits, batching=batching, hosts=hosts)
            bound = listening.getsockname()[1]
            started(f"http://{f'[{host}]' if ':' in host else host}:{bound}", [model.name for model in models])
            make_server(app, limits).run([listening])


def make_server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """Return a server that closes slow connections, and finishes requests in progress when it stops."""
    config = uvicorn.Config(
        app,
        http=TimelyProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",  # it starts and ends the batchers
        log_level="warning",
        access_log=False,
        server_header=False,  # attackers need not learn the version
        proxy_headers=False,  # any client could send them
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=max(1, round(limits.seconds)),
    )
    return uvicorn.Server(config)


class TimelyProtocol(H11Protocol):
    """Closes a connection if the head of a request does not arrive in time; uvicorn would keep it open.

    The limit is uvicorn's keep-alive timeout. The application limits the time for the body of a request.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Stop the timeout when the head of the request is complete."""
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_waiting()
        elif self._deadline is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(self.timeout_keep_alive, self._too_late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self._wait()


def name_runs(runs: Sequence[str]) -> dict[str, str]:
    """Return the path of each run by the name of its model: the given one, or the name of the folder.

    Raises:
        UserError: A name is not allowed in a URL, or two are equal.
    """
    named: dict[str, str] = {}
    for run in runs:
        name, equals, path = run.partition("=")
        if not equals or Path(run).exists():
            name, path = Path(run).resolve().name, run
        if not _NAME.fullmatch(name):
            raise UserError(
                f"invalid model name {name!r}: expected letters, digits, dots, hyphens and underscores",
                where=run,
                fix=f"name it: NAME={path}",
            )
        if name in named:
            where = f"{named[name]} and {path}"
            raise UserError(f"two models have the name {name!r}", where=where, fix=f"rename one: NAME={path}")
        named[name] = path
    return named


def is_loopback(host: str) -> bool:
    """Whether an address can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        UserError: The address or port cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
        # Connections inherit it. With Nagle's algorithm, the body of a response would wait 40 ms until the client has
        # acknowledged its headers.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, OverflowError) as error:
        fix = "choose another --port, or 0 for a free one"
        raise UserError(
            f"the server cannot listen on this address: {error}", where=f"{host}:{port}", fix=fix
        ) from error
