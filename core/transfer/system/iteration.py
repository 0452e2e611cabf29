"""Iteration in batches, and ahead of the consumer in threads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


def batched(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Yield lists of up to ``size`` items."""
    iterator = iter(items)  # itertools.batched exists from Python 3.12
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def map_ahead(function: Callable[[_T], _R], items: Iterable[_T], threads: int) -> Iterator[_R]:
    """Yield the results of a function for each item, in order, computed in threads up to one item each ahead.

    Args:
        function: Function of an item.
        items: Items; they are read in this thread, when they are needed.
        threads: Number of threads; 0 computes in this thread.
    """
    if not threads:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        futures: deque[Future[_R]] = deque()
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > threads:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
