"""Writing of an entry of the feature cache, batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.data.loader import Loader
from transfer.feature_cache.prefix import FORMAT, FrozenPrefix
from transfer.feature_cache.tensor_layout import TensorLayout, as_tuple, find_layouts, find_mask, mask_of


class NotCacheableError(Exception):
    """The outputs of a prefix cannot be cached; the message is the reason."""


def write_entry(
    folder: Path,
    prefix: FrozenPrefix,
    loader: Loader,
    view: int | None,
    limit_bytes: int,
    batches: Iterable[tuple[npt.NDArray[np.int64], Any]],
) -> dict[str, Any]:
    """Write the features of all examples into a folder; return the content of ``entry.json``.

    Raises:
        NotCacheableError: The outputs are not tensors, differ in shape between batches, or need too much space.
    """
    count = len(loader.split)
    output = f"the output of stage {prefix.stages[-1]}"
    order: list[npt.NDArray[np.int64]] = []
    lengths: list[npt.NDArray[np.int64]] = []
    files: list[_TensorFile] = []
    is_tuple = False
    mask_at: int | None = None
    longest = 0
    try:
        for indices, features in batches:
            tensors = as_tuple(features)
            if not all(isinstance(tensor, Tensor) for tensor in tensors):
                raise NotCacheableError(f"{output} is neither a tensor nor a tuple of tensors")
            # The first batch determines the layout of the entry; later batches must have the same.
            if not order:
                is_tuple = isinstance(features, tuple)
                mask_at = find_mask(tensors)
                longest = 0 if mask_at is None else tensors[mask_at].shape[1]
                # Another number of examples and, if lengths differ, of steps: which axes of the tensors change?
                examples = 2 if len(indices) != 2 else 3
                other = as_tuple(prefix.probe(loader, view, examples))
                layouts = find_layouts(tensors, other, (len(indices), examples), mask_at)
                if layouts is None:
                    raise NotCacheableError(f"{output} differs in shape between batches")
                files = [_TensorFile(folder, layout) for layout in layouts]
            order.append(indices)
            mask = None if mask_at is None else tensors[mask_at]
            if mask is not None:
                steps = mask.sum(1)
                if not torch.equal(mask, mask_of(steps, mask.shape[1])):
                    raise NotCacheableError(f"{output} has padding before the last step of a sequence")
                # Padding is not stored: (B, T, D) and the mask (B, T) become (sum of steps, D), and the lengths (B,).
                lengths.append(steps.numpy())
            if len(tensors) != len(files):
                raise NotCacheableError(f"{output} differs in shape between batches")
            for tensor, file in zip(tensors, files, strict=True):
                if not file.write(tensor, len(indices), mask):
                    raise NotCacheableError(f"{output} differs in shape between batches")
            tables = sum(file.written for file in files if file.layout.is_table)
            written = sum(file.written for file in files) - tables
            # The longest sequences come first, so an estimate from them would be too high.
            expected = tables + (written / sum(map(len, order)) * count if mask is None else written)
            if expected > limit_bytes:
                size, limit = f"{'about' if mask is None else 'more than'} {expected / 2**30:.2g}", limit_bytes / 2**30
                raise NotCacheableError(f"the features need {size} GiB, and train.cache_limit_gib allows {limit:.2g}")
    finally:
        for file in files:
            file.close()
    if lengths:
        np.save(folder / "lengths.npy", np.concatenate(lengths))
    is_ragged = len({length for batch in lengths for length in batch.tolist()}) > 1
    if is_ragged and not all(file.has_known_padding for file in files):
        raise NotCacheableError(f"{output} has no constant value at padding")
    np.save(folder / "order.npy", np.concatenate(order))
    digests = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as binary:
            digests[path.name] = hashlib.file_digest(binary, "sha256").hexdigest()
    what = {"stages": prefix.stages, "examples": count, "view": view, "fields": list(loader.fields)}
    described = [replace(file.layout, fill=file.fill or 0).to_json() for file in files]
    layout_of = {"tensors": described, "is_tuple": is_tuple, "longest": longest}
    return {"format": FORMAT, **layout_of, "sha256": digests, "what": what}


class _TensorFile:
    """The file of one tensor while it is written.

    Args:
        folder: Folder of the entry.
        layout: Layout of the tensor. Its value at padding is not known yet.
    """

    def __init__(self, folder: Path, layout: TensorLayout) -> None:
        self.layout = layout
        self.written = 0
        self.fill: float | int | None = None
        self._constant_padding = not layout.dtype.is_complex
        self._table: Tensor | None = None
        self._file = None if layout.is_mask else (folder / f"{layout.name}.bin").open("wb")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, tensor: Tensor, examples: int, mask: Tensor | None) -> bool:
        """Write the tensor of a batch; return False if it does not have the layout."""
        layout = self.layout
        steps = 0 if mask is None else mask.shape[1]
        if tensor.shape != layout.sizes(examples, steps) or tensor.dtype != layout.dtype:
            return False
        if self._file is None:
            return True
        if layout.is_table:
            if self._table is not None:  # stored once, from the longest batch: a shorter one must be its beginning
                return torch.equal(layout.cut(self._table, steps), tensor)
            self._table = tensor
        if (axis := layout.step_axis) is not None and mask is not None:
            tensor = tensor.movedim(axis, 1)
            self._record_padding(tensor[~mask] if self._constant_padding else tensor[:0])
            tensor = tensor[mask]
        # Through bytes, because NumPy has no bfloat16.
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.written += tensor.numel() * tensor.element_size()
        return True

    def _record_padding(self, padding: Tensor) -> None:
        if padding.numel():
            value = padding.reshape(-1)[0].item()
            value = int(value) if isinstance(value, bool) else value
            self.fill = value if self.fill is None else self.fill
            self._constant_padding = bool((padding == value).all()) and value == self.fill
            if not self._constant_padding:
                self.fill = None

    @property
    def has_known_padding(self) -> bool:
        """Whether padding can be restored: the value is known, or arbitrary because the next stages ignore it."""
        axis = self.layout.step_axis
        if axis is None or self.layout.is_mask or self.fill is not None:
            return True
        # States (B, T, ...) at padding are ignored by contract, so they become zero. An additive mask is not ignored.
        return axis == 1 and (len(self.layout.shape) > 2 or not self._constant_padding)
