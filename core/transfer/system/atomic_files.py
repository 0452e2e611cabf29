"""Reading files safely and writing them atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transfer.errors import RunError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, whatever happens in between."""
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
    flush_folder(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; NaN and infinity, which JSON lacks, are errors."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, missing: str, fix: str | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunError: The file is not there (``missing`` says what that means, ``fix`` what to do), or damaged.
    """
    try:
        content = read_text(path)
    except FileNotFoundError as error:
        raise RunError(missing, where=str(path), fix=fix) from error
    except (OSError, ValueError) as error:
        raise RunError(f"the file cannot be read: {error}", where=str(path)) from error
    return parse_object(content, str(path))


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object in a text; ``where`` names its file in errors."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RunError(f"the file cannot be read: {error}", where=where) from error
    if not isinstance(content, dict):
        raise RunError("the file holds no JSON object", where=where)
    return content


def read_text(path: Path) -> str:
    """Read a file in UTF-8; what is no regular file, and may have no end, is an OSError."""
    return read_bytes(path).decode("utf-8")


def read_bytes(path: Path) -> bytes:
    """Read a file; what is no regular file, and may have no end, is an OSError."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is no regular file")
    return path.read_bytes()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def flush_folder(path: Path) -> None:
    """Flush a folder's entries to the disk: a rename is only safe after that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
