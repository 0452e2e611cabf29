"""The server: its socket, its timeouts, and its shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import re
import resource
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from transfer.deployment.serving.app import make_app, replace_models
from transfer.deployment.serving.batching import BATCHING, Batching
from transfer.deployment.serving.decoders import Decoders
from transfer.deployment.serving.guards import LOOPBACK_HOSTS, AccessLog, RateLimit, Tokens, access_logger
from transfer.deployment.serving.models import ServedModel
from transfer.deployment.serving.protocol import BACKLOG, MAX_CONNECTIONS, RESERVED_FILES, UNIX_PEER, TimelyProtocol
from transfer.deployment.serving.reading import LIMITS, Limits
from transfer.errors import UserError
from transfer.system.signals import Signals

_LOGGERS = ("uvicorn.error", "asyncio", "transfer.deployment.serving.models", "transfer_vision.images.decoding")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

logger = logging.getLogger("transfer.serving")


@dataclass(frozen=True)
class Publication:
    """Settings of a server that others reach, usually through a proxy.

    Args:
        allowed_hosts: Host names of the server in addition to those of this machine.
        root_path: Path under which a proxy publishes the server.
        uds: Path of a Unix domain socket to listen on instead of an address; None listens on an address.
        trusted_proxies: Addresses or networks of proxies whose headers X-Forwarded-For and X-Forwarded-Proto are used.
            A proxy on a Unix domain socket is always trusted.
        token_file: File with one bearer token per line; None reads the environment variable.
        access_log: Format of the access log: off, text or json.
        drain_seconds: Time in which requests in progress are answered when the server stops.
    """

    allowed_hosts: Sequence[str] = ()
    root_path: str = ""
    uds: str | None = None
    trusted_proxies: Sequence[str] = ()
    token_file: Path | None = None
    access_log: AccessLog = "off"
    drain_seconds: float = 30.0


PRIVATE = Publication()
TOKENS_VARIABLE = "TRANSFER_SERVE_TOKENS"
"""Environment variable with the bearer tokens of clients, separated by blanks, if there is no file of tokens."""


def serve(
    runs: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    limits: Limits = LIMITS,
    batching: Batching = BATCHING,
    publication: Publication = PRIVATE,
    started: Callable[[str, list[str]], None] = lambda address, names: None,
) -> None:
    """Serve models over HTTP until SIGTERM or Ctrl-C; requests in progress are finished. SIGHUP reloads the models.

    Args:
        runs: Run directories or model folders, each ``RUN`` or ``NAME=RUN``.
        host: Address to listen on.
        port: Port to listen on; 0 selects a free one.
        device: Device to compute on: auto (CUDA, then MPS, then the CPU), cpu, cuda, cuda:N or mps.
        limits: Limits on requests.
        batching: Settings of the batches that requests are collected into.
        publication: Settings for a server that others reach.
        started: Function that is called with the address of the server and the names of the models when it listens.

    Raises:
        UserError: A run or an option is invalid, two models have the same name, the device is not available, or the
            server cannot listen on the address.
        Interrupted: The server was stopped.
    """
    with Signals():
        named = name_runs(runs)
        tokens = read_tokens(publication.token_file)

        def read() -> list[ServedModel]:
            return [ServedModel.read(name, run, device) for name, run in named.items()]

        models = read()
        _prepare_process(publication.access_log)
        decoders = Decoders(processes=any(model.pickled_encoder for model in models))
        with listen_on_path(publication.uds) if publication.uds else listen(host, port) as listening:
            app = make_app(
                models,
                limits=limits,
                batching=batching,
                hosts=allowed_hosts(host, publication),
                tokens=tokens,
                access_log=publication.access_log,
                decoders=decoders,
            )

            def reload() -> None:
                tokens.replace(read_tokens(publication.token_file))
                replace_models(app, read(), batching.max_size)

            # The command line collects garbage rarely, for the speed of its start. A server must free cycles with large
            # inputs soon; frozen objects (modules, models) cost nothing in a collection.
            gc.collect()
            gc.freeze()
            gc.set_threshold(700, 10, 10)
            if publication.uds:
                address = f"unix:{publication.uds}:"
            else:
                address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
            started(address, [model.name for model in models])
            del models  # after a reload, nothing may keep the old ones in memory
            try:
                make_server(app, limits, publication, reload).run([listening])
            finally:
                gc.unfreeze()


def allowed_hosts(host: str, publication: Publication) -> Sequence[str]:
    """Return the host names whose requests are answered.

    On loopback, other host names are refused: a page of another site could resolve its own to this machine. A browser
    cannot reach a Unix domain socket.
    """
    if publication.allowed_hosts or (is_loopback(host) and not publication.uds):
        return (*LOOPBACK_HOSTS, host, *publication.allowed_hosts)
    return ("*",)


def read_tokens(file: Path | None) -> Tokens:
    """Read the bearer tokens of clients from a file, one per line, or from the environment variable.

    Raises:
        UserError: The file cannot be read or contains no token.
    """
    if file is None:
        return Tokens(os.environ.get(TOKENS_VARIABLE, "").split())
    try:
        tokens = file.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text in UTF-8"
        raise UserError(f"the tokens cannot be read: {reason}", where=str(file)) from None
    if not tokens:
        raise UserError("the file contains no token: expected one per line", where=str(file))
    return Tokens(tokens)


def _prepare_process(access_log: AccessLog) -> None:
    """Set the limit on open files and the loggers of the process for a server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(RateLimit())
    if access_log != "off":
        access_logger.addHandler(logging.StreamHandler())
        access_logger.setLevel(logging.INFO)
        access_logger.propagate = False


