"""The text plugin's cache on disk: parsed word vectors, vocabularies, encoded texts.

An entry is a folder named by its kind and the digest of everything that determines its content.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from transfer import DirectoryCache, cache_folder

logger = logging.getLogger(__name__)

LIMIT_BYTES = 20 * 2**30
KEY_DIGITS = 40


class UnwritableError(Exception):
    """An entry cannot be written. Writers raise it if an OSError would be mistaken for one of the file they read."""


def digest(*parts: object) -> str:
    """Return the digest of the plain data that determines the content of an entry."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def entry(kind: str, key: str, write: Callable[[Path], None]) -> Path | None:
    """Return the folder of an entry; write the entry first if it does not exist.

    Args:
        kind: Kind of content, in lower-case letters (``vocabulary``).
        key: Digest of the content, as :func:`digest` returns it.
        write: Function that writes the files of the entry into an empty folder.

    Returns:
        The folder, or None if the cache cannot be written. The caller then computes the content without the cache.
    """
    cache, name = _cache(), f"{kind}-{key}"
    try:
        return cache.get(name) or cache.add(name, write)
    except (OSError, UnwritableError) as error:
        logger.warning("nothing is cached in %s: %s", cache.folder, error)
        return None


def drop(folder: Path) -> None:
    """Remove an entry; a process that has mapped its files can use them until it ends."""
    _cache().drop(folder.name)


def _cache() -> DirectoryCache:
    return DirectoryCache(cache_folder("text"), LIMIT_BYTES)
