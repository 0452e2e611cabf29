"""The cache of features on disk: lookup, computation, verification and eviction of entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from transfer.config.train_settings import Precision
from transfer.data.loader import Loader
from transfer.errors import TrainingError, TransferError
from transfer.feature_cache.entry import Entry, open_entry
from transfer.feature_cache.entry_writer import NotCacheableError, write_entry
from transfer.feature_cache.prefix import BATCH_SIZE, FrozenPrefix
from transfer.feature_cache.tensor_layout import as_tuple
from transfer.system.atomic_files import file_sha256, read_json, write_json
from transfer.system.directory_cache import DirectoryCache
from transfer.system.file_schema import FileSchema, checked
from transfer.system.user_folders import cache_folder

VERIFY_TOLERANCE: Mapping[Precision, float] = {"fp32": 5e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference of recomputed features, relative to the largest feature, if the bits are not compared. In fp32, a
GPU multiplies in TF32 (10 bits of mantissa), and each process may choose other kernels."""


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
        if loader.pool is not None:
            pool, rows = loader.pool
            pooled = self.load_or_compute(prefix, pool, view=view, views=views)
            return pooled if isinstance(pooled, str) else replace(pooled, rows=pooled.rows[rows])
        try:
            # The key digests attributes recursively, which plugins may nest deeper than Python's limit.
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
                if file_sha256(path / Path(name).name) != digest:
                    raise OSError(f"{name} is damaged")
            entry = open_entry(path, described)
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
            described = write_entry(folder, prefix, loader, view, self.limit_bytes // views, batches())
            write_json(folder / "entry.json", described)
            # Mapped before the rename: after it, another process may evict the entry at any time.
            entry = replace(open_entry(folder, described), folder=self.folder / key)

        try:
            self._folders.add(key, write)
        except NotCacheableError as error:
            return str(error)
        # None only if the disk was full while another process finished the same entry.
        return entry or self._open(self.folder / key, len(loader.split)) or "another process has dropped the entry"

    def _compare(self, entry: Entry, prefix: FrozenPrefix, loader: Loader, view: int | None) -> None:
        # The first batch of the same size and order as when the entry was written: another one would round differently.
        ((indices, features),) = prefix.run(loader, view, limit=1)
        stored, fresh = as_tuple(entry.take(indices)), as_tuple(features)
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
