"""Where data lives, and how a file gets there."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from transfer.errors import DataError

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30
_downloads_allowed = ContextVar("downloads_allowed", default=True)


def data_folder() -> Path:
    """Return the folder of data and downloads: ``$TRANSFER_DATA``, else ``transfer`` in the user's cache folder."""
    chosen = os.environ.get("TRANSFER_DATA")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transfer"


def find_file(*names: str) -> Path | None:
    """Return the first of these files or folders that the data folder holds, or None.

    Args:
        names: Paths relative to the data folder, the preferred first (``aclImdb``, ``aclImdb_v1.tar.gz``).
    """
    for name in names:
        path = data_folder() / name
        if path.exists():
            return path
    return None


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """Let :func:`download` find what is there and fetch nothing, for work that can do without the data."""
    token = _downloads_allowed.set(False)
    try:
        yield
    finally:
        _downloads_allowed.reset(token)


def download(url: str, name: str, *, sha256: str | None = None) -> Path:
    """Download a file into the data folder, with a progress bar, and return its path; a file that is there is kept.

    The bytes go to ``<name>.part`` and are renamed when complete, so a broken download never looks like the file.

    Args:
        url: An ``https`` address.
        name: Path relative to the data folder.
        sha256: The expected digest in hexadecimal, where it is known.

    Raises:
        DataError: It cannot be fetched, or is not what was expected; the message says which file to put where.
    """
    target = data_folder() / name
    if target.exists():
        return target
    if not url.startswith("https://"):
        raise DataError(f"will not download {url}: only https is fetched")
    if not _downloads_allowed.get():
        raise DataError(f"{target.name} is not in {target.parent}")
    fix = f"download {url} elsewhere and put it at {target} (TRANSFER_DATA names another folder)"
    partial = target.with_name(target.name + ".part")
    digest = hashlib.sha256()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The scheme was checked above, so no file: or custom scheme gets here.
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, partial.open("wb") as out:  # noqa: S310
            total = int(answer.headers.get("Content-Length") or 0) or None
            with Progress(*columns, transient=True) as progress:
                bar = progress.add_task(f"downloading {target.name}", total=total)
                while chunk := answer.read(CHUNK_BYTES):
                    out.write(chunk)
                    digest.update(chunk)
                    progress.advance(bar, len(chunk))
        received = partial.stat().st_size
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors too
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DataError(
            f"{target.name} is not in {target.parent} and cannot be downloaded: {reason}", fix=fix
        ) from error
    if total is not None and received != total:
        partial.unlink()
        raise DataError(f"the download of {url} broke off after {received} of {total} bytes", fix="try again")
    if sha256 is not None and digest.hexdigest() != sha256:
        partial.unlink()
        raise DataError(f"what {url} gave has SHA-256 {digest.hexdigest()}, expected {sha256}", fix=fix)
    partial.rename(target)
    return target
