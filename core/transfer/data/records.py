"""Records of CSV, TSV and JSON Lines files with their line numbers."""

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
"""Maximum size of a decompressed table: a larger one is refused, because it may be a decompression bomb."""
MAX_FIELD_CHARACTERS = 2**31 - 1
"""Maximum length of a field: the largest limit that the csv module accepts on all platforms."""
JSON_LINES = (".jsonl", ".ndjson")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Byte order marks of UTF-16."""

Record = dict[str, str | list[str]]
"""Values of a row by column; only JSON Lines can contain lists."""


def table_suffix(path: Path) -> str:
    """Return the suffix of a table's file name, ignoring ``.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_table(path: Path) -> BinaryIO:
    """Open a table for reading; a gzip file is decompressed into memory."""
    return io.BytesIO(_unpacked(path)) if path.name.lower().endswith(".gz") else path.open("rb")


def _unpacked(path: Path) -> bytes:
    with gzip.open(path) as file:
        content = file.read(MAX_TABLE_BYTES)  # never decompresses more than the limit
    if len(content) == MAX_TABLE_BYTES:
        raise OSError(f"it would unpack to {MAX_TABLE_BYTES / 2**30:.0f} GiB or more; decompress it yourself")
    return content


class LineNames(Sequence[str]):
    """Names ``path:line`` of the rows of a table, formatted on access.

    Args:
        path: Path of the table.
        lines: First line of each row, counted from 1.
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
    """Yield the first line and the record of each row of a delimited table with a header.

    Args:
        lines: Lines of the file.
        path: Path of the file, for errors.
        delimiter: Character between two columns.

    Raises:
        DataError: A row cannot be parsed or has another number of fields than the header, or two columns have one name.
    """
    # The csv module limits fields to 131,072 characters by default, and a text may be longer. The limit is global, so
    # it is restored at the end. It is never lowered, because an abandoned generator restores it late.
    limit = csv.field_size_limit()
    csv.field_size_limit(max(MAX_FIELD_CHARACTERS, limit))
    # Strict: otherwise an unclosed quote silently turns the rest of the file into one field.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    first_line = 1
    try:
        header = next(reader, [])
        if repeated := [name for name, count in Counter(header).items() if count > 1]:
            raise DataError(f"two columns are called {repeated[0]!r}", where=f"{path}:1", fix="rename one of them")
        first_line = reader.line_num + 1
        for fields in reader:
            line, first_line = first_line, reader.line_num + 1
            if len(fields) == len(header):
                yield line, dict(zip(header, fields, strict=True))
            elif fields:  # blank lines are skipped
                raise DataError(
                    f"the row is malformed: expected {len(header)} fields, got {len(fields)}",
                    where=f"{path}:{line}",
                    fix=f"quote a field that contains {delimiter!r}, or set delimiter",
                )
    except csv.Error as error:
        raise DataError(
            f"the row cannot be parsed: {error}", where=f"{path}:{first_line}", fix='write a quote within quotes as ""'
        ) from error
    finally:
        csv.field_size_limit(limit)


def read_json_lines(lines: Iterable[str], path: Path, column: str | None, example: str) -> Iterator[tuple[int, Record]]:
    """Yield the line and the record of each object in a JSON Lines file.

    Numbers and booleans become text, as JSON writes them.

    Args:
        lines: Lines of the file.
        path: Path of the file, for errors.
        column: Name of the column of the example, which must not contain a list or object; None skips that check.
        example: Name of an example in errors (``text``).

    Raises:
        DataError: A line is not a JSON object, or its text is malformed.
    """
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():  # blank lines are skipped
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"the line is not JSON: {error}", where=where, fix="write one object on each line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"the line is malformed: expected a JSON object, got {type(record).__name__}",
                where=where,
                fix=f'write one object on each line: {{"{example}": ..., "label": ...}}',
            )
        if column is not None and isinstance(record.get(column), list | dict):
            got = type(record[column]).__name__
            raise DataError(
                f"column {column!r} is wrong: expected {example}, got {got}",
                where=where,
                fix=f"give one {example} per row",
            )
        # The search is fast and rarely matches; most surrogates are valid pairs, so the record is then encoded.
        if _SURROGATE.search(line) and _lone_surrogate(record):
            raise DataError(
                "a text contains an unpaired surrogate (\\ud800 to \\udfff)",
                where=where,
                fix="remove it, or the row",
            )
        yield number, {key: _as_text(value) for key, value in record.items()}


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _lone_surrogate(record: Mapping[str, object]) -> bool:
    """Return whether a value contains an unpaired surrogate, which JSON escapes allow and no encoding can represent."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _as_text(value: object) -> str | list[str]:
    """Return a JSON value as text; a list becomes a list of texts."""
    if isinstance(value, list):
        return [item if isinstance(item, str) else json.dumps(item) for item in value]
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
