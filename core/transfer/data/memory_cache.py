"""Cache of encoded examples in memory."""

from __future__ import annotations

import math
import mmap
import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfer.system.memory import available_bytes
from transfer.system.ranks import rank_from_environment

SHARED_MARGIN = 1.5
"""Size of the shared memory relative to the estimated size of all values; pages that are never written take none."""
_ALIGNMENT_BYTES = 64


class MemoryCache:
    """Cache that keeps the encoded values of a split in memory between epochs, if all of them fit.

    The values are in this process, or in memory that loader processes share, so that each of them can add values.

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
        self._shared: _SharedTensors | None = None

    @property
    def is_filling(self) -> bool:
        """Whether values of the split are still being added."""
        if self._shared is not None:
            return self._shared.has_room
        return self._free_bytes > 0 and len(self.values) < self._num_examples

    @property
    def is_shared(self) -> bool:
        """Whether loader processes that are forked from this one share the values, and can add some."""
        return self._shared is not None

    def measure(self, sample: Mapping[int, Any], *, shared: bool = False) -> None:
        """Decide whether to keep the values of the split.

        Args:
            sample: Some encoded values by index, from which the size of all values is extrapolated.
            shared: Whether to keep them in memory that forked processes share, if they are tensors.
        """
        self.is_measured = True
        limit = (
            available_bytes() // 2 // rank_from_environment().local_world_size
            if self._limit_bytes is None
            else self._limit_bytes
        )
        estimate = sum(map(_bytes, sample.values())) / len(sample) * self._num_examples
        if estimate <= limit:
            self._free_bytes = limit
            if shared:
                # Each value is aligned, which the estimate does not contain.
                capacity = min(limit, int(estimate * SHARED_MARGIN) + self._num_examples * _ALIGNMENT_BYTES)
                self._shared = _SharedTensors.create(self._num_examples, capacity, next(iter(sample.values())))
            for index, value in sample.items():
                self.put(index, value)

    def put(self, index: int, value: Any) -> None:
        """Add a value, unless the limit is reached because values are larger than those measured."""
        if self._shared is not None:
            self._shared.put(index, value)
            return
        size = _bytes(value)
        if size <= self._free_bytes:
            self.values[index] = value
            self._free_bytes -= size
        else:
            # Stop filling: otherwise loader processes, which wait for a complete cache, would never start.
            self._free_bytes = 0

    def get(self, index: int) -> Any:
        """Return a value, or None if it was not added. It must not be changed, unless :attr:`is_shared`."""
        return self.values.get(index) if self._shared is None else self._shared.get(index)

    def __getstate__(self) -> dict[str, Any]:
        return vars(MemoryCache(0, 0))  # a spawned loader process starts empty: sending all values would copy them


class _SharedTensors:
    """Tensors in an anonymous shared mapping, which processes forked from this one read and fill.

    An anonymous mapping does not count against the size of /dev/shm, takes memory only for pages that were written,
    and is released with the last process that maps it.

    Args:
        num_examples: Maximum number of tensors.
        capacity_bytes: Maximum size of all tensors.
        example: Tensor with the dtype and the number of dimensions of all tensors. Others are not added.
    """

    def __init__(self, num_examples: int, capacity_bytes: int, example: Tensor) -> None:
        self._dtype, self._dimensions = example.dtype, example.ndim
        self._memory = torch.frombuffer(mmap.mmap(-1, max(capacity_bytes, 1)), dtype=torch.uint8)
        # A row per example: its position plus 1 (0: not added), its shape and its strides. The last row: the number of
        # bytes in use, the number of tensors, and whether a tensor found no room.
        columns = max(3, 1 + 2 * self._dimensions)
        table = mmap.mmap(-1, (num_examples + 1) * columns * 8)
        self._table = np.frombuffer(table, dtype=np.int64).reshape(num_examples + 1, columns)
        self._lock = multiprocessing.get_context("fork").Lock()

    @classmethod
    def create(cls, num_examples: int, capacity_bytes: int, example: Any) -> _SharedTensors | None:
        """Return memory for tensors; None if the values are no tensors or memory cannot be shared here."""
        # Spawned processes get a copy of the dataset without this memory.
        if not isinstance(example, Tensor) or multiprocessing.get_start_method() != "fork":
            return None
        try:
            return cls(num_examples, capacity_bytes, example)
        except OSError:  # no address space, or no semaphores
            return None

    @property
    def has_room(self) -> bool:
        """Whether no tensor is missing for lack of room, and some are not added yet."""
        _, count, is_full = self._table[-1, :3]
        return not is_full and count < len(self._table) - 1

    def put(self, index: int, value: Tensor) -> None:
        """Add a tensor, unless another process has done so or there is no room."""
        if not self.has_room or value.dtype != self._dtype or value.ndim != self._dimensions:
            return
        # The copy keeps the strides of a dense tensor, because the rounding of a resize may depend on them. Other
        # tensors, such as slices, become dense.
        value = value if torch.empty_like(value).stride() == value.stride() else value.clone()
        size = value.numel() * value.element_size()
        with self._lock:
            used = int(self._table[-1, 0])
            if self._table[index, 0] or self._table[-1, 2]:
                return
            if used + size > len(self._memory):
                self._table[-1, 2] = 1
                return
            self._table[-1, 0] = used + -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            self._view(used, value.shape, value.stride()).copy_(value)
            self._table[index, 1 : 1 + 2 * self._dimensions] = (*value.shape, *value.stride())
            self._table[-1, 1] += 1
            self._table[index, 0] = used + 1  # last: from now on other processes read the tensor

    def get(self, index: int) -> Tensor | None:
        """Return a copy of a tensor, or None if it was not added."""
        position, *layout = self._table[index].tolist()
        if not position:
            return None
        shape, strides = layout[: self._dimensions], layout[self._dimensions : 2 * self._dimensions]
        return self._view(position - 1, shape, strides).clone()

    def _view(self, position: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        size = math.prod(shape) * self._dtype.itemsize
        return self._memory[position : position + size].view(self._dtype).as_strided(shape, strides)


def _bytes(value: Any) -> int:
    return int(value.numel() * value.element_size() if isinstance(value, Tensor) else np.asarray(value).nbytes)
