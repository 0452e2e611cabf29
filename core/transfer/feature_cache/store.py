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
class Entry:
    """The features of every example of a split, memory-mapped.

    Args:
        folder: Folder of the entry.
        tensors: Outputs of the last stage of the prefix, (N, ...) each. For sequences of different lengths: the real
            steps of all examples, concatenated, (sum of steps, ...).
        rows: Row of each example in the tensors, int64 (N,).
        offsets: First step of each row, int64 (N + 1,). None if all rows have the same shape.
        is_tuple: Whether the prefix returns a tuple of tensors instead of a tensor.
    """

    folder: Path
    tensors: tuple[Tensor, ...]
    rows: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64] | None
    is_tuple: bool

    def take(self, indices: npt.NDArray[np.int64]) -> Any:
        """Return the features of some examples as the input of the next stage: a tensor or a tuple of tensors."""
        # Features are stored in the order of computation (longest texts first); `rows` maps indices to that order.
        rows = self.rows[indices]
        if self.offsets is None:
            index = torch.from_numpy(rows).to(self.tensors[0].device, non_blocking=True)
            tensors = tuple(tensor[index] for tensor in self.tensors)
            return tensors if self.is_tuple else tensors[0]
        return pad([self.steps(index) for index in indices])

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

    def steps(self, index: int) -> Tensor:
        """Return the real steps (T, ...) of one example of an entry of sequences."""
        assert self.offsets is not None
        row = self.rows[index]
        return self.tensors[0][self.offsets[row] : self.offsets[row + 1]]


def pad(steps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return B sequences (T, ...) as one tensor (B, T, ...), zero after the last real step, and its mask (B, T)."""
    lengths = torch.tensor([len(sequence) for sequence in steps])
    return torch.nn.utils.rnn.pad_sequence(list(steps), batch_first=True), _mask(lengths)


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
        if entry.offsets is not None:  # outputs at padding are not stored
            stored, fresh = ((values[mask],) for values, mask in (stored, fresh))
        # On a CPU the same batch in float32 gives the same bits. A GPU may add in another order.
        exact = prefix.precision == "fp32" and prefix.device.type == "cpu"
        for one, other in zip(stored, fresh, strict=True):
            equal = one.shape == other.shape and one.dtype == other.dtype
            if equal and exact:
                equal = torch.equal(one, other)
            elif equal:
                one, other = one.float(), other.float()
                equal = bool((one - other).abs().max() <= VERIFY_TOLERANCE[prefix.precision] * one.abs().max())
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
    files: list[Any] = []
    shapes: list[list[int]] = []
    dtypes: list[str] = []
    is_tuple = is_sequence = False
    written = 0
    try:
        for indices, features in batches:
            tensors = _as_tuple(features)
            if not all(isinstance(tensor, Tensor) for tensor in tensors):
                raise _NotCacheableError(f"{output} is neither a tensor nor a tuple of tensors")
            # The first batch determines the layout of the entry; later batches must have the same.
            if not order:
                is_tuple = isinstance(features, tuple)
                is_sequence = _is_sequence(tensors)
                tensors = tensors[:1] if is_sequence else tensors
                shapes = [list(t.shape[2:] if is_sequence else t.shape[1:]) for t in tensors]
                dtypes = [str(t.dtype).removeprefix("torch.") for t in tensors]
                files = [(folder / f"{i}.bin").open("wb") for i in range(len(tensors))]
            order.append(indices)
            if is_sequence:
                values, mask = features
                steps = mask.sum(1)
                if not torch.equal(mask, _mask(steps, mask.shape[1])):
                    raise _NotCacheableError(f"{output} has padding before the last step of a sequence")
                # Padding is not stored: (B, T, D) and the mask (B, T) become (sum of steps, D), and the lengths (B,).
                lengths.append(steps.numpy())
                rows: tuple[Tensor, ...] = (values[mask],)
            else:
                rows = tensors
            for tensor, shape, file in zip(rows, shapes, files, strict=True):
                if list(tensor.shape[1:]) != shape or (not is_sequence and len(tensor) != len(indices)):
                    raise _NotCacheableError(f"{output} differs in shape between batches")
                # Through bytes, because NumPy has no bfloat16.
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                written += tensor.numel() * tensor.element_size()
            # The longest sequences come first, so an estimate from them would be too high.
            expected = written if is_sequence else written / sum(map(len, order)) * count
            if expected > limit_bytes:
                size, limit = f"{'more than' if is_sequence else 'about'} {expected / 2**30:.2g}", limit_bytes / 2**30
                raise _NotCacheableError(f"the features need {size} GiB, and train.cache_limit_gib allows {limit:.2g}")
    finally:
        for file in files:
            file.close()
    np.save(folder / "order.npy", np.concatenate(order))
    if is_sequence:
        np.save(folder / "lengths.npy", np.concatenate(lengths))
    digests = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    what = {"stages": prefix.stages, "examples": count, "view": view, "fields": list(loader.fields)}
    tensors_of = {"shapes": shapes, "dtypes": dtypes, "is_tuple": is_tuple}
    return {"format": FORMAT, **tensors_of, "sha256": digests, "what": what}


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
    tensors = []
    for number, (shape, dtype) in enumerate(zip(described["shapes"], described["dtypes"], strict=True)):
        size = count * math.prod(shape)
        # Memory-mapped: the features may be larger than the memory, and processes share the pages.
        flat = torch.from_file(str(folder / f"{number}.bin"), size=size, dtype=getattr(torch, dtype))
        tensors.append(flat.view(count, *shape))
    return Entry(folder, tuple(tensors), rows, offsets, bool(described["is_tuple"]))


def _as_tuple(features: Any) -> tuple[Any, ...]:
    return features if isinstance(features, tuple) else (features,)


def _is_sequence(tensors: tuple[Tensor, ...]) -> bool:
    """Return whether the tensors are values (B, T, ...) and their mask (B, T), whose T differs between batches."""
    if len(tensors) != 2:
        return False
    values, mask = tensors
    return mask.dtype == torch.bool and mask.dim() == 2 and values.shape[:2] == mask.shape
