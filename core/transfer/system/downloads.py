"""Files in the data folder, and their download."""

from __future__ import annotations

import contextlib
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
from transfer.system.atomic_files import file_sha256
from transfer.system.user_folders import data_folder

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30
_downloads_allowed = ContextVar("downloads_allowed", default=True)


def find_file(*names: str) -> Path | None:
    """Return the path of the first of these files or folders that exists in the data folder, or None.

    Args:
        names: Paths relative to the data folder, in order of preference (``aclImdb``, ``aclImdb_v1.tar.gz``).
    """
    for name in names:
        path = data_folder() / name
        if path.exists():
            return path
    return None


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """Make :func:`download` return existing files only, and raise an error instead of fetching the others."""
    token = _downloads_allowed.set(False)
    try:
        yield
    finally:
        _downloads_allowed.reset(token)


def download(url: str, name: str, *, sha256: str | None = None) -> Path:
    """Return the path of a file in the data folder; download it first, with a progress bar, if it does not exist.

    The content is written to ``<name>.part`` and renamed when complete, so an interrupted download never looks like the
    file. The next call resumes it if the server supports ranges and still has the same file.

    Args:
        url: ``https`` address of the file.
        name: Path of the file relative to the data folder.
        sha256: Expected SHA-256 of the file in hexadecimal, or its first digits. None does not check it.

    Raises:
        DataError: The file cannot be fetched or has another digest. The fix states its URL and path.
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
        again = "run it again to resume the download, or " if partial.can_resume() else ""
        raise DataError(message, fix=again + fix) from error
    if sha256 is not None and not digest.startswith(sha256):
        partial.remove()
        raise DataError(f"the file from {url} has the wrong SHA-256: expected {sha256}, got {digest}", fix=fix)
    partial.path.rename(target)
    partial.remove()
    return target


class _Partial:
    """An incomplete download, with the version of the file on the server in a second file.

    Args:
        path: File that the content is appended to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = path.with_name(path.name + ".version")

    def can_resume(self) -> bool:
        """Return whether an earlier download can be resumed; otherwise remove its files."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_size and self._version.is_file():
                return True
            self.remove()
        return False

    def remove(self) -> None:
        """Remove both files."""
        for path in (self.path, self._version):
            with contextlib.suppress(OSError):
                path.unlink()

    def sha256(self) -> str:
        """Return the SHA-256 of the content so far."""
        return file_sha256(self.path)

    def fetch(self, url: str) -> None:
        """Fetch the missing content.

        Raises:
            OSError, http.client.HTTPException: The connection failed.
        """
        request = urllib.request.Request(url)  # noqa: S310  # the caller has checked that it is https
        if have := self.path.stat().st_size if self.can_resume() else 0:
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", self._version.read_text(encoding="utf-8"))
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
                raise
            self.remove()  # the content so far is longer than the file, so it belongs to another version
            return self.fetch(url)
        with answer:
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0  # the server sends the complete file: it has another version, or supports no ranges
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
            raise OSError(f"the connection ended after {received} of {total} bytes")
