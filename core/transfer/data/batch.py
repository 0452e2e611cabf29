"""Batches and their transfer to a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.interfaces.preprocessing import Preprocessing, move

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
        to_device: Function that moves the inputs to a device and completes them there
            (:meth:`transfer.Preprocessing.to_device`). None only moves them.
    """

    inputs: Any
    targets: Tensor
    indices: npt.NDArray[np.int64]
    global_indices: npt.NDArray[np.int64] | None = None
    to_device: Callable[[Any, torch.device], Any] | None = None

    @classmethod
    def without_targets(cls, preprocessing: Preprocessing, encoded: Sequence[Any]) -> Batch:
        """Return a batch of encoded values for prediction.

        Args:
            preprocessing: Preprocessing that encoded the values.
            encoded: B encoded values.
        """
        count = len(encoded)
        return cls(
            preprocessing.collate(encoded), torch.empty(count), np.arange(count), to_device=preprocessing.to_device
        )

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, ready for the model; copied asynchronously from pinned memory."""
        inputs = (self.to_device or move)(self.inputs, device)
        targets = self.targets.to(device, non_blocking=True)
        return Batch(inputs, targets, self.indices, self.global_indices)

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, from which a GPU copies asynchronously. torch's DataLoader calls it."""
        return replace(self, inputs=_pinned(self.inputs), targets=self.targets.pin_memory())


def _pinned(inputs: Any) -> Any:
    return inputs.pin_memory() if isinstance(inputs, Tensor) else tuple(map(_pinned, inputs))


def copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Return an iterator of batches: on a CUDA device copied there on a stream of their own, on others as they are.

    The copy and the normalization of a batch then overlap with the computation of the batch before it, which the device
    still works on when Python asks for the next batch.
    """
    return _copied_on_own_stream(batches, device) if device.type == "cuda" else iter(batches)


def _copied_on_own_stream(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    copies, computation = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
    for batch in batches:
        try:
            with torch.cuda.stream(copies):
                moved = batch.to(device)
        except torch.cuda.OutOfMemoryError:
            yield batch  # the step copies it itself, and explains the error
            continue
        computation.wait_stream(copies)
        # The memory was allocated on the other stream: it must not be reused before the computation has ended.
        _record_stream((moved.inputs, moved.targets), computation)
        yield moved


def _record_stream(tensors: Any, stream: torch.cuda.Stream) -> None:
    if isinstance(tensors, Tensor):
        tensors.record_stream(stream)
        return
    for item in tensors:
        _record_stream(item, stream)


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
