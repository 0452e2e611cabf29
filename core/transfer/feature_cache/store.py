"""Stored features on disk."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.data.loader import Loader
from transfer.errors import TrainingError, TransferError
from transfer.feature_cache.prefix import FORMAT, KEY_DIGITS, FrozenPrefix
from transfer.system.atomic_files import flush_folder, read_json, write_json

STALE_SECONDS = 24 * 3600.0
"""A temporary folder that nobody has written to for so long was left by a crash."""
_ENTRY = re.compile(rf"[0-9a-f]{{{KEY_DIGITS}}}")
_TEMPORARY = re.compile(rf"\.[0-9a-f]{{{KEY_DIGITS}}}\.[0-9a-f]{{32}}")


def cache_folder() -> Path:
    """Return the folder of all entries: ``$TRANSFER_CACHE``, else ``transfer/features`` in the user's cache folder."""
    chosen = os.environ.get("TRANSFER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transfer" / "features"


@dataclass(frozen=True)
class Entry:
    """The features of every example of a split, memory-mapped.

    Args:
        folder: Where it is.
        tensors: What the last stage of the prefix returned, (N, ...) each; or, where steps differ in number, all real
            steps in a row, (sum of steps, ...).
        rows: int64 (N,), the row of each example.
        offsets: int64 (N + 1,), where each row's steps begin; None where every row has the same shape.
        pair: The prefix returns a tuple, not a tensor.
    """

    folder: Path
    tensors: tuple[Tensor, ...]
    rows: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64] | None
    pair: bool

    def take(self, indices: npt.NDArray[np.int64]) -> Any:
        """Return the features of some examples as the next stage wants them: a tensor or a tuple of tensors."""
        rows = self.rows[indices]
        if self.offsets is None:
            found = tuple(tensor[torch.from_numpy(rows)] for tensor in self.tensors)
            return found if self.pair else found[0]
        return pad([self.steps(index) for index in indices])

    def steps(self, index: int) -> Tensor:
        """Return the real steps (T, ...) of one example, where examples differ in number."""
        assert self.offsets is not None
        row = self.rows[index]
        return self.tensors[0][self.offsets[row] : self.offsets[row + 1]]


