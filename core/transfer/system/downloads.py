"""Where data lives, and how a file gets there."""

from __future__ import annotations

import contextlib
import hashlib
import http
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from transfer.errors import DataError
from transfer.system.user_folders import data_folder

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30
_downloads_allowed = ContextVar("downloads_allowed", default=True)


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

    The bytes go to ``<name>.part`` and are renamed when complete, so a broken download never looks like the file. The
    next call goes on where it broke off, if the server can and still has the same file.

    Args:
        url: An ``https`` address.
        name: Path relative to the data folder.
        sha256: The expected digest in hexadecimal, or how it begins, where it is known.

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
    partial = _Partial(target.with_name(target.name + ".part"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.fetch(url)
        digest = partial.sha256()
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors too
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        message = f"{target.name} is not in {target.parent} and cannot be downloaded: {reason}"
        again = "run it again to go on where it broke off, or " if partial.can_go_on() else ""
        raise DataError(message, fix=again + fix) from error
    if sha256 is not None and not digest.startswith(sha256):
        partial.remove()
        raise DataError(f"what {url} gave has SHA-256 {digest}, expected {sha256}", fix=fix)
    partial.path.rename(target)
    partial.remove()
    return target


class _Partial:
    """A download that is not complete, and beside it what tells whether the server still has the same file.

    Args:
        path: Where the bytes go.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = path.with_name(path.name + ".version")

    def can_go_on(self) -> bool:
        """Tell whether an earlier attempt left something to go on from; what cannot be gone on from is removed."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_size and self._version.is_file():
                return True
            self.remove()
        return False

    def remove(self) -> None:
        """Leave nothing."""
        for path in (self.path, self._version):
            with contextlib.suppress(OSError):
                path.unlink()

    def sha256(self) -> str:
        """Return the digest of what is there."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def fetch(self, url: str) -> None:
        """Fetch what is missing.

        Raises:
            OSError, http.client.HTTPException: It broke off.
        """
        request = urllib.request.Request(url)  # noqa: S310  # the caller has checked that it is https
        if have := self.path.stat().st_size if self.can_go_on() else 0:
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", self._version.read_text(encoding="utf-8"))
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
                raise
            self.remove()  # nothing comes after what is here, so it is not the beginning of this file
            return self.fetch(url)
        with answer:
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0
                self._remember(answer.headers)
            self._append(answer, have)
        return None

    def _remember(self, headers: Mapping[str, str]) -> None:
        self.remove()
        tag = headers.get("ETag") or ""
        version = headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag
        if version:
            self._version.write_text(version, encoding="utf-8")

    def _append(self, answer: Any, have: int) -> None:
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with self.path.open("ab" if have else "wb") as out, Progress(*columns, transient=True) as progress:
            bar = progress.add_task(f"downloading {self.path.stem}", total=total, completed=have)
            while chunk := answer.read(CHUNK_BYTES):
                out.write(chunk)
                progress.advance(bar, len(chunk))
        received = self.path.stat().st_size
        if total is not None and received != total:
            raise OSError(f"it broke off after {received} of {total} bytes")
