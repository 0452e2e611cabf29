"""A cache on disk with one folder per key, shared between processes."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transfer.system.atomic_files import atomic_folder

KEY_DIGITS = 40
STALE_SECONDS = 24 * 3600.0
"""A temporary folder without a write for this long was left by a process that crashed."""
_KEY = rf"(?:[a-z]+-)?[0-9a-f]{{{KEY_DIGITS}}}"
_ENTRY = re.compile(_KEY)
_TEMPORARY = re.compile(rf"\.{_KEY}\.[0-9a-f]{{32}}")


@dataclass(frozen=True)
class CachedFolder:
    """An entry of a :class:`DirectoryCache`.

    Args:
        key: Key of the entry.
        path: Folder of the entry.
        bytes: Size of all files of the entry.
        used: Time of the last use, in seconds since the epoch.
    """

    key: str
    path: Path
    bytes: int
    used: float


class DirectoryCache:
    """A cache of folders by key: entries are written atomically, and the least recently used ones are evicted.

    Several processes may use one cache at the same time. An entry is written to a temporary folder, flushed and
    renamed, so a crash never leaves an incomplete entry. If two processes write one key, the second one discards its
    own. The folder may contain other files and folders, which are left unchanged.

    Args:
        folder: Folder of all entries. It is created when the first entry is written.
        limit_bytes: Size limit of all entries together. After each new entry, the least recently used entries beyond
            the limit are dropped.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def path(self, key: str) -> Path:
        """Return the folder of a key, whether it exists or not.

        Args:
            key: 40 hexadecimal digits, optionally after a kind in lower-case letters and a dash
                (``vocabulary-0123...``).

        Raises:
            ValueError: The key has another form.
        """
        if not _ENTRY.fullmatch(key):
            raise ValueError(
                f"invalid cache key {key!r}: expected 40 hexadecimal digits, optionally after a kind and -"
            )
        return self.folder / key

    def get(self, key: str) -> Path | None:
        """Return the folder of an entry and mark it as used now; None if there is no such entry."""
        path = self.path(key)
        if not path.is_dir():
            return None
        # A pipe would block its reader, and a link could lead anywhere: entries contain only regular files.
        if path.is_symlink() or not all(file.is_file() and not file.is_symlink() for file in _files(path)):
            self._remove(path)
            return None
        with suppress(OSError):  # a folder of another user, which may be read-only
            os.utime(path)
        return path

    def add(self, key: str, write: Callable[[Path], None]) -> Path:
        """Write an entry, evict the least recently used entries beyond the limit, and return the folder of the entry.

        Args:
            key: Key of the entry.
            write: Function that writes the files of the entry into an empty temporary folder. If another process
                finishes the same key first, its entry stays.

        Raises:
            OSError: The entry cannot be written.
        """
        path = self.path(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        try:
            with atomic_folder(path, temporary=self._temporary_path(key)) as temporary:
                write(temporary)
        except OSError:
            if not path.is_dir():  # otherwise another process was first: the rename failed, and the content is the same
                raise
        self._evict(keep=key)
        return path

    def drop(self, key: str) -> None:
        """Remove an entry. A process that has its files open or mapped can use them until it closes them."""
        self._remove(self.path(key))

    def entries(self) -> list[CachedFolder]:
        """Return all entries, the most recently used first."""
        entries = []
        for path in self._matching(_ENTRY):
            with suppress(OSError):  # another process has just dropped it
                size = sum(file.stat().st_size for file in path.iterdir())
                entries.append(CachedFolder(path.name, path, size, path.stat().st_mtime))
        return sorted(entries, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove all entries and all temporary folders; return the number of bytes freed."""
        size = 0
        for path in [*self._matching(_ENTRY), *self._matching(_TEMPORARY)]:
            with suppress(OSError):
                size += sum(file.stat().st_size for file in path.iterdir())
            self._remove(path)
        return size

    def _matching(self, name: re.Pattern[str]) -> list[Path]:
        return [path for path in self.folder.glob("*") if name.fullmatch(path.name)]

    def _temporary_path(self, key: str) -> Path:
        return self.folder / f".{key}.{uuid.uuid4().hex}"

    def _remove(self, path: Path) -> None:
        aside = self._temporary_path(path.name.strip(".").partition(".")[0])
        with suppress(OSError):
            path.rename(aside)  # in one step: other processes see the complete entry or none
        if aside.is_symlink():
            aside.unlink(missing_ok=True)
        shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove the temporary folders of processes that crashed."""
        for path in self._matching(_TEMPORARY):
            with suppress(OSError):  # another process has just renamed it
                newest = max((file.stat().st_mtime for file in path.iterdir()), default=path.stat().st_mtime)
                if time.time() - newest > STALE_SECONDS:
                    self._remove(path)

    def _evict(self, keep: str) -> None:
        total = 0
        # The most recently used first, so that the sum exceeds the limit at the least recently used ones.
        for entry in self.entries():
            total += entry.bytes
            if total > self.limit_bytes and entry.key != keep:
                self._remove(entry.path)


def _files(folder: Path) -> list[Path]:
    """Return the entries of a folder; none if another process has just dropped it."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []
