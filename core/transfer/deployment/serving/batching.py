"""Batches of requests that arrive at the same time."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batching:
    """Settings of the batches that items are collected into.

    Args:
        max_size: Maximum number of items in a batch.
        wait_seconds: Time that the first item of a batch waits for others.
        max_waiting: Maximum number of items that wait for a batch; more are refused.
    """

    max_size: int = 32
    wait_seconds: float = 0.002
    max_waiting: int = 128


BATCHING = Batching()


class BusyError(Exception):
    """Too many requests are waiting already."""


class Batcher(Generic[Item, Result]):
    """Collects items into batches and processes the batches one after another in one thread.

    A batch starts with the first waiting item, and is closed when it is full or some milliseconds old. Items that
    arrive while the thread is busy wait for the next batch. Use it as an async context manager: the thread ends with
    the block.

    Args:
        work: Function that returns, for each item of a batch in order, its result or the exception to raise.
        settings: Settings of the batches.
    """

    def __init__(
        self, work: Callable[[Sequence[Item]], Sequence[Result | Exception]], settings: Batching = BATCHING
    ) -> None:
        self.work = work
        self.settings = settings
        self._waiting: dict[asyncio.Future[Result], Item] = {}  # in the order of arrival
        self._arrived = asyncio.Event()
        self._busy_since: float | None = None

    @property
    def waiting(self) -> int:
        """Number of items that wait for a batch."""
        return len(self._waiting)

    @property
    def busy_seconds(self) -> float:
        """Age of the batch in progress, in seconds; 0 if there is none."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    async def __aenter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._loop = asyncio.create_task(self._work_on_batches())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.cancel()
        with suppress(asyncio.CancelledError):
            await self._loop
        self._thread.shutdown(wait=False, cancel_futures=True)

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Return the result of an item, or the exception that the work returned for it, as a future.

        If the future is cancelled, an item that still waits is dropped.

        Raises:
            BusyError: Too many items are waiting.
        """
        # A full queue refuses at once: otherwise all clients would wait until they time out.
        if len(self._waiting) >= self.settings.max_waiting:
            raise BusyError
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[result] = item
        result.add_done_callback(self._drop)
        # The loop wakes up for the first item and for a full batch, not for every item in between.
        if len(self._waiting) in (1, self.settings.max_size):
            self._arrived.set()
        return result

    def _drop(self, result: asyncio.Future[Result]) -> None:
        self._waiting.pop(result, None)

    async def _work_on_batches(self) -> None:
        while True:
            await self._process(await self._collect())

    async def _process(self, batch: dict[asyncio.Future[Result], Item]) -> None:
        # A function of its own, because the next batch may be minutes away: no variable keeps this one in memory.
        if not batch:
            return
        results: Sequence[Result | Exception]
        self._busy_since = time.monotonic()
        try:
            items = list(batch.values())
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self.work, items)
        except Exception as error:
            results = [error] * len(batch)  # the loop continues: later batches may succeed
        self._busy_since = None
        for result, value in zip(batch, results, strict=True):
            if result.done():  # the client has disconnected
                continue
            if isinstance(value, Exception):
                result.set_exception(value)
            else:
                result.set_result(value)

    async def _collect(self) -> dict[asyncio.Future[Result], Item]:
        while not self._waiting:
            await self._next_arrival()
        if len(self._waiting) < self.settings.max_size:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.settings.wait_seconds):
                    await self._next_arrival()
        first = list(itertools.islice(self._waiting, self.settings.max_size))
        return {result: self._waiting.pop(result) for result in first}

    async def _next_arrival(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()
