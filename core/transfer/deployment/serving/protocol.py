"""The protocol of a connection: its limits, its timeouts, and one system call per response."""

from __future__ import annotations

import asyncio
import re
import resource
from functools import lru_cache
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_CONNECTIONS = 1000
BACKLOG = 128
RESERVED_FILES = 2 * BACKLOG + 64
"""Number of files that the process may need besides its connections: accepted sockets, models, temporary files."""
UNIX_PEER = "unix"
"""Address of the clients of a Unix domain socket."""
MAX_HEAD_BYTES = 2**14
MAX_PIPELINED = 8
"""Number of requests that a connection may send before the first of them is answered."""


@lru_cache(maxsize=1)
def max_connections() -> int:
    """Return the maximum number of open connections: fewer than the process may have open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(min(MAX_CONNECTIONS, soft - RESERVED_FILES), 64)


class JoinedWrites:
    """Transport that sends everything that is written in one turn of the event loop with one system call.

    The server writes the head and the body of a response one after the other. Each system call releases Python's lock,
    which the thread of a model may then keep for milliseconds.

    Args:
        transport: Transport of a connection.
        loop: Event loop of the server.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._written: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send bytes after this turn of the event loop."""
        if not self._written:
            self._loop.call_soon(self._send)
        self._written.append(data)

    def close(self) -> None:
        """Close the connection after everything has been sent."""
        self._send()
        self._transport.close()

    def _send(self) -> None:
        if self._written:
            data = b"".join(self._written)
            self._written.clear()
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


def _without_upgrade(data: bytes) -> bytes:
    """Return the start of a request with another name for the header Upgrade, which a server may ignore.

    Clients in Java offer HTTP/2 by it, and send the body in HTTP/1.1. The parser would not read that body.
    """
    end = data.find(b"\r\n\r\n") + 2  # 1, and so nothing, if the head is incomplete
    header = _UPGRADE.search(data, 0, end)
    return data if header is None else data[: header.start()] + b"\r\nx-upgrade:" + data[header.end() :]


class TimelyProtocol(HttpToolsProtocol):
    """Closes connections that wait too long: for the head of a request, or for the client to read a response.

    The time is uvicorn's keep-alive timeout. The application limits the time for the body of a request. If too many
    connections are open, the oldest one without a request is closed, so that others and the health stay reachable.

    The parser is llhttp in C: h11, in Python, takes 0.2 ms more per request. This class limits the size of a head and
    the number of pipelined requests, and drops trailers, which uvicorn would add to the headers.
    """

    _deadline: asyncio.TimerHandle | None = None
    _reading_deadline: asyncio.TimerHandle | None = None
    _in_head = False
    _is_complete = True
    _started = 0
    """Number of requests that start in the bytes that are parsed."""
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first request."""
        super().connection_made(JoinedWrites(transport, self.loop))  # type: ignore[arg-type]
        if self.client is None:
            self.client = (UNIX_PEER, 0)
        self.opened = self.loop.time()
        if len(self.connections) > max_connections():
            idle = (one for one in self.connections if isinstance(one, TimelyProtocol) and one.is_idle)
            # This connection is idle too, so there is always one.
            oldest = min(idle, key=lambda one: one.opened)
            oldest.transport.abort()
            self.connections.discard(oldest)
        self._wait()

    @property
    def is_idle(self) -> bool:
        """Whether there is no request in progress."""
        return self.cycle is None or self.cycle.response_complete

    def pause_writing(self) -> None:
        """Start the timeout of a client that does not read the response."""
        super().pause_writing()
        self._reading_deadline = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timeout of a client that does not read the response."""
        super().resume_writing()
        self._stop_waiting_for_reader()

    def _stop_waiting_for_reader(self) -> None:
        if self._reading_deadline is not None:
            self._reading_deadline.cancel()
            self._reading_deadline = None

    def data_received(self, data: bytes) -> None:
        """Parse a part of a request. Stop the timeout when the request is complete."""
        # The bytes that belong to the head are known only if nothing precedes it in them.
        only_head, self._started = self._is_complete, 0
        if only_head:
            data = _without_upgrade(data)
        super().data_received(data)
        if self._in_head and (self._started == 0 or (self._started == 1 and only_head)):
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")
        if self._is_complete and not self.is_idle:
            self._stop_waiting()
        elif self._deadline is None:
            self._wait()

    def on_message_begin(self) -> None:
        """Start to read a request.

        Raises:
            httptools.HttpParserError: The client has sent too many requests in advance.
        """
        if len(self.pipeline) >= MAX_PIPELINED:
            raise httptools.HttpParserError("too many requests are pipelined")
        self._in_head, self._is_complete, self._head_bytes = True, False, 0
        self._started += 1
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header. Trailers are dropped: a proxy that checks headers does not check them."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the application.

        Raises:
            httptools.HttpParserError: The parser would not read the body, but take it for another protocol.
        """
        if self.parser.should_upgrade():
            raise httptools.HttpParserError("no other protocol is spoken")
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Mark the request as complete."""
        self._is_complete = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeouts."""
        self._stop_waiting()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(self.timeout_keep_alive, self._too_late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        if self.is_idle:
            self.transport.close()
        else:
            self._wait()
