"""Iteration in batches, and ahead of the consumer in threads."""

from __future__ import annotations

import threading

import pytest

from transfer.system.iteration import batched, map_ahead


def test_last_batch_may_be_smaller() -> None:
    assert list(batched(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_map_ahead_keeps_order_and_raises_in_turn(threads: int) -> None:
    names = set()

    def double(value: int) -> int:
        names.add(threading.current_thread() is threading.main_thread())
        if value == 8:
            raise ValueError(value)
        return 2 * value

    results = map_ahead(double, iter(range(20)), threads)
    assert [next(results) for _ in range(8)] == [*range(0, 16, 2)]
    with pytest.raises(ValueError, match="8"):
        next(results)
    assert names == {threads == 0}
