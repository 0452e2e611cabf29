"""Reading files safely; writing files and folders atomically."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transfer.errors import RunError

MAX_TEXT_BYTES = 2**30
"""Maximum size of a text file that is read."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new content, even after a crash."""
    # In the same folder, because a rename is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; NaN and infinity, which JSON lacks, are errors."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, missing: str, fix: str | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunError: The file is missing (``missing`` is the message then, ``fix`` its fix) or damaged.
    """
    try:
        content = read_text(path)
    except FileNotFoundError as error:
        raise RunError(missing, where=str(path), fix=fix) from error
    except (OSError, ValueError) as error:
        raise RunError(f"the file cannot be read: {error}", where=str(path)) from error
    return parse_object(content, str(path))


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object in a text; ``where`` is the location of the text in errors."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RunError(f"the file cannot be read: {error}", where=where) from error
    if not isinstance(content, dict):
        raise RunError("the file contains no JSON object", where=where)
    return content


def read_text(path: Path) -> str:
    """Read a file in UTF-8; raise OSError for anything but a regular file (a pipe may never end)."""
    if path.is_file() and path.stat().st_size > MAX_TEXT_BYTES:
        raise OSError(f"{path.name} is too large: expected at most {MAX_TEXT_BYTES} bytes")
    return read_bytes(path).decode("utf-8")


def read_bytes(path: Path) -> bytes:
    """Read a file; raise OSError for anything but a regular file (a pipe may never end)."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is not a regular file")
    return path.read_bytes()


def refuse_special_entries(folder: Path) -> None:
    """Raise an error for links that lead out of a folder, and for pipes, devices and sockets in it.

    Files would be written through such a link, and a pipe blocks its reader and its writer. The folder may come from
    somebody else, or contain links to the user's own files.

    Raises:
        RunError: The folder contains such an entry.
    """
    here = Path(os.path.realpath(folder))
    for path in sorted(folder.rglob("*")):
        # realpath instead of Path.resolve, which raises an error for links that lead to themselves.
        if path.is_symlink() and not (path.exists() and Path(os.path.realpath(path)).is_relative_to(here)):
            raise RunError(
                f"this link leads out of the run directory, to {os.readlink(path)}, and is not followed",
                where=str(path),
                fix="replace the link by the file or folder it leads to",
            )
        if not (path.is_file() or path.is_dir()) and path.exists():
            raise RunError(
                "this is no regular file, but a pipe, a device or a socket", where=str(path), fix="remove it"
            )


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes is that of a full disk or an exceeded quota."""
    while error is not None:
        # safetensors and SQLite report it only in the text of their errors.
        text = str(error)
        if "No space left" in text or "disk is full" in text or "quota exceeded" in text:
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


@contextmanager
def atomic_folder(
    path: Path, *, temporary: Path | None = None, make_room: Callable[[], object] | None = None
) -> Iterator[Path]:
    """Write a folder atomically: yield an empty temporary folder, then flush its files and rename it to ``path``.

    If the block raises, the temporary folder is removed and ``path`` is unchanged.

    Args:
        path: Final path of the folder.
        temporary: Path of the temporary folder, in the same parent. None uses ``.NAME.tmp``, and removes one that a
            crash has left.
        make_room: Called when the new folder is complete, right before the rename: it moves an existing folder away.
            None leaves an existing folder, and raises OSError unless it is empty.

    Raises:
        OSError: The folder cannot be written.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if make_room is not None:
            make_room()
        temporary.rename(path)
        _flush(path.parent)  # the rename itself is on the disk only after this
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed after a success: nothing is left to remove


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
