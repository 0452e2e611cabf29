"""The folders of the user that data, downloads and caches are stored in."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path:
    """Return the folder of data and downloads: ``$TRANSFER_DATA``, or ``transfer`` in the user's cache folder."""
    chosen = os.environ.get("TRANSFER_DATA")
    return Path(chosen).expanduser() if chosen else _user_cache()


def cache_folder(name: str) -> Path:
    """Return the folder of a cache: ``name`` in ``$TRANSFER_CACHE``, or in ``transfer`` in the user's cache folder.

    Args:
        name: Folder name of the cache. The feature cache (``features``) uses ``$TRANSFER_CACHE`` itself.
    """
    chosen = os.environ.get("TRANSFER_CACHE")
    if not chosen:
        return _user_cache() / name
    folder = Path(chosen).expanduser()
    # Other caches came later: what users set is the folder of the feature cache, and the others are inside it.
    return folder if name == "features" else folder / name


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transfer"
