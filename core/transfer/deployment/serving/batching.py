"""Requests that come at the same time go through a model together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class BusyError(Exception):
    """So many requests wait already that one more is refused."""


class Batcher(Generic[Item, Result]):
    """Collects items into batches and has them worked on, batch after batch, in one thread of its own.

    A batch begins with the first item that waits and is closed when it is full or some milliseconds old; what comes
    while the thread is busy waits for the next. An async context manager: on leaving it, the thread has ended.

    Args:
        work: Makes of a batch a result, or the exception that its submitter is to get, for each item in order.
        most: Items of a batch.
        wait_seconds: How long the first item of a batch waits for others.
        most_waiting: Items that wait for a batch; more are refused.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        most: int,
        wait_seconds: float,
        most_waiting: int,
    ) -> None:
        self.work = work
        self.most = most
        self.wait_seconds = wait_seconds
        self._queue: asyncio.Queue[tuple[Item, asyncio.Future[Result]]] = asyncio.Queue(most_waiting)

    @property
    def waiting(self) -> int:
        """How many items wait for a batch."""
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
            BusyError: Too many wait.
            Exception: What the work says of this item.
        """
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
                results = [error] * len(items)
            for (_, result), value in zip(batch, results, strict=True):
                if result.done():  # whoever asked has gone
                    continue
                if isinstance(value, Exception):
                    result.set_exception(value)
                else:
                    result.set_result(value)

    async def _collect(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch = [await self._queue.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.wait_seconds):
                while len(batch) < self.most:
                    batch.append(await self._queue.get())
        return batch
