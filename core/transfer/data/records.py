"""Records of CSV, TSV and JSON Lines files, with line numbers."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from transfer.errors import DataError

MAX_TABLE_BYTES = 1 << 32
"""A packed table that is larger is not unpacked: it may be a bomb."""
MAX_FIELD_CHARACTERS = 2**31 - 1  # the most that Python takes everywhere
JSON_LINES = (".jsonl", ".ndjson")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Record = dict[str, str | list[str]]


def table_suffix(path: Path) -> str:
    """Return the suffix of a table's file name, without that of its compression."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_table(path: Path) -> BinaryIO:
    """Open a table for reading; a gzip file is decompressed into memory."""
    return io.BytesIO(_unpacked(path)) if path.name.lower().endswith(".gz") else path.open("rb")


def _unpacked(path: Path) -> bytes:
    with gzip.open(path) as file:
        content = file.read(MAX_TABLE_BYTES)
    if len(content) == MAX_TABLE_BYTES:
        raise OSError(f"it would unpack to {MAX_TABLE_BYTES / 2**30:.0f} GiB or more; unpack it yourself")
    return content


class LineNames(Sequence[str]):
    """``path:line`` of each row of a table, put together when it is asked for.

    Args:
        path: The table.
        lines: Where each row begins, counted from 1.
    """

    def __init__(self, path: Path, lines: Sequence[int]) -> None:
        self._path = path
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LineNames(self._path, self._lines[index])
        return f"{self._path}:{self._lines[index]}"


def read_delimited(lines: Iterable[str], path: Path, delimiter: str) -> Iterator[tuple[int, Record]]:
    """Give each record of a table with a header, and the line where it begins."""
    # Python's limit on a field is meant for broken files; a text may well be longer. It is global, so it is put back,
    # and never lowered: a reader that is left half way puts it back late.
    limit = csv.field_size_limit()
    csv.field_size_limit(max(MAX_FIELD_CHARACTERS, limit))
    # Strict, because otherwise a quote that is never closed swallows the rest of the file in silence.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    begin = 1
    try:
        header = next(reader, [])
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise DataError(f"two columns are called {twice[0]!r}", where=f"{path}:1", fix="rename one of them")
        begin = reader.line_num + 1
        for fields in reader:
            line, begin = begin, reader.line_num + 1
            if len(fields) == len(header):
                yield line, dict(zip(header, fields, strict=True))
            elif fields:  # a blank line is no record
                raise DataError(
                    f"the row has {len(fields)} fields, the header {len(header)}",
                    where=f"{path}:{line}",
                    fix=f"quote a field that holds {delimiter!r}, or set delimiter",
                )
    except csv.Error as error:
        raise DataError(
            f"the row cannot be parsed: {error}", where=f"{path}:{begin}", fix='write a quote within quotes as ""'
        ) from error
    finally:
        csv.field_size_limit(limit)


def read_json_lines(lines: Iterable[str], path: Path, column: str | None, example: str) -> Iterator[tuple[int, Record]]:
    """Give each object of a file with one on every line; numbers and booleans as JSON writes them."""
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"the line is not JSON: {error}", where=where, fix="write one object on each line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"the line holds a {type(record).__name__}, not an object",
                where=where,
                fix=f'write one object on each line: {{"{example}": ..., "label": ...}}',
            )
        if column is not None and isinstance(record.get(column), list | dict):
            what = type(record[column]).__name__
            raise DataError(f"{column!r} holds a {what}, not a {example}", where=where, fix=f"give one {example} each")
        if _SURROGATE.search(line) and _lone_surrogate(record):
            raise DataError(
                "a text holds half a character (one of \\ud800 to \\udfff alone)",
                where=where,
                fix="remove it, or the row",
            )
        yield number, {key: _plain(value) for key, value in record.items()}


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _lone_surrogate(record: Mapping[str, object]) -> bool:
    """Tell whether a value can be written in no encoding: JSON's escapes may name one half of a pair."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _plain(value: object) -> str | list[str]:
    if isinstance(value, list):
        return [item if isinstance(item, str) else json.dumps(item) for item in value]
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
