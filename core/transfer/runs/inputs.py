"""Inputs of predictions: values, files, folders, and rows of tables."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from transfer.data.records import open_table
from transfer.errors import DataError
from transfer.interfaces import Preprocessing

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
"""Suffixes of files that are refused unless a column is named: as one text, they would get one prediction."""
DELIMITERS = (",", "\t", ";", "|")
MAX_NAME_CHARACTERS = 60
"""Maximum length of the part of a text that is shown in an error."""


@dataclass(frozen=True)
class Input:
    """An input of a prediction before it is read.

    Args:
        name: Text, path or number of the input in answers and errors.
        read: Function that returns the raw value. It raises DataError, ValueError or OSError if there is none.
        location: ``line`` of standard input, or ``file`` and ``line`` of a table; empty for other inputs.
    """

    name: str
    read: Callable[[], Any]
    location: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Location of the input in errors."""
        if "file" in self.location:
            return f"{self.location['file']}:{self.location['line']}"
        if "line" in self.location:
            return f"line {self.location['line']}: {self.name[:MAX_NAME_CHARACTERS]}"
        return self.name or "(empty input)"

    @property
    def is_blank(self) -> bool:
        """Whether the input is a blank line or cell. It keeps its position and is not an error."""
        return bool(self.location) and not self.name.strip()


def value_inputs(values: Iterable[Any], preprocessing: Preprocessing) -> Iterator[Input]:
    """Yield the inputs of a Python list: values, and the files of ``pathlib.Path`` objects."""
    # One value instead of a list is accepted: iterating over it would predict the characters of a text or the rows of
    # an image.
    is_image = isinstance(values, np.ndarray) and values.ndim < 4 and preprocessing.media_type.startswith("image/")
    if is_image or isinstance(values, str | bytes | os.PathLike | Mapping) or not isinstance(values, Iterable):
        values = [values]
    for index, value in enumerate(values):
        if isinstance(value, os.PathLike):
            yield from path_inputs(Path(value).expanduser(), preprocessing)
        else:
            yield _value_input(value, value if isinstance(value, str) else f"input {index}", preprocessing)


def line_inputs(lines: Iterable[str], preprocessing: Preprocessing) -> Iterator[Input]:
    """Yield the lines of standard input. Blank lines keep their position.

    Args:
        lines: Lines, decoded from UTF-8 with the error handler ``surrogateescape``.
        preprocessing: Preprocessing of the backbone.
    """
    for number, line in enumerate(lines, 1):
        text, location = line.rstrip("\r\n"), {"line": number}
        # The error handler decodes an invalid byte to a character of this range.
        if any("\udc80" <= character <= "\udcff" for character in text):
            text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            yield _failed_input(text, DataError("the line is not UTF-8", fix="convert the input to UTF-8"), location)
        else:
            yield _value_input(text, text, preprocessing, location)


def argument_inputs(argument: str, preprocessing: Preprocessing, column: str | None = None) -> Iterator[Input]:
    """Yield the inputs that an argument of the command line names.

    Args:
        argument: Path of a file or folder; otherwise a pattern, if it matches files; otherwise a text.
        preprocessing: Preprocessing of the backbone.
        column: Name of the column with the inputs; every file is then a table. None refuses tables.
    """
    path = os.path.expanduser(argument)
    if os.path.lexists(path):
        yield from path_inputs(Path(path), preprocessing, column)
    elif matches := _matches(path):
        for match in matches:
            yield from path_inputs(match, preprocessing, column)
    else:
        # The preprocessing refuses a string that can only be a path.
        yield Input(argument, lambda: preprocessing.read(argument))


def path_inputs(path: Path, preprocessing: Preprocessing, column: str | None = None) -> Iterator[Input]:
    """Yield the inputs at a path: the file, the files in the folder in order of their paths, or the rows of the table.

    Args:
        path: Path of a file or folder.
        preprocessing: Preprocessing of the backbone.
        column: Name of the column with the inputs; every file is then a table. None refuses tables.
    """
    if path.is_dir():
        yield from _folder_inputs(path, preprocessing, column)
    elif column is not None:
        yield from _table_inputs(path, column, preprocessing)
    elif _is_table(path) and path.suffix.lower() not in preprocessing.file_suffixes:
        yield _failed_input(str(path), _table_without_column(path))
    else:
        yield Input(str(path), lambda: preprocessing.read_value(path))


def _value_input(
    value: Any, name: str, preprocessing: Preprocessing, location: Mapping[str, Any] | None = None
) -> Input:
    return Input(name, lambda: preprocessing.read_value(value), location or {})


