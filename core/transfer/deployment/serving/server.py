"""The server: where it listens, how long it is patient, how it ends."""

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

from transfer.deployment.serving.app import BATCHING, Batching, make_app
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
    limits: Limits = LIMITS,
    batching: Batching = BATCHING,
    started: Callable[[str, list[str]], None] = lambda address, names: None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; what is under way then is finished.

    Args:
        runs: Run directories or model folders, ``NAME=RUN`` or ``RUN`` each.
        host: The address to listen on.
        port: 0 takes one that is free.
        limits: What one request may cost.
        batching: How requests are put together.
        started: Is called with the server's address and the names of the models when it listens.

    Raises:
        UserError: A run is not right, two have one name, or the address cannot be listened on.
        Interrupted: It was stopped.
    """
    with Signals():
        models = [ServedModel.read(name, run) for name, run in name_runs(runs).items()]
        listening = listen(host, port)
        with listening:
            # A page on another site cannot reach a server on loopback by a name of its own.
            hosts = ("localhost", "127.0.0.1", "[::1]", "::1", host) if is_loopback(host) else ("*",)
            app = make_app(models, limits=limits, batching=batching, hosts=hosts)
            bound = listening.getsockname()[1]
            started(f"http://{f'[{host}]' if ':' in host else host}:{bound}", [model.name for model in models])
            make_server(app, limits).run([listening])


def make_server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """Return a server that closes what takes too long to ask, and ends when what is under way has been answered."""
    config = uvicorn.Config(
        app,
        http=TimelyProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=max(1, round(limits.seconds)),
    )
    return uvicorn.Server(config)


class TimelyProtocol(H11Protocol):
    """Closes a connection on which a request does not arrive in time, which uvicorn leaves open.

    The time is that for which a connection may be silent between two requests. While the application reads a request's
    body, the application says how long it waits.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Go on waiting as long as the request is not whole."""
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_waiting()
        elif self._deadline is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
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
    """Return each run's path by the name under which it is served: the given one, or that of its folder.

    Raises:
        UserError: A name cannot stand in an address, or two are alike.
    """
    named: dict[str, str] = {}
    for run in runs:
        name, equals, path = run.partition("=")
        if not equals or Path(run).exists():
            name, path = Path(run).resolve().name, run
        if not _NAME.fullmatch(name):
            raise UserError(f"a model cannot be called {name!r}", where=run, fix=f"give it a name: NAME={path}")
        if name in named:
            where = f"{named[name]} and {path}"
            raise UserError(f"two models are called {name!r}", where=where, fix=f"give one a name: NAME={path}")
        named[name] = path
    return named


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        UserError: The address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
        # Connections inherit it. Without it an answer's body waits 40 ms for the asker to acknowledge its headers.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, OverflowError) as error:
        fix = "choose another --port, or 0 for one that is free"
        raise UserError(f"cannot listen there: {error}", where=f"{host}:{port}", fix=fix) from error