def make_server(
    app: FastAPI,
    limits: Limits,
    publication: Publication = PRIVATE,
    reload: Callable[[], None] | None = None,
) -> uvicorn.Server:
    """Return a server that closes slow connections, and finishes requests in progress when it stops.

    Args:
        app: The application.
        limits: Limits on requests.
        publication: Settings for a server that others reach.
        reload: Function that reads the models again, called in a thread on SIGHUP; None ignores the signal.
    """
    config = uvicorn.Config(
        app,
        http=TimelyProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",  # it starts and ends the batchers
        log_level="warning",
        access_log=False,
        root_path=publication.root_path,
        server_header=False,  # attackers need not learn the version
        # Any client could send these headers: they count only if a trusted proxy sent them.
        proxy_headers=bool(publication.trusted_proxies or publication.uds),
        forwarded_allow_ips=[UNIX_PEER, *publication.trusted_proxies],
        # asyncio accepts up to this many connections at once, before the limit on connections is checked.
        backlog=BACKLOG,
        timeout_keep_alive=max(1, round(limits.seconds)),
        timeout_graceful_shutdown=round(publication.drain_seconds),
    )
    return _Server(config, reload)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, reload: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._reload = reload
        self._reloading: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._reload is not None and hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._start_reload)

    def _start_reload(self) -> None:
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.create_task(self._reload_in_thread())

    async def _reload_in_thread(self) -> None:
        assert self._reload is not None
        try:
            await asyncio.to_thread(self._reload)
        except Exception as error:  # a plugin may raise any exception; the server continues with the old models
            logger.error("the models were not reloaded: %s", error)
        else:
            logger.warning("the models were reloaded")


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
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
        # Connections inherit it. With Nagle's algorithm, the body of a response would wait 40 ms until the client has
        # acknowledged its headers.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, OverflowError) as error:
        fix = "choose another --port, or 0 for a free one"
        raise UserError(
            f"the server cannot listen on this address: {error}", where=f"{host}:{port}", fix=fix
        ) from error


@contextmanager
def listen_on_path(path: str) -> Iterator[socket.socket]:
    """Listen on a Unix domain socket that its owner and group can connect to; remove it at the end.

    Raises:
        UserError: The path cannot be used, or another server listens on it.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listening:
        try:
            if os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionError):
                    probe.connect(path)
                    raise OSError("another server listens on it")
                os.unlink(path)  # left by a server that was killed
            umask = os.umask(0o117)
            try:
                listening.bind(path)
            finally:
                os.umask(umask)
            listening.listen(BACKLOG)
        except OSError as error:
            raise UserError(f"the server cannot listen on this socket: {error}", where=path) from error
        try:
            yield listening
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
