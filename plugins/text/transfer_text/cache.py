"""What is worked out once and kept on disk: parsed word vectors, vocabularies, numericalised texts.

An entry is a folder named by the digest of all that decides its content. It is written to a temporary folder and
renamed when whole, so that a crash leaves nothing half in use, and the second of two runs that make one entry at once
drops its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

LIMIT_BYTES = 20 * 2**30
STALE_SECONDS = 24 * 3600.0
"""A temporary folder that nobody has written to for so long was left by a crash."""
KEY_DIGITS = 40
_ENTRY = re.compile(rf"[a-z]+-[0-9a-f]{{{KEY_DIGITS}}}")
_TEMPORARY = re.compile(rf"\.[a-z]+-[0-9a-f]{{{KEY_DIGITS}}}\.[0-9a-f]{{32}}")


class UnwritableError(Exception):
    """An entry cannot be written; a writer raises it where a plain OSError would be taken for its source's."""


def cache_folder() -> Path:
    """Return the folder of all entries: ``text`` in ``$TRANSFER_CACHE``, else in ``transfer`` in the user's cache."""
    chosen = os.environ.get("TRANSFER_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "text"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transfer" / "text"


def digest(*parts: object) -> str:
    """Return the digest of what decides an entry's content: plain data alone."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def entry(kind: str, key: str, write: Callable[[Path], None]) -> Path | None:
    """Return the folder of an entry; what is not there yet is made.

    Args:
        kind: What it holds, in lower-case letters.
        key: As :func:`digest` gives it.
        write: Writes the files of the entry into an empty folder.

    Returns:
        The folder, or None where the cache cannot be written: what is wanted is then to be had without it.
    """
    folder = cache_folder() / f"{kind}-{key}"
    if folder.is_dir():
        with contextlib.suppress(OSError):  # somebody else's folder, which may be read alone
            os.utime(folder)  # used now: the last to be dropped
        return folder
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.iterdir():
            _flush(file)
        try:
            temporary.rename(folder)
        except OSError:  # another run was first, with the same content
            if not folder.is_dir():
                raise
        _flush(folder.parent)
    except (OSError, UnwritableError) as error:
        logger.warning("nothing is kept in %s: %s", cache_folder(), error)
        return None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _tidy(keep=folder)
    return folder


def drop(folder: Path) -> None:
    """Remove an entry, in one go, so that nobody ever finds half of it; who has mapped its files keeps them."""
    aside = folder.with_name(f".{folder.name.strip('.').partition('.')[0]}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _tidy(keep: Path) -> None:
    """Drop what crashes left, and what was used longest ago until the rest fits the limit."""
    entries = []
    for path in keep.parent.iterdir():  # the folder is the user's, and may hold other things
        with contextlib.suppress(OSError):  # another run has just dropped it
            used = path.stat().st_mtime
            if _TEMPORARY.fullmatch(path.name):
                newest = max((file.stat().st_mtime for file in path.iterdir()), default=used)
                if time.time() - newest > STALE_SECONDS:
                    drop(path)
            elif _ENTRY.fullmatch(path.name):
                entries.append((used, path, sum(file.stat().st_size for file in path.iterdir())))
    total = 0
    for _, path, size in sorted(entries, reverse=True):
        total += size
        if total > LIMIT_BYTES and path != keep:
            drop(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
