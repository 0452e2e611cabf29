"""Images that cannot be decoded, found before training. Each is decoded once, and the result is recorded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import PIL
import torch
from pydantic import JsonValue
from rich.progress import track

from transfer import DataError, FileSchema, cache_folder
from transfer_vision.images.decoding import check_image
from transfer_vision.images.image_sources import ImageSource, content_digest

logger = logging.getLogger(__name__)

BadFiles = Literal["error", "skip"]

FORMAT = 3
MAX_SHOWN = 30
_SHOW_PROGRESS_FROM = 2000


def decodable_images(source: ImageSource, paths: Sequence[str], bad_files: BadFiles) -> set[str]:
    """Decode every new image in several threads, and return the paths of those that can be decoded.

    Args:
        source: The folder or archive that contains the images.
        paths: Their paths in the source.
        bad_files: ``error`` refuses the data if one is bad; ``skip`` leaves the bad ones out and logs a table of them.

    Raises:
        transfer.DataError: ``bad_files`` is ``error`` and an image cannot be decoded.
    """
    problems = scan(source, paths)
    if not problems:
        return set(paths)
    table = f"{len(problems)} of {len(paths)} images cannot be decoded:\n{_table(source, problems)}"
    if bad_files == "error":
        fix = "repair or remove them, or set bad_files: skip to leave them out"
        raise DataError(table, where=source.name(""), fix=fix)
    logger.warning("%s: left out, for %s", source.name(""), table)
    return set(paths) - problems.keys()


def scan(source: ImageSource, paths: Sequence[str]) -> dict[str, str]:
    """Return the problem of each image that cannot be decoded, by its path.

    The result for a file is recorded with its size and time (in an archive: size and checksum) in ``$TRANSFER_CACHE``
    or the user's cache folder, so that a file is only decoded again if it has changed. The record also contains a
    digest of the file's content, which the source receives: duplicates are found without reading a file again.
    """
    record = _record(source)
    recorded = _read(record)
    results: dict[str, list[object]] = {}
    new = []
    for path in paths:
        try:
            identity = list(source.identity(path))
        except (ValueError, OSError) as error:  # a link to a missing file
            results[path] = [[], str(error).encode("utf-8", "backslashreplace").decode(), ""]
            continue
        previous = recorded.get(path)
        if previous is not None and previous[0] == identity:
            results[path] = previous
        else:
            results[path] = [identity, None, ""]
            new.append(path)
    if new:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            answers: Iterable[tuple[str | None, str]] = pool.map(lambda path: _examine(source, path), new)
            if len(new) >= _SHOW_PROGRESS_FROM:
                answers = track(answers, f"decoding {len(new):,} images once", len(new), transient=True)
            for path, answer in zip(new, answers, strict=True):
                results[path][1:] = answer
        _write(record, recorded | results)
    source.digests |= {path: str(digest) for path, (_, _, digest) in results.items()}
    return {path: str(problem) for path, (_, problem, _) in results.items() if problem is not None}


def _examine(source: ImageSource, path: str) -> tuple[str | None, str]:
    """Return the problem of an image, None if it can be decoded, and the digest of its content."""
    digest = ""
    try:
        content = source.read(path)
        digest = content_digest(content)
        check_image(content, source.name(path))
    except (ValueError, OSError, MemoryError) as error:
        problem = str(error) or type(error).__name__
        return problem.encode("utf-8", "backslashreplace").decode(), digest
    return None, digest


def _table(source: ImageSource, problems: dict[str, str]) -> str:
    shown = list(problems.items())[:MAX_SHOWN]
    names = [source.name(path).removeprefix(f"{source.name('')}/") for path, _ in shown]
    width = max(map(len, names))
    lines = [f"  {name.ljust(width)}  {problem}" for name, (_, problem) in zip(names, shown, strict=True)]
    more = len(problems) - len(shown)
    return "\n".join([*lines, f"  and {more} more"] if more else lines)


def _record(source: ImageSource) -> Path:
    # A member of an archive may be damaged without any trace in the archive's directory, so the archive's time counts.
    time = source.path.stat().st_mtime_ns if source.path.is_file() else None
    key = repr((FORMAT, PIL.__version__, str(source.path.resolve()), source.name(""), time))
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:40]
    return cache_folder("images") / f"{name}.json"


class _Record(FileSchema):
    """Identity, problem (null if there is none) and digest of the content of each image, by path."""

    images: dict[str, tuple[list[JsonValue], str | None, str]]


def _read(record: Path) -> dict[str, list[object]]:
    try:
        if not record.is_file():  # missing, or a pipe, which may never end
            return {}
        entries = _Record.model_validate_json(record.read_bytes())
    except (OSError, ValueError):  # damaged: the images are decoded again
        return {}
    return {_recoded(path, "latin-1", "utf-8"): list(entry) for path, entry in entries.images.items()}


def _recoded(path: str, encoding: str, other: str) -> str:
    """Return a path in another encoding. JSON cannot contain the surrogates of a path that is not UTF-8."""
    return path.encode(encoding, "surrogateescape").decode(other, "surrogateescape")


def _write(record: Path, results: dict[str, list[object]]) -> None:
    temporary = record.with_name(f".{record.name}.{uuid.uuid4().hex}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        images = {_recoded(path, "utf-8", "latin-1"): entry for path, entry in results.items()}
        temporary.write_text(json.dumps({"images": images}), encoding="ascii")
        temporary.replace(record)
    except OSError as error:
        logger.warning("the results of decoding the images cannot be recorded in %s: %s", record.parent, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
