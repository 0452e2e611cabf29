"""Batches of requests that arrive at the same time."""

from __future__ import annotations

import asyncio
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
        self._queue: asyncio.Queue[tuple[Item, asyncio.Future[Result]]] = asyncio.Queue(settings.max_waiting)

    @property
    def waiting(self) -> int:
        """Number of items that wait for a batch."""
        return self._queue.qsize()

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
        self._thread.shutdown()

    async def submit(self, item: Item) -> Result:
        """Return the result of an item.

        Raises:
            BusyError: Too many items are waiting.
            Exception: The exception that the work returned for this item.
        """
        # A full queue refuses at once: otherwise all clients would wait until they time out.
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((item, result))
        except asyncio.QueueFull:
            raise BusyError from None
        return await result

    async def _work_on_batches(self) -> None:
        while True:
            batch = [(item, result) for item, result in await self._collect() if not result.done()]
            items = [item for item, _ in batch]
            results: Sequence[Result | Exception]
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._thread, self.work, items)
            except Exception as error:
                results = [error] * len(items)  # the loop continues: later batches may succeed
            for (_, result), value in zip(batch, results, strict=True):
                if result.done():  # the client has disconnected
                    continue
                if isinstance(value, Exception):
                    result.set_exception(value)
                else:
                    result.set_result(value)

    async def _collect(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch = [await self._queue.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.wait_seconds):
                while len(batch) < self.settings.max_size:
                    batch.append(await self._queue.get())
        return batch
