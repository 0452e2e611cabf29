"""Workers that decode the files of requests, outside of the process that answers."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from transfer.deployment.serving.batching import BusyError
from transfer.deployment.serving.models import Encoder, RefusedError, Request, ServedModel

# A second one decodes while a large image occupies the first. More would need more memory: up to 400 MB each.
_DECODERS = 2
_NICENESS = 10
_MAX_SECONDS = 60
"""Time after which a process that does not answer is replaced."""
_MAX_ANSWER_BYTES = 2**30


class _UnsupportedError(Exception):
    """The encoded value consists of other objects than tensors."""


class _Process:
    """A process that encodes one request at a time, and its connection.

    Args:
        method: Start method of multiprocessing.
        others: Connections of other processes, which a copy of this process closes.
    """

    def __init__(self, method: Literal["fork", "spawn"], others: Sequence[Connection] = ()) -> None:
        context: Any = multiprocessing.get_context(method)  # the types of each method differ
        self.connection, theirs = context.Pipe()
        inherited = [*others, self.connection] if method == "fork" else []
        self._process = context.Process(target=_answer_requests, args=(theirs, inherited), daemon=True)
        self._process.start()
        theirs.close()

    def encode(self, pickled_encoder: bytes, request: Request) -> Any:
        """Return the encoded request, or the exception if it cannot be encoded.

        Raises:
            OSError, EOFError: The process has crashed or does not answer.
        """
        self.connection.send_bytes(pickle.dumps((pickled_encoder, dict(request))))
        if not self.connection.poll(_MAX_SECONDS):
            raise TimeoutError
        return unpack(self.connection.recv_bytes(_MAX_ANSWER_BYTES))

    def kill(self) -> None:
        """End the process at once."""
        self.connection.close()
        self._process.kill()
        self._process.join()


class Decoders:
    """Workers that encode requests with files: threads, or processes of a low priority.

    Decoding a large image in a thread stalls all other requests, because Pillow keeps Python's lock for tens of
    milliseconds at a time. Processes also survive a decoder that crashes. A process answers with the bytes of tensors,
    never with a pickle: if an image takes the process over, its answer cannot execute code in the server.

    Args:
        processes: Whether to start processes now, as copies of this one. Call it before other threads and sockets
            exist: a copy has the locks and the open files, but not the threads. Only Linux copies safely; elsewhere
            threads are used.
    """

    def __init__(self, processes: bool = False) -> None:
        self._threads = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decoders")
        self._idle: SimpleQueue[_Process] | None = None
        self._closed = False
        if processes and sys.platform == "linux":
            self._idle = SimpleQueue()
            started: list[_Process] = []
            for _ in range(_DECODERS):
                started.append(_Process("fork", [process.connection for process in started]))
                self._idle.put(started[-1])

    async def encode(self, model: ServedModel, request: Request) -> Any:
        """Return a request as a model's preprocessing encodes it, or the exception if it cannot be encoded.

        Raises:
            BusyError: The process that decoded the request crashed.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._encode, model, request)

    def close(self) -> None:
        """End the workers after their current request."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._kill_idle()

    def _encode(self, model: ServedModel, request: Request) -> Any:
        if self._idle is None or model.pickled_encoder is None:
            return model.encode(request)
        process = self._idle.get()  # there are as many as threads
        try:
            return process.encode(model.pickled_encoder, request)
        except _UnsupportedError:
            model.pickled_encoder = None
            return model.encode(request)
        except (OSError, EOFError, ValueError, SafetensorError):
            process.kill()
            # Not as a copy: it would keep the connections of clients open.
            process = _Process("spawn")
            raise BusyError from None
        finally:
            self._idle.put(process)
            if self._closed:
                self._kill_idle()

    def _kill_idle(self) -> None:
        while self._idle is not None and not self._idle.empty():
            self._idle.get().kill()


def pack(encoded: Any) -> bytes:
    """Return tensors, or the exception for a request, as a letter for the kind and the content.

    The content is a text in UTF-8 (R: refused, F: failed), safetensors (T: a tensor, S: a sequence of tensors), or
    nothing (U: other objects).
    """
    match encoded:
        case RefusedError():
            return b"R" + str(encoded).encode("utf-8", "replace")
        case Exception():
            return b"F" + f"{type(encoded).__name__}: {encoded}".encode("utf-8", "replace")
        case Tensor():
            return b"T" + save({"0": encoded.contiguous()})
        case tuple() if all(isinstance(part, Tensor) for part in encoded):
            # Copies: safetensors refuses tensors that share memory.
            return b"S" + save({str(index): part.clone().contiguous() for index, part in enumerate(encoded)})
    return b"U"


def unpack(answer: bytes) -> Any:
    """Return the value or exception that :func:`pack` wrote.

    Raises:
        ValueError, SafetensorError: The answer is malformed.
    """
    kind, content = answer[:1], answer[1:]
    match kind:
        case b"R":
            return RefusedError(content.decode())
        case b"F":
            return RuntimeError(content.decode())
        case b"U":
            raise _UnsupportedError
        case b"T" | b"S":
            tensors = load(content)
            values = tuple(tensors[str(index)] for index in range(len(tensors)) if str(index) in tensors)
            if len(values) != len(tensors) or (kind == b"T" and len(values) != 1):
                raise ValueError("the names of the tensors are wrong")
            return values[0] if kind == b"T" else values
    raise ValueError("the kind of the answer is unknown")


def _answer_requests(connection: Connection, inherited: Sequence[Connection]) -> None:
    """Encode requests until the connection is closed."""
    _prepare_process()
    for other in inherited:
        other.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send_bytes(_encode(*pickle.loads(connection.recv_bytes())))  # noqa: S301 (from the server)


def _prepare_process() -> None:
    # The server answers these signals, which a terminal sends to all its processes.
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(_NICENESS)
    torch.set_num_threads(1)  # the threads of OpenMP do not exist in a copy
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()


@lru_cache(maxsize=8)
def _encoder(pickled: bytes) -> Encoder:
    encoder: Encoder = pickle.loads(pickled)  # noqa: S301 (from the process that started this one)
    return encoder


def _encode(pickled_encoder: bytes, request: Request) -> bytes:
    return pack(_encoder(pickled_encoder).encode(request))
