"""Encoded examples kept in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from transfer.system.memory import available_bytes
from transfer.system.ranks import rank_from_environment


class MemoryCache:
    """Encoded values in memory from one epoch to the next, where those of a whole split fit.

    Args:
        count: Examples of the split.
        limit_bytes: For all of them; None: half of what is available when they are measured, divided by the processes
            that train together on this machine.
    """

    def __init__(self, count: int, limit_bytes: int | None) -> None:
        self.values: dict[int, Any] = {}
        self.is_measured = limit_bytes == 0
        self._num_examples = count
        self._limit_bytes = limit_bytes
        self._free_bytes = 0

    @property
    def is_filling(self) -> bool:
        """Whether values of this split are still being collected."""
        return self._free_bytes > 0 and len(self.values) < self._num_examples

    def measure(self, some: Mapping[int, Any]) -> None:
        """Decide by the size of some values, by their index, whether all are kept."""
        self.is_measured = True
        limit = (
            available_bytes() // 2 // rank_from_environment().local_world_size
            if self._limit_bytes is None
            else self._limit_bytes
        )
        if sum(map(_bytes, some.values())) / len(some) * self._num_examples <= limit:
            self._free_bytes = limit
            for index, value in some.items():
                self.put(index, value)

    def put(self, index: int, value: Any) -> None:
        """Keep a value, unless those that are there have filled the memory after all."""
        size = _bytes(value)
        if size <= self._free_bytes:
            self.values[index] = value
            self._free_bytes -= size
        else:
            self._free_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(MemoryCache(0, 0))  # a process that is not forked gets none


def _bytes(value: Any) -> int:
    return int(value.numel() * value.element_size() if isinstance(value, Tensor) else np.asarray(value).nbytes)
