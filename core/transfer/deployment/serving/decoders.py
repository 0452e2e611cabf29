"""Workers that decode the files of requests, outside of the process that answers."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any

import torch

from transfer.deployment.serving.batching import BusyError
from transfer.deployment.serving.models import Encoder, Request, ServedModel

# A second one decodes while a large image occupies the first. More would need more memory: up to 400 MB each.
_DECODERS = 2
_NICENESS = 10


class Decoders:
    """Workers that encode requests with files: threads, or processes of a low priority.

    Decoding a large image in a thread stalls all other requests, because Pillow keeps Python's lock for tens of
    milliseconds at a time. Processes also survive a decoder that crashes.

    Args:
        processes: Whether to start processes now, as copies of this one. Call it before other threads and sockets
            exist: a copy has the locks and the open files, but not the threads. Only Linux copies safely; elsewhere
            threads are used.
    """

    def __init__(self, processes: bool = False) -> None:
        self._threads = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decoders")
        self._processes = _start_processes("fork") if processes and sys.platform == "linux" else None

    async def encode(self, model: ServedModel, request: Request) -> Any:
        """Return a request as a model's preprocessing encodes it, or the exception if it cannot be encoded.

        Raises:
            BusyError: A process crashed, for this request or another one.
        """
        loop = asyncio.get_running_loop()
        pool: Executor | None = self._processes
        if pool is None or model.pickled_encoder is None:
            return await loop.run_in_executor(self._threads, model.encode, request)
        try:
            encoded = await loop.run_in_executor(pool, _encode, model.pickled_encoder, dict(request))
            return pickle.loads(encoded)  # noqa: S301 (from a process of this program)
        except BrokenProcessPool:
            if pool is self._processes:
                # Not as copies: they would keep the connections of clients open.
                self._processes = _start_processes("spawn")
            raise BusyError from None

    def close(self) -> None:
        """End the workers after their current request."""
        for pool in (self._threads, self._processes):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)


def _start_processes(method: str) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(_DECODERS, multiprocessing.get_context(method), _prepare_process)
    pool.submit(os.getpid)  # with fork, the first call starts all processes
    return pool


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
    # Pickled here: multiprocessing would pass a tensor in shared memory, as a file that must be opened and closed.
    return pickle.dumps(_encoder(pickled_encoder).encode(request))
