"""Guards of the application: host names, origins, tokens; request ids, the access log and metrics of all requests."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

AccessLog = Literal["off", "text", "json"]
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]", "::1")
HEALTH = ("/health", "/health/live", "/health/ready")

MAX_LOGGED_CHARACTERS = 200
_CLIENT_CLOSED = 499  # nginx's status for a request whose client did not wait for the response
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

access_logger = logging.getLogger("transfer.access")


def path_of(scope: Scope) -> str:
    """Return the path of a request below the root path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def refuse_other_origins(request: Request) -> None:
    """Refuse a request from a page of another site: browsers send forms there without asking this server.

    Browsers name the site of the page in the header Origin; other clients do not send it.
    """
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "the request comes from a page of another site")


class HostGuard(TrustedHostMiddleware):
    """Refuses requests for other host names, except for the health: probes use the address of a container."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and path_of(scope) in HEALTH:
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class Tokens:
    """Bearer tokens that clients may use. Only their digests are kept.

    Args:
        tokens: The tokens; without any, no token is needed.
    """

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        self._digests = [_digest(token) for token in tokens]

    def replace(self, other: Tokens) -> None:
        """Accept the tokens of another object instead."""
        self._digests = other._digests

    def accepts(self, header: str) -> bool:
        """Whether the header Authorization of a request contains a token, or none is needed."""
        scheme, _, token = header.partition(" ")
        given = _digest(token.strip())
        # All tokens are compared, each in constant time: the duration does not reveal how much of a token is right.
        equal = [hmac.compare_digest(given, digest) for digest in self._digests]
        return not equal or (scheme.lower() == "bearer" and any(equal))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


class Gate:
    """Outermost middleware: checks the token, answers HEAD, assigns an id, and records each request.

    Args:
        app: The application.
        tokens: Accepted bearer tokens.
        access_log: Format of the access log.
        record: Function that is called with the path of the route, the status and the seconds of each request.
    """

    def __init__(
        self, app: ASGIApp, *, tokens: Tokens, access_log: AccessLog, record: Callable[[str, int, float], None]
    ) -> None:
        self.app, self.tokens, self.access_log, self.record = app, tokens, access_log, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        method: str = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # a copy: the server omits the body of its own HEAD requests
        status = _CLIENT_CLOSED

        async def respond(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        app = self.app
        if path_of(scope) not in HEALTH and not self.tokens.accepts(headers.get("authorization", "")):
            detail = {"detail": "a token is missing or wrong: expected the header Authorization: Bearer TOKEN"}
            app = JSONResponse(detail, 401, {"WWW-Authenticate": "Bearer"})
        try:
            await app(scope, receive, respond)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - started
            route = scope.get("route")
            self.record(getattr(route, "path", "other"), status, seconds)
            if self.access_log != "off":
                self._log(scope, method, status, seconds, request_id)

    def _log(self, scope: Scope, method: str, status: int, seconds: float, request_id: str) -> None:
        client = scope.get("client")
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "peer": client[0] if client else "unix",
            "method": method[:MAX_LOGGED_CHARACTERS],
            "path": scope["path"][:MAX_LOGGED_CHARACTERS],  # without the query, which may contain secrets
            "status": status,
            "milliseconds": round(seconds * 1000, 1),
            "request_id": request_id,
        }
        if self.access_log == "json":
            access_logger.info("%s", json.dumps(entry))
            return
        # In JSON strings, control characters are escaped: a request cannot forge a line of the log.
        entry["path"] = json.dumps(f"{entry['method']} {entry['path']}")
        access_logger.info("%(time)s %(peer)s %(path)s %(status)d %(milliseconds).1fms %(request_id)s", entry)


class RateLimit(logging.Filter):
    """Filter of a logger that passes a few records of a kind in an interval, and then counts the others.

    Args:
        records: Number of records with the same message template that pass in an interval.
        seconds: Length of the interval.
    """

    def __init__(self, records: int = 10, seconds: float = 60.0) -> None:
        super().__init__()
        self.records, self.seconds = records, seconds
        self._counts: dict[str, tuple[float, int]] = {}  # start of the interval and number of records, by template

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is logged."""
        now = time.monotonic()
        template = str(record.msg)[:MAX_LOGGED_CHARACTERS]
        started, count = self._counts.get(template, (now, 0))
        if now - started >= self.seconds:
            if count > self.records:
                record.msg = f"{record.msg} ({count - self.records} similar messages were not logged)"
            started, count = now, 0
        if len(self._counts) > 1000:
            self._counts.clear()
        self._counts[template] = started, count + 1
        return count < self.records
