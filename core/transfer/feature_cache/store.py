"""Cached features on disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.config.train_settings import Precision
from transfer.data.loader import Loader
from transfer.errors import TrainingError, TransferError
from transfer.feature_cache.prefix import BATCH_SIZE, FORMAT, FrozenPrefix
from transfer.system.atomic_files import read_json, write_json
from transfer.system.directory_cache import DirectoryCache
from transfer.system.file_schema import FileSchema, checked
from transfer.system.user_folders import cache_folder

VERIFY_TOLERANCE: Mapping[Precision, float] = {"fp32": 5e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference of recomputed features, relative to the largest feature, if the bits are not compared. In fp32, a
GPU multiplies in TF32 (10 bits of mantissa), and each process may choose other kernels."""
DEVICE_MEMORY_FRACTION = 0.25
"""Fraction of the free memory of a GPU that the features of one split may take to be kept there."""


@dataclass(frozen=True)
class TensorLayout:
    """Layout of one tensor that a stage passes on.

    Args:
        name: Name of its file in the entry, without the suffix.
        dtype: Data type.
        shape: Size of each axis. ``"B"`` is the axis of examples and ``"T"`` an axis of steps, whose size differs
            between batches. A tensor without ``"B"`` is a table: all examples have it in common.
        is_mask: Whether it is the mask (B, T). The lengths of the sequences are stored instead.
        fill: Value at padding.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    is_mask: bool = False
    fill: float | int = 0

    @property
    def is_table(self) -> bool:
        """Whether all examples have the tensor in common."""
        return "B" not in self.shape

    @property
    def step_axis(self) -> int | None:
        """The axis of steps of a tensor that differs between examples; None if its shape is fixed."""
        return self.shape.index("T") if not self.is_table and "T" in self.shape else None

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """Sizes of the axes other than examples and steps."""
        return tuple(size for size in self.shape if isinstance(size, int))

    def sizes(self, examples: int, steps: int) -> tuple[int, ...]:
        """Return the shape for a number of examples and of steps."""
        return tuple({"B": examples, "T": steps}[size] if isinstance(size, str) else size for size in self.shape)

    def cut(self, table: Tensor, steps: int) -> Tensor:
        """Return the first steps of a table, along all of its axes of steps."""
        return table[tuple(slice(steps if size == "T" else None) for size in self.shape)]

    def to_json(self) -> dict[str, Any]:
        """Return the content for ``entry.json``."""
        # As text, because JSON has no infinity, which is a usual value of masks at padding.
        dtype = str(self.dtype).removeprefix("torch.")
        return {**vars(self), "dtype": dtype, "shape": list(self.shape), "fill": str(self.fill)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TensorLayout:
        """Return the layout from its content in ``entry.json``."""
        dtype: torch.dtype = getattr(torch, content["dtype"])
        fill = float(content["fill"]) if dtype.is_floating_point else int(content["fill"])
        return cls(str(content["name"]), dtype, tuple(content["shape"]), bool(content["is_mask"]), fill)


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
            outputs.append(_mask(torch.from_numpy(lengths)))
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


def _mask(lengths: Tensor, longest: int | None = None) -> Tensor:
    """Return the mask (B, T) of B sequences with these lengths (B,); T is ``longest``, or the largest length."""
    return torch.arange(int(lengths.max()) if longest is None else longest) < lengths[:, None]


class _What(FileSchema):
    """Block ``what`` of ``entry.json``."""

    stages: list[str]
    examples: int
    view: int | None = None
    fields: list[str] = []


class FeatureCache:
    """The cache of features on disk.

    Args:
        limit_bytes: Size limit of all entries; the least recently used ones beyond it are dropped.
        verify: Whether to recompute a sample of each entry that is used, and to raise an error if it differs.
        folder: Folder of the entries. None uses ``$TRANSFER_CACHE``, or ``transfer/features`` in the user's cache
            folder.
        progress: Function that is called after each computed batch with its number, from 1, and the number of batches
            of all views.
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        verify: bool = False,
        folder: Path | None = None,
        progress: Callable[[int, int], None] = lambda step, steps: None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.verify = verify
        self.progress = progress
        self.folder = folder or cache_folder("features")
        self._folders = DirectoryCache(self.folder, limit_bytes)

    def load_or_compute(
        self, prefix: FrozenPrefix, loader: Loader, *, view: int | None = None, views: int = 1
    ) -> Entry | str:
        """Return the features of a split, loaded from the cache or computed now; or the reason why there are none.

        Args:
            prefix: The frozen stages.
            loader: Batches of the split. Their order and size do not change the features.
            view: Index of an augmented view of the examples. None uses the examples without augmentation.
            views: Number of views that are cached together. They share the size limit, because otherwise each view
                would evict the one before it.

        Raises:
            TrainingError: The entry differs from the output of the prefix (only with ``verify``).
        """
        try:
            key = prefix.key(loader, view)
        except RecursionError:
            return "the attributes of a stage or of the preprocessing are nested too deeply for a cache key"
        entry: Entry | str | None = self._open(self.folder / key, len(loader.split))
        if entry is None:
            try:
                entry = self._compute(key, prefix, loader, view, views)
            except OSError as error:  # a full disk or a read-only folder: training continues without the cache
                return f"{error.filename or self.folder} cannot be written: {error.strerror}"
        if self.verify and isinstance(entry, Entry):
            self._compare(entry, prefix, loader, view)
        return entry

    def entries(self) -> list[dict[str, Any]]:
        """Return the metadata of all entries, the most recently used first.

        Each has ``key``, ``bytes``, ``used`` (seconds since the epoch), ``stages``, ``examples``, ``fields`` and
        ``view``. Damaged entries are dropped.
        """
        listed = []
        for cached in self._folders.entries():
            try:
                what = read_json(cached.path / "entry.json", "the entry is incomplete").get("what", {})
                view = checked(what, _What, str(cached.path)).view
                listed.append({**what, "key": cached.key, "bytes": cached.bytes, "used": cached.used, "view": view})
            except (TransferError, OSError):  # damaged, or just dropped by another process
                self._folders.drop(cached.key)
        return listed

    def clear(self) -> int:
        """Drop all entries, complete or not; return the number of bytes freed."""
        return self._folders.clear()

    def _open(self, path: Path, count: int) -> Entry | None:
        """Return an entry of ``count`` examples if it exists and is complete; drop it if it is damaged."""
        if self._folders.get(path.name) is None:  # marks the entry as used
            return None
        try:
            described = read_json(path / "entry.json", "the entry is incomplete")
            # All files are read once to check them. This warms the page cache, which training then reads from.
            for name, digest in described["sha256"].items():
                with (path / Path(name).name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise OSError(f"{name} is damaged")
            entry = _map(path, described)
            if len(entry.rows) != count:
                raise ValueError("the entry has another number of examples")
        # Somebody may have edited the files, so anything may be raised. A dropped entry is only computed again.
        except Exception:
            self._folders.drop(path.name)
            return None
        return entry

    def _compute(self, key: str, prefix: FrozenPrefix, loader: Loader, view: int | None, views: int) -> Entry | str:
        entry: Entry | None = None
        steps = math.ceil(len(loader.split) / BATCH_SIZE)

        def batches() -> Iterator[tuple[npt.NDArray[np.int64], Any]]:
            for number, batch in enumerate(prefix.run(loader, view), 1):
                yield batch
                self.progress((view or 0) * steps + number, views * steps)

        def write(folder: Path) -> None:
            nonlocal entry
            described = _write_features(folder, prefix, loader, view, self.limit_bytes // views, batches())
            write_json(folder / "entry.json", described)
            # Mapped before the rename: after it, another process may evict the entry at any time.
            entry = replace(_map(folder, described), folder=self.folder / key)

        try:
            self._folders.add(key, write)
        except _NotCacheableError as error:
            return str(error)
        # None only if the disk was full while another process finished the same entry.
        return entry or self._open(self.folder / key, len(loader.split)) or "another process has dropped the entry"

    def _compare(self, entry: Entry, prefix: FrozenPrefix, loader: Loader, view: int | None) -> None:
        # The first batch of the same size and order as when the entry was written: another one would round differently.
        ((indices, features),) = prefix.run(loader, view, limit=1)
        stored, fresh = _as_tuple(entry.take(indices)), _as_tuple(features)
        # On a CPU the same batch in float32 gives the same bits. A GPU may add in another order.
        exact = prefix.precision == "fp32" and prefix.device.type == "cpu"
        mask = next((one for one, layout in zip(stored, entry.layouts, strict=True) if layout.is_mask), None)
        for layout, one, other in zip(entry.layouts, stored, fresh, strict=True):
            equal = one.shape == other.shape and one.dtype == other.dtype
            if equal and (axis := layout.step_axis) is not None and not layout.is_mask:
                # Outputs at padding are not stored. A tensor of other steps than those of the mask has another shape.
                one, other = (tensor.movedim(axis, 1)[mask] for tensor in (one, other))
            if equal and not torch.equal(one, other):
                one, other = one.float(), other.float()
                tolerance = 0.0 if exact else VERIFY_TOLERANCE[prefix.precision]
                equal = bool((one - other).abs().max() <= tolerance * one.abs().max())
            if not equal:
                raise TrainingError(
                    "cached features differ from the current output of the frozen stages",
                    where=str(entry.folder),
                    fix="a stage or the preprocessing is not deterministic: set train.cache: off, and clear the cache",
                )


class _NotCacheableError(Exception):
    """The outputs of a prefix cannot be cached; the message is the reason."""


def _write_features(
    folder: Path,
    prefix: FrozenPrefix,
    loader: Loader,
    view: int | None,
    limit_bytes: int,
    batches: Iterable[tuple[npt.NDArray[np.int64], Any]],
) -> dict[str, Any]:
    """Write the features of all examples into a folder; return the content of ``entry.json``.

    Raises:
        _NotCacheableError: The outputs are not tensors, differ in shape between batches, or need too much space.
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
            tensors = _as_tuple(features)
            if not all(isinstance(tensor, Tensor) for tensor in tensors):
                raise _NotCacheableError(f"{output} is neither a tensor nor a tuple of tensors")
            # The first batch determines the layout of the entry; later batches must have the same.
            if not order:
                is_tuple = isinstance(features, tuple)
                mask_at = _find_mask(tensors)
                longest = 0 if mask_at is None else tensors[mask_at].shape[1]
                # Another number of examples and, if lengths differ, of steps: which axes of the tensors change?
                examples = 2 if len(indices) != 2 else 3
                other = _as_tuple(prefix.probe(loader, view, examples))
                layouts = _layouts(tensors, other, (len(indices), examples), mask_at)
                if layouts is None:
                    raise _NotCacheableError(f"{output} differs in shape between batches")
                files = [_TensorFile(folder, layout) for layout in layouts]
            order.append(indices)
            mask = None if mask_at is None else tensors[mask_at]
            if mask is not None:
                steps = mask.sum(1)
                if not torch.equal(mask, _mask(steps, mask.shape[1])):
                    raise _NotCacheableError(f"{output} has padding before the last step of a sequence")
                # Padding is not stored: (B, T, D) and the mask (B, T) become (sum of steps, D), and the lengths (B,).
                lengths.append(steps.numpy())
            if len(tensors) != len(files):
                raise _NotCacheableError(f"{output} differs in shape between batches")
            for tensor, file in zip(tensors, files, strict=True):
                if not file.write(tensor, len(indices), mask):
                    raise _NotCacheableError(f"{output} differs in shape between batches")
            tables = sum(file.written for file in files if file.layout.is_table)
            written = sum(file.written for file in files) - tables
            # The longest sequences come first, so an estimate from them would be too high.
            expected = tables + (written / sum(map(len, order)) * count if mask is None else written)
            if expected > limit_bytes:
                size, limit = f"{'about' if mask is None else 'more than'} {expected / 2**30:.2g}", limit_bytes / 2**30
                raise _NotCacheableError(f"the features need {size} GiB, and train.cache_limit_gib allows {limit:.2g}")
    finally:
        for file in files:
            file.close()
    if lengths:
        np.save(folder / "lengths.npy", np.concatenate(lengths))
    is_ragged = len({length for batch in lengths for length in batch.tolist()}) > 1
    if is_ragged and not all(file.has_known_padding for file in files):
        raise _NotCacheableError(f"{output} has no constant value at padding")
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


def _find_mask(tensors: Sequence[Tensor]) -> int | None:
    """Return the position of the mask: a bool tensor (B, T) that is passed with values (B, T, ...)."""
    for number, mask in enumerate(tensors):
        if mask.dtype == torch.bool and mask.dim() == 2:
            values = (tensor for position, tensor in enumerate(tensors) if position != number)
            if any(tensor.shape[:2] == mask.shape for tensor in values):
                return number
    return None


def _layouts(
    tensors: Sequence[Tensor], other: Sequence[Tensor], examples: tuple[int, int], mask_at: int | None
) -> list[TensorLayout] | None:
    """Return the layouts of the tensors of a batch, by comparison with another batch; None if they do not agree.

    Args:
        tensors: Tensors of the first batch.
        other: Tensors of a batch with another number of examples.
        examples: Number of examples of both.
        mask_at: Position of the mask (B, T); None if there is no mask.
    """
    if len(tensors) != len(other) or any(a.dim() != b.dim() for a, b in zip(tensors, other, strict=True)):
        return None
    mask = None if mask_at is None else tensors[mask_at]
    steps = None if mask_at is None else (tensors[mask_at].shape[1], other[mask_at].shape[1])
    layouts = []
    for number, (one, two) in enumerate(zip(tensors, other, strict=True)):
        shape: list[int | str] = []
        for axis, sizes in enumerate(zip(one.shape, two.shape, strict=True)):
            if axis == 0 and sizes == examples:
                shape.append("B")
            # If both batches have as many steps, only the axis next to the examples is one of steps.
            elif sizes == steps and (
                sizes[0] != sizes[1] or (axis == 1 and mask is not None and one.shape[:2] == mask.shape)
            ):
                shape.append("T")
            elif sizes[0] == sizes[1]:
                shape.append(sizes[0])
            else:
                return None
        if shape[:1] == ["B"] and shape.count("T") > 1:
            return None  # padding along two axes is not restored
        layouts.append(TensorLayout(str(number), one.dtype, tuple(shape), number == mask_at))
    return layouts


def _map(folder: Path, described: Mapping[str, Any]) -> Entry:
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


def _as_tuple(features: Any) -> tuple[Any, ...]:
    return features if isinstance(features, tuple) else (features,)