def _failed_input(name: str, error: DataError, location: Mapping[str, Any] | None = None) -> Input:
    def fail() -> None:
        raise error

    return Input(name, fail, location or {})


def _matches(pattern: str) -> list[Path]:
    """Return the files that match a pattern, sorted; the longest part that is a folder is not a pattern: ``a[1]/*``."""
    if not glob.has_magic(pattern):
        return []
    root = next((parent for parent in Path(pattern).parents if os.path.isdir(parent)), Path())
    rest = os.path.relpath(pattern, root) if root.parts else pattern
    return [root / match for match in sorted(glob.glob(rest, root_dir=root))]


def _folder_inputs(folder: Path, preprocessing: Preprocessing, column: str | None) -> Iterator[Input]:
    """Yield the inputs in a folder and its subfolders, without hidden ones."""
    suffixes = preprocessing.file_suffixes if column is None else TABLE_SUFFIXES
    count, unreadable = 0, list[OSError]()
    for parent, folders, files in os.walk(folder, onerror=unreadable.append):
        # In place: os.walk visits the remaining folders in this order.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and (not suffixes or name.lower().endswith(suffixes)):
                count += 1
                yield from path_inputs(Path(parent, name), preprocessing, column)
    for error in unreadable:
        yield _failed_input(str(error.filename), DataError(f"the folder cannot be read: {error.strerror}"))
    if not count and not unreadable:
        expected = f": expected {', '.join(suffixes)}" if suffixes else ""
        yield _failed_input(str(folder), DataError(f"the folder contains no file to predict{expected}"))


def _is_table(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(TABLE_SUFFIXES)


def _table_without_column(path: Path) -> DataError:
    try:
        _, columns, _ = _read_table(path, None)
    except (OSError, ValueError, EOFError):
        columns = []
    one_of = f" ({', '.join(columns)})" if columns else ""
    return DataError(f"this is a table: name the column with the inputs by --column{one_of}", where=str(path))


def _table_inputs(path: Path, column: str, preprocessing: Preprocessing) -> Iterator[Input]:
    """Yield the cells of a column. A cell that names a file is relative to the working folder or to the table."""
    try:
        rows, columns, cells = _read_table(path, column)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        yield _failed_input(str(path), DataError(f"the table cannot be read: {reason}"))
        return
    if column not in columns:
        yield _failed_input(
            str(path), DataError(f"the table has no column {column!r}: expected one of {', '.join(columns)}")
        )
        return
    is_text = preprocessing.media_type.startswith("text/")
    for line, cell in zip(rows, cells, strict=True):
        beside = path.parent / cell
        value = str(beside) if not is_text and not os.path.exists(cell) and os.path.exists(beside) else cell
        yield _value_input(value, cell, preprocessing, {"file": str(path), "line": line})


def _read_table(path: Path, column: str | None) -> tuple[list[int], Sequence[str], list[str]]:
    """Return the first line of each row, the names of the columns, and the cells of a column; a missing cell is empty.

    Args:
        path: Path of the table.
        column: Name of the column. None returns no cells.

    Raises:
        OSError, ValueError, EOFError: The file is missing, damaged, or not UTF-8.
    """
    is_json = ".jsonl" in path.name.lower() or ".ndjson" in path.name.lower()
    with open_table(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="\n" if is_json else "") as lines:
        return _json_cells(lines, column) if is_json else _delimited_cells(lines, column)


def _delimited_cells(lines: io.TextIOWrapper, column: str | None) -> tuple[list[int], Sequence[str], list[str]]:
    first_line = lines.readline()
    lines.seek(0)
    headers = {delimiter: next(csv.reader([first_line], delimiter=delimiter), []) for delimiter in DELIMITERS}
    # The delimiter that gives the column; of several or none, the one that gives the most columns.
    delimiter = max(headers, key=lambda delimiter: (column in headers[delimiter], len(headers[delimiter])))
    # The csv module limits fields to 131,072 characters by default, and a text may be longer.
    limit = csv.field_size_limit(2**31 - 1)
    numbers, cells = [], []
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        index = header.index(column) if column in header else len(header)
        number = reader.line_num + 1
        for row in reader if column in header else ():
            if row:  # blank lines are no rows
                numbers.append(number)
                cells.append(row[index] if index < len(row) else "")
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return numbers, [name for name in header if name], cells


def _json_cells(lines: Iterable[str], column: str | None) -> tuple[list[int], Sequence[str], list[str]]:
    numbers, columns, cells = [], dict[str, None](), []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is not a JSON object")
        columns |= dict.fromkeys(record)
        value = record.get(column) if column is not None else None
        numbers.append(number)
        cells.append(value if isinstance(value, str) else "" if value is None else json.dumps(value))
    return numbers, list(columns), cells
