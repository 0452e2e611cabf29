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
"""Function from the indices of a batch to those that this rank computes, in data-parallel training."""


@dataclass(frozen=True)
class Batch:
    """The input of one training or evaluation step.

    Args:
        inputs: Input of the backbone: a tensor or a tuple of tensors, batch first.
        targets: Targets, int64 (B,) or float32 (B, C).
        indices: Indices of the examples in their split, int64 (B,).
        global_indices: Indices of the complete batch if this one is the shard of a rank, otherwise None.
    """

    inputs: Any
    targets: Tensor
    indices: npt.NDArray[np.int64]
    global_indices: npt.NDArray[np.int64] | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device, copied asynchronously from pinned memory."""
        return Batch(
            move(self.inputs, device), self.targets.to(device, non_blocking=True), self.indices, self.global_indices
        )


def move(inputs: Any, device: torch.device) -> Any:
    """Return a backbone's input, a tensor or a tuple of tensors, on another device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return tuple(move(item, device) for item in inputs)


def tensor_bytes(inputs: Any) -> int:
    """Return the size of a backbone's input, a tensor or a tuple of tensors, in bytes."""
    if isinstance(inputs, Tensor):
        return inputs.numel() * inputs.element_size()
    return sum(map(tensor_bytes, inputs))


class TimedIterator(Iterator[Batch]):
    """Iterator of batches that measures the time spent waiting for them, in ``seconds``.

    Args:
        batches: Iterator to measure.
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
