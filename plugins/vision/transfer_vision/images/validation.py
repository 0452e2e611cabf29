"""Pictures that cannot be decoded, found before training: each is decoded once, and what came of it is remembered."""

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
from rich.progress import track

from transfer import DataError, cache_folder
from transfer_vision.images.decoding import check_picture
from transfer_vision.images.image_sources import Source

logger = logging.getLogger(__name__)

BadFiles = Literal["error", "skip"]

FORMAT = 1
MAX_SHOWN = 30
_SHOW_PROGRESS_FROM = 2000


def good_pictures(source: Source, paths: Sequence[str], bad_files: BadFiles) -> set[str]:
    """Decode every picture that has not been decoded before, by several threads, and return those that are good.

    Args:
        source: Where they lie.
        paths: Their paths in it.
        bad_files: ``error``: refuse the data if one is bad. ``skip``: leave the bad ones out, with a table in the log.

    Raises:
        transfer.DataError: A picture is bad, or all are.
    """
    problems = scan(source, paths)
    if not problems:
        return set(paths)
    table = f"{len(problems)} of {len(paths)} pictures cannot be decoded:\n{_table(source, problems)}"
    if bad_files == "error":
        fix = "mend or remove them, or set bad_files: skip to leave them out"
        raise DataError(table, where=source.name(""), fix=fix)
    logger.warning("%s: left out, for %s", source.name(""), table)
    return set(paths) - problems.keys()


def scan(source: Source, paths: Sequence[str]) -> dict[str, str]:
    """Return what is wrong with each bad picture, by its path.

    What was found is kept by each file's size and time (in an archive: size and checksum) in ``$TRANSFER_CACHE``, else
    in the user's cache folder, so that a file is decoded again only if it has changed.
    """
    record = _record(source)
    known = _read(record)
    found: dict[str, list[object]] = {}
    new = []
    for path in paths:
        try:
            identity = list(source.identity(path))
        except (ValueError, OSError) as error:  # a link that points nowhere
            found[path] = [[], str(error)]
            continue
        before = known.get(path)
        if before is not None and before[0] == identity:
            found[path] = before
        else:
            found[path] = [identity, None]
            new.append(path)
    if new:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            answers: Iterable[str | None] = pool.map(lambda path: _problem(source, path), new)
            if len(new) >= _SHOW_PROGRESS_FROM:
                answers = track(answers, f"decoding {len(new):,} pictures once", len(new), transient=True)
            for path, problem in zip(new, answers, strict=True):
                found[path][1] = problem
        _write(record, known | found)
    return {path: str(problem) for path, (_, problem) in found.items() if problem is not None}


def _problem(source: Source, path: str) -> str | None:
    try:
        check_picture(source.read(path), source.name(path))
    except (ValueError, OSError, MemoryError) as error:
        return str(error) or type(error).__name__
    return None


def _table(source: Source, problems: dict[str, str]) -> str:
    shown = list(problems.items())[:MAX_SHOWN]
    names = [source.name(path).removeprefix(f"{source.name('')}/") for path, _ in shown]
    width = max(map(len, names))
    lines = [f"  {name.ljust(width)}  {problem}" for name, (_, problem) in zip(names, shown, strict=True)]
    more = len(problems) - len(shown)
    return "\n".join([*lines, f"  and {more} more"] if more else lines)


def _record(source: Source) -> Path:
    # A member of an archive may be damaged without a word of it in the archive's list.
    time = source.path.stat().st_mtime_ns if source.path.is_file() else None
    what = repr((FORMAT, PIL.__version__, str(source.path.resolve()), source.name(""), time))
    name = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:40]
    return cache_folder("pictures") / f"{name}.json"


def _read(record: Path) -> dict[str, list[object]]:
    try:
        known = json.loads(record.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or damaged: the pictures are decoded again
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {path: entry for path, entry in entries if isinstance(entry, list) and len(entry) == 2}


def _write(record: Path, found: dict[str, list[object]]) -> None:
    temporary = record.with_name(f".{record.name}.{uuid.uuid4().hex}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(found), encoding="ascii")
        temporary.replace(record)
    except OSError as error:
        logger.warning("what was found out about the pictures is not kept in %s: %s", record.parent, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
