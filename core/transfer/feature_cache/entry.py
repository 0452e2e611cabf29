"""Entries of the feature cache: memory-mapped features of every example of a split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.feature_cache.tensor_layout import TensorLayout, mask_of

DEVICE_MEMORY_FRACTION = 0.25
"""Fraction of the free memory of a GPU that the features of one split may take to be kept there."""


@dataclass(frozen=True)
class Entry:
    """The features of every example of a split, memory-mapped.

    Args:
        folder: Folder of the entry.
        tensors: Outputs of the last stage of the prefix: (N, ...), or for sequences of different lengths the real steps
            of all examples, concatenated, (sum of steps, ...). A table has its own shape. The mask is empty.
        rows: Row of each example in the tensors, int64 (N,).
        offsets: First step of each row, int64 (N + 1,). None if all rows have the same shape.
        is_tuple: Whether the prefix returns a tuple of tensors instead of a tensor.
        layouts: Layout of each tensor.
    """

    folder: Path
    tensors: tuple[Tensor, ...]
    rows: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64] | None
    is_tuple: bool
    layouts: tuple[TensorLayout, ...] = ()

    def take(self, indices: npt.NDArray[np.int64]) -> Any:
        """Return the features of some examples as the input of the next stage: a tensor or a tuple of tensors."""
        return take([self], np.zeros(len(indices), dtype=np.int64), indices)

    def on_device(self, device: torch.device) -> Entry:
        """Return the entry with its tensors on a GPU if they fit well, so that batches need no copy.

        Args:
            device: Device of the model.
        """
        # Sequences stay on the CPU: padding a batch of them would start a kernel for each example.
        if device.type != "cuda" or self.offsets is not None:
            return self
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)
        free, _ = torch.cuda.mem_get_info(device)
        if size > DEVICE_MEMORY_FRACTION * free:
            return self
        return replace(self, tensors=tuple(tensor.to(device) for tensor in self.tensors))


def take(entries: Sequence[Entry], views: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]) -> Any:
    """Return the features of B examples as the input of the next stage: a tensor or a tuple of tensors.

    Args:
        entries: One entry per view of the split.
        views: Index of the entry for each example, int64 (B,).
        indices: Index of each example in the split, int64 (B,).
    """
    first = entries[0]
    # One read per view is faster than one per example. `order` puts the rows back into the order of the batch.
    drawn = np.unique(views) if len(entries) > 1 else views[:1]
    members = [np.flatnonzero(views == view) for view in drawn]
    order = torch.from_numpy(np.argsort(np.concatenate(members))) if len(drawn) > 1 else None
    # Features are stored in the order of computation (longest texts first); `rows` maps indices to that order.
    rows = [entries[view].rows[indices[member]] for view, member in zip(drawn, members, strict=True)]
    starts, ends = np.zeros((2, len(indices)), dtype=np.int64)
    if first.offsets is None:
        device = first.tensors[0].device  # a GPU, if the features fit into its memory
        reads = [torch.from_numpy(row).to(device, non_blocking=True) for row in rows]
    else:
        reads = [torch.from_numpy(row) for row in rows]
        for view, member, row in zip(drawn, members, rows, strict=True):
            offsets: Any = entries[view].offsets
            starts[member], ends[member] = offsets[row], offsets[row + 1]
    lengths = ends - starts
    longest = int(lengths.max(initial=0))
    spans = list(zip(views.tolist(), starts.tolist(), ends.tolist(), strict=True))
    outputs = []
    for number, layout in enumerate(first.layouts):
        if layout.is_mask:
            outputs.append(mask_of(torch.from_numpy(lengths)))
        elif layout.is_table:
            table = max((entry.tensors[number] for entry in entries), key=Tensor.numel)
            # A copy, because a stage may change its input in place.
            outputs.append(layout.cut(table, longest).clone())
        elif (axis := layout.step_axis) is not None:
            steps = [entries[view].tensors[number][start:end] for view, start, end in spans]
            padded = torch.nn.utils.rnn.pad_sequence(steps, batch_first=True, padding_value=layout.fill)
            outputs.append(padded.movedim(1, axis))
        else:
            parts = [entries[view].tensors[number][read] for view, read in zip(drawn, reads, strict=True)]
            outputs.append(parts[0] if order is None else torch.cat(parts)[order])
    return tuple(outputs) if first.is_tuple else outputs[0]


def open_entry(folder: Path, described: Mapping[str, Any]) -> Entry:
    """Map the files of an entry into memory.

    Args:
        folder: Folder of the entry.
        described: Content of its ``entry.json``.

    Raises:
        ValueError: The files do not fit each other.
    """
    # allow_pickle=False: a file in the cache folder must not be able to run code.
    order = np.load(folder / "order.npy", allow_pickle=False)
    # Any other index would read outside of the mapped files.
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ValueError("the order is no permutation of the examples")
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))
    offsets = None
    count = len(order)
    if (folder / "lengths.npy").is_file():
        lengths = np.load(folder / "lengths.npy", allow_pickle=False)
        if lengths.shape != order.shape or lengths.min(initial=0) < 0:
            raise ValueError("the lengths do not fit the examples")
        offsets = np.concatenate([[0], lengths.cumsum()])
        count = int(offsets[-1])
    longest = int(described["longest"])
    layouts = tuple(map(TensorLayout.from_json, described["tensors"]))
    tensors = []
    for layout in layouts:
        leading = () if layout.is_table else (count if layout.step_axis is not None else len(order),)
        shape = layout.sizes(0, longest) if layout.is_table else (*leading, *layout.inner_shape)
        size = 0 if layout.is_mask else math.prod(shape)
        if size == 0:  # the mask, or no features: an empty file cannot be mapped
            tensors.append(torch.empty(0 if layout.is_mask else shape, dtype=layout.dtype))
            continue
        # Memory-mapped: the features may be larger than the memory, and processes share the pages.
        flat = torch.from_file(str(folder / f"{Path(layout.name).name}.bin"), size=size, dtype=layout.dtype)
        tensors.append(flat.view(shape))
    return Entry(folder, tuple(tensors), rows, offsets, bool(described["is_tuple"]), layouts)