def pad(steps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return steps (T, ...) of B examples as (B, T, ...), zero after the last real step, and their mask (B, T)."""
    return torch.nn.utils.rnn.pad_sequence(list(steps), batch_first=True), _real(torch.tensor([len(s) for s in steps]))


def _real(lengths: Tensor, longest: int | None = None) -> Tensor:
    """Return the mask (B, T) of B examples with so many real steps (B,)."""
    return torch.arange(int(lengths.max()) if longest is None else longest) < lengths[:, None]


class FeatureCache:
    """All entries of a folder.

    Args:
        limit_bytes: After a new entry those used longest ago are dropped until all fit.
        verify: Recompute a sample of every entry that is used, and refuse one that differs.
        folder: Where the entries are; by default :func:`cache_folder`.
    """

    def __init__(self, limit_bytes: int, *, verify: bool = False, folder: Path | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.verify = verify
        self.folder = folder or cache_folder()

    def features(self, prefix: FrozenPrefix, loader: Loader, *, view: int | None = None, views: int = 1) -> Entry | str:
        """Return the prefix's features of a split, from the cache or computed now; or the reason why there are none.

        Args:
            prefix: The frozen stages.
            loader: The split's batches; their order and size do not matter here.
            view: Which augmented view of the examples; None for the examples as they are.
            views: How many are wanted: together they must fit, or each would drop the one before it.

        Raises:
            TrainingError: An entry is not what the prefix gives (verify mode).
        """
        key = prefix.key(loader, view)
        entry: Entry | str | None = self._open(self.folder / key)
        if entry is None:
            try:
                entry = self._write(key, prefix, loader, view, views)
            except OSError as error:  # the disk is full, or the folder is not ours to write: training goes on without
                return f"{error.filename or self.folder} cannot be written: {error.strerror}"
        if self.verify and isinstance(entry, Entry):
            self._compare(entry, prefix, loader, view)
        return entry

    def entries(self) -> list[dict[str, Any]]:
        """List all entries, the one used last first: ``key``, ``bytes``, ``used`` (seconds since the epoch), what."""
        found = []
        for path in self._ours(_ENTRY):
            try:
                described = read_json(path / "entry.json", "the entry is incomplete")
                size = sum(file.stat().st_size for file in path.iterdir())
                used = (path / "entry.json").stat().st_mtime
                what = described["what"]
                if not isinstance(what["examples"], int) or not all(isinstance(name, str) for name in what["stages"]):
                    raise TypeError("the entry is damaged")
                found.append({**what, "key": path.name, "bytes": size, "used": used, "view": what["view"]})
            except (TransferError, OSError, KeyError, TypeError):  # damaged, or another run has just dropped it
                self._drop(path)
        return sorted(found, key=lambda entry: -entry["used"])

    def clear(self) -> int:
        """Drop every entry and everything half written; return how many bytes that freed."""
        size = 0
        for path in [*self._ours(_ENTRY), *self._ours(_TEMPORARY)]:
            with suppress(OSError):
                size += sum(file.stat().st_size for file in path.iterdir())
            self._drop(path)
        return size

    def _ours(self, name: re.Pattern[str]) -> list[Path]:
        # The folder is the user's choice and may hold other things, which are none of our business.
        return [path for path in self.folder.glob("*") if name.fullmatch(path.name)]

    def _drop(self, path: Path) -> None:
        """Remove a folder. A run that has mapped its files keeps them until it ends: the kernel frees them then."""
        aside = self.folder / f".{path.name.strip('.')[:KEY_DIGITS]}.{uuid.uuid4().hex}"
        with suppress(OSError):
            path.rename(aside)  # in one go, so that nobody ever finds half an entry
        shutil.rmtree(aside, ignore_errors=True)

    def _open(self, path: Path) -> Entry | None:
        """Return an entry that is there and whole; one that is damaged is dropped."""
        if not path.is_dir():
            return None
        try:
            described = read_json(path / "entry.json", "the entry is incomplete")
            for name, digest in described["sha256"].items():
                with (path / Path(name).name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise OSError(f"{name} is damaged")
            entry = _map(path, described)
        # Whatever is wrong with an entry, it can be computed again.
        except Exception:
            self._drop(path)
            return None
        with suppress(OSError):  # somebody else's folder, which may be read alone
            os.utime(path / "entry.json")  # used now: the last to be evicted
        return entry

    def _write(self, key: str, prefix: FrozenPrefix, loader: Loader, view: int | None, views: int) -> Entry | str:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        temporary = self.folder / f".{key}.{uuid.uuid4().hex}"
        temporary.mkdir()
        try:
            described = _store(temporary, prefix, loader, view, self.limit_bytes // views)
            if isinstance(described, str):
                return described
            write_json(temporary / "entry.json", described)
            flush_folder(temporary)
            # Mapped before anybody else can find it, and drop it.
            entry = replace(_map(temporary, described), folder=self.folder / key)
            try:
                temporary.rename(self.folder / key)
            except OSError:  # another run was first, with the same content
                if not (self.folder / key / "entry.json").is_file():
                    raise
            flush_folder(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._evict(keep=key)
        return entry

    def _sweep(self) -> None:
        for path in self._ours(_TEMPORARY):
            with suppress(OSError):  # another run has just renamed it
                newest = max((file.stat().st_mtime for file in path.iterdir()), default=path.stat().st_mtime)
                if time.time() - newest > STALE_SECONDS:
                    self._drop(path)

    def _evict(self, keep: str) -> None:
        total = 0
        for entry in self.entries():
            total += entry["bytes"]
            if total > self.limit_bytes and entry["key"] != keep:
                self._drop(self.folder / entry["key"])

    def _compare(self, entry: Entry, prefix: FrozenPrefix, loader: Loader, view: int | None) -> None:
        ((indices, fresh),) = prefix.run(loader, view, most=1)
        stored, fresh = _tuple(entry.take(indices)), _tuple(fresh)
        if entry.offsets is not None:  # what stands at padding is not kept
            stored, fresh = ((values[mask],) for values, mask in (stored, fresh))
        for one, other in zip(stored, fresh, strict=True):
            if one.shape != other.shape or not torch.allclose(one.float(), other.float(), rtol=1e-4, atol=1e-5):
                raise TrainingError(
                    "stored features differ from what the frozen stages give now",
                    where=str(entry.folder),
                    fix="a stage or the preprocessing is not deterministic: set train.cache: off, and clear the cache",
                )


def _store(
    folder: Path, prefix: FrozenPrefix, loader: Loader, view: int | None, limit_bytes: int
) -> dict[str, Any] | str:
    """Write the features of all examples; return what ``entry.json`` says, or why they cannot be kept."""
    count = len(loader.split)
    order: list[npt.NDArray[np.int64]] = []
    lengths: list[npt.NDArray[np.int64]] = []
    files: list[Any] = []
    shapes: list[list[int]] = []
    kinds: list[str] = []
    pair = ragged = False
    written = 0
    try:
        for indices, features in prefix.run(loader, view):
            tensors = _tuple(features)
            if not all(isinstance(tensor, Tensor) for tensor in tensors):
                return f"what {prefix.stages[-1]} passes on is more than a tensor or a tuple of tensors"
            if not order:
                pair = isinstance(features, tuple)
                ragged = _is_sequence(tensors)
                tensors = tensors[:1] if ragged else tensors
                shapes = [list(t.shape[2:] if ragged else t.shape[1:]) for t in tensors]
                kinds = [str(t.dtype).removeprefix("torch.") for t in tensors]
                files = [(folder / f"{i}.bin").open("wb") for i in range(len(tensors))]
            order.append(indices)
            if ragged:
                values, mask = features
                steps = mask.sum(1)
                if not torch.equal(mask, _real(steps, mask.shape[1])):
                    return f"what {prefix.stages[-1]} returns has padding elsewhere than after the last step"
                lengths.append(steps.numpy())
                parts: tuple[Tensor, ...] = (values[mask],)
            else:
                parts = tensors
            for tensor, shape, file in zip(parts, shapes, files, strict=True):
                if list(tensor.shape[1:]) != shape or (not ragged and len(tensor) != len(indices)):
                    return f"what {prefix.stages[-1]} returns differs in shape between batches"
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                written += tensor.numel() * tensor.element_size()
            # Long examples come first: of those that differ in length, the first say little of the rest.
            expected = written if ragged else written / sum(map(len, order)) * count
            if expected > limit_bytes:
                size, limit = f"{'more than' if ragged else 'about'} {expected / 2**30:.2g}", limit_bytes / 2**30
                return f"it would take {size} GiB, and train.cache_limit_gib leaves {limit:.2g}"
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files:
            file.close()
    np.save(folder / "order.npy", np.concatenate(order))
    if ragged:
        np.save(folder / "lengths.npy", np.concatenate(lengths))
    digests = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    what = {"stages": prefix.stages, "examples": count, "view": view, "fields": list(loader.fields)}
    return {"format": FORMAT, "shapes": shapes, "kinds": kinds, "pair": pair, "sha256": digests, "what": what}


def _map(folder: Path, described: Mapping[str, Any]) -> Entry:
    order = np.load(folder / "order.npy", allow_pickle=False)
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))
    offsets = None
    count = len(order)
    if (folder / "lengths.npy").is_file():
        offsets = np.concatenate([[0], np.load(folder / "lengths.npy", allow_pickle=False).cumsum()])
        count = int(offsets[-1])
    tensors = []
    for number, (shape, kind) in enumerate(zip(described["shapes"], described["kinds"], strict=True)):
        size = count * math.prod(shape)
        flat = torch.from_file(str(folder / f"{number}.bin"), size=size, dtype=getattr(torch, kind))
        tensors.append(flat.view(count, *shape))
    return Entry(folder, tuple(tensors), rows, offsets, bool(described["pair"]))


def _tuple(features: Any) -> tuple[Tensor, ...]:
    return features if isinstance(features, tuple) else (features,)


def _is_sequence(tensors: tuple[Tensor, ...]) -> bool:
    """Tell a pair of values (B, T, ...) and their mask (B, T), whose T differs between batches."""
    if len(tensors) != 2:
        return False
    values, mask = tensors
    return mask.dtype == torch.bool and mask.dim() == 2 and values.shape[:2] == mask.shape
