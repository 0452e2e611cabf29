"""Cache of encoded examples in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from transfer.system.memory import available_bytes
from transfer.system.ranks import rank_from_environment


class MemoryCache:
    """Cache that keeps the encoded values of a split in memory between epochs, if all of them fit.

    Args:
        num_examples: Number of examples in the split.
        limit_bytes: Maximum size of all values. None uses half of the memory that is available at :meth:`measure`,
            divided by the number of ranks on this machine.
    """

    def __init__(self, num_examples: int, limit_bytes: int | None) -> None:
        self.values: dict[int, Any] = {}
        self.is_measured = limit_bytes == 0  # nothing would be kept: no value needs to be encoded to measure it
        self._num_examples = num_examples
        self._limit_bytes = limit_bytes
        self._free_bytes = 0

    @property
    def is_filling(self) -> bool:
        """Whether values of the split are still being added."""
        return self._free_bytes > 0 and len(self.values) < self._num_examples

    def measure(self, sample: Mapping[int, Any]) -> None:
        """Decide whether to keep the values of the split.

        Args:
            sample: Some encoded values by index, from which the size of all values is extrapolated.
        """
        self.is_measured = True
        limit = (
            available_bytes() // 2 // rank_from_environment().local_world_size
            if self._limit_bytes is None
            else self._limit_bytes
        )
        if sum(map(_bytes, sample.values())) / len(sample) * self._num_examples <= limit:
            self._free_bytes = limit
            for index, value in sample.items():
                self.put(index, value)

    def put(self, index: int, value: Any) -> None:
        """Add a value, unless the limit is reached because values are larger than those measured."""
        size = _bytes(value)
        if size <= self._free_bytes:
            self.values[index] = value
            self._free_bytes -= size
        else:
            # Stop filling: otherwise loader processes, which wait for a complete cache, would never start.
            self._free_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(MemoryCache(0, 0))  # a spawned loader process starts empty: sending all values would copy them


def _bytes(value: Any) -> int:
    return int(value.numel() * value.element_size() if isinstance(value, Tensor) else np.asarray(value).nbytes)
