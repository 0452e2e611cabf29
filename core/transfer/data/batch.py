"""Batches and their transfer to a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Shard = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
"""Which examples of a batch this process computes, where several share each batch."""


@dataclass(frozen=True)
class Batch:
    """What one step consumes.

    Args:
        inputs: The backbone's input: a tensor or a tuple of tensors, batch first.
        targets: int64 (B,) or float32 (B, C).
        indices: int64 (B,), the examples' places in their split.
        global_indices: The same of the whole batch, where these are one process's share of it.
    """

    inputs: Any
    targets: Tensor
    indices: npt.NDArray[np.int64]
    global_indices: npt.NDArray[np.int64] | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(
            move(self.inputs, device), self.targets.to(device, non_blocking=True), self.indices, self.global_indices
        )


def move(inputs: Any, device: torch.device) -> Any:
    """Return a backbone's input (a tensor or a tuple of tensors) on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return tuple(move(item, device) for item in inputs)


class TimedIterator(Iterator[Batch]):
    """Batches, and how long one has waited for them.

    Args:
        batches: To be given on.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.seconds = 0.0
        self._batches = batches

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started
