"""Inputs of predictions: values, files, folders, and rows of tables."""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from transfer.data.delimited import choose_dialect, delimited_reader, long_fields
from transfer.data.frames import frame_columns
from transfer.data.records import UNREADABLE, open_rows, table_suffix
from transfer.errors import DataError, unknown_name
from transfer.interfaces import Preprocessing

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Suffixes of files that are refused unless a column is named: as one text, they would get one prediction."""
_UNREADABLE = (*UNREADABLE, ValueError)
"""Exceptions of the file system, of damaged compressed files, and of content that is not UTF-8 or no table."""
MAX_NAME_CHARACTERS = 60
"""Maximum length of the part of a text that is shown in an error."""


@dataclass(frozen=True)
class Input:
    """An input of a prediction before it is read.

    Args:
        name: Text, path or number of the input in answers and errors.
        read: Function that returns the raw value. It raises DataError, ValueError or OSError if there is none.
        location: ``line`` of standard input, or ``file`` and ``line`` of a table; empty for other inputs.
        kept: Values of further columns of the table, by column; they are repeated in the answer.
    """

    name: str
    read: Callable[[], Any]
    location: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Location of the input in errors."""
        if "file" in self.location:
            return f"{self.location['file']}:{self.location['line']}"
        if "line" in self.location:
            return f"line {self.location['line']}: {self.name[:MAX_NAME_CHARACTERS]}"
        if "row" in self.location:
            return f"row {self.location['row']}"
        return self.name or "(empty input)"

    @property
    def is_blank(self) -> bool:
        """Whether the input is a blank line or cell. It keeps its position and is not an error."""
        return bool(self.location) and not self.name.strip()


def read_input(one: Input) -> Any:
    """Return the raw value of an input; an error that names no location gets that of the input.

    Raises:
        DataError: There is no value.
    """
    try:
        return one.read()
    except DataError as error:
        raise DataError.of([replace(p, where=p.where or one.where) for p in error.problems]) from error
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the input cannot be read: {reason}", where=one.where) from error


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


def frame_inputs(
    frame: Any, column: str, preprocessing: Preprocessing, keep: Sequence[str] = (), location: str = "row"
) -> Iterator[Input]:
    """Yield the rows of a table in memory. A row without a value is blank.

    Args:
        frame: Data frame of pandas or polars, dict of columns, or list of rows as dicts.
        column: Name of the column with the inputs; a string in it is a value, as in a list.
        preprocessing: Preprocessing of the backbone.
        keep: Names of the columns whose values are repeated in the answers.
        location: Key of the index of a row in its answer.

    Raises:
        DataError: The frame is of another type, or has no such column.
    """
    columns = frame_columns(frame)
    for name in (column, *keep):
        if name not in columns:
            raise DataError.of([unknown_name("column", name, columns, where="the table")])
    for index, (value, *kept) in enumerate(zip(*(columns[name] for name in (column, *keep)), strict=True)):
        # pandas marks a missing value by NaN.
        is_missing = value is None or (isinstance(value, float) and math.isnan(value))
        name = value if isinstance(value, str) else "" if is_missing else f"row {index}"
        entries = dict(zip(keep, kept, strict=True))
        yield _value_input(value, name, preprocessing, {location: index}, entries)


def argument_inputs(
    argument: str, preprocessing: Preprocessing, column: str | None = None, keep: Sequence[str] = ()
) -> Iterator[Input]:
    """Yield the inputs that an argument of the command line names.

    Args:
        argument: Path of a file or folder; otherwise a pattern, if it matches files; otherwise a text.
        preprocessing: Preprocessing of the backbone.
        column: Name of the column with the inputs; every file is then a table. None refuses tables.
        keep: Names of the columns of a table whose values are repeated in the answers.
    """
    path = os.path.expanduser(argument)
    if os.path.lexists(path):
        yield from path_inputs(Path(path), preprocessing, column, keep)
    elif matches := _matches(path):
        for match in matches:
            yield from path_inputs(match, preprocessing, column, keep)
    else:
        # The preprocessing refuses a string that can only be a path.
        yield Input(argument, lambda: preprocessing.read(argument))


def path_inputs(
    path: Path, preprocessing: Preprocessing, column: str | None = None, keep: Sequence[str] = ()
) -> Iterator[Input]:
    """Yield the inputs at a path: the file, the files in the folder in order of their paths, or the rows of the table.

    Args:
        path: Path of a file or folder.
        preprocessing: Preprocessing of the backbone.
        column: Name of the column with the inputs; every file is then a table. None refuses tables.
        keep: Names of the columns of a table whose values are repeated in the answers.
    """
    if path.is_dir():
        yield from _folder_inputs(path, preprocessing, column, keep)
    elif column is not None:
        yield from _table_inputs(path, column, preprocessing, keep)
    elif _is_table(path) and path.suffix.lower() not in preprocessing.file_suffixes:
        yield _failed_input(str(path), _table_without_column(path))
    else:
        yield Input(str(path), lambda: preprocessing.read_value(path))


def _value_input(
    value: Any,
    name: str,
    preprocessing: Preprocessing,
    location: Mapping[str, Any] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> Input:
    return Input(name, lambda: preprocessing.read_value(value), location or {}, kept or {})


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


def _folder_inputs(
    folder: Path, preprocessing: Preprocessing, column: str | None, keep: Sequence[str]
) -> Iterator[Input]:
    """Yield the inputs in a folder and its subfolders, without hidden ones."""
    suffixes = preprocessing.file_suffixes if column is None else TABLE_SUFFIXES
    count, unreadable = 0, list[OSError]()
    for parent, folders, files in os.walk(folder, onerror=unreadable.append):
        # In place: os.walk visits the remaining folders in this order.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and (not suffixes or name.lower().endswith(suffixes)):
                count += 1
                yield from path_inputs(Path(parent, name), preprocessing, column, keep)
    for error in unreadable:
        yield _failed_input(str(error.filename), DataError(f"the folder cannot be read: {error.strerror}"))
    if not count and not unreadable:
        expected = f": expected {', '.join(suffixes)}" if suffixes else ""
        yield _failed_input(str(folder), DataError(f"the folder contains no file to predict{expected}"))


def _is_table(path: Path) -> bool:
    return table_suffix(path) in TABLE_SUFFIXES


def _table_without_column(path: Path) -> DataError:
    try:
        _, columns, _ = _read_table(path, ())
    except (DataError, *_UNREADABLE):
        columns = []
    one_of = f" ({', '.join(columns)})" if columns else ""
    return DataError(f"this is a table: name the column with the inputs by --column{one_of}", where=str(path))


def _table_inputs(path: Path, column: str, preprocessing: Preprocessing, keep: Sequence[str]) -> Iterator[Input]:
    """Yield the cells of a column. A cell that names a file is relative to the working folder or to the table.

    Raises:
        DataError: The table has no row or no such column, which no option to skip inputs excuses.
    """
    try:
        positions, columns, rows = _read_table(path, (column, *keep))
    except DataError as error:
        yield _failed_input(str(path), error)
        return
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        yield _failed_input(str(path), DataError(f"the table cannot be read: {reason}"))
        return
    if missing := [name for name in (column, *keep) if name not in columns]:
        if not columns:
            raise DataError("the table is empty: expected a header and rows", where=str(path))
        raise DataError.of([unknown_name("column", missing[0], columns, owner="the table", where=str(path))])
    if not rows:
        raise DataError("the table has no rows: expected at least one", where=str(path))
    is_text = preprocessing.media_type.startswith("text/")
    for line, row in zip(positions, rows, strict=True):
        value = row.get(column)
        cell = value if isinstance(value, str) else "" if value is None else json.dumps(value)
        beside = path.parent / cell
        source = str(beside) if not is_text and not os.path.exists(cell) and os.path.exists(beside) else cell
        kept = {name: row.get(name) for name in keep}
        yield _value_input(source, cell, preprocessing, {"file": str(path), "line": line}, kept)


def _read_table(path: Path, columns: Sequence[str]) -> tuple[list[int], Sequence[str], list[dict[str, object]]]:
    """Return the first line of each row, the names of all columns, and some columns of each row.

    Args:
        path: Path of the table.
        columns: Names of the columns to read; without any, there are no rows.

    Raises:
        DataError, OSError, ValueError, EOFError, zlib.error: The file is missing, damaged, not UTF-8, or no table.
    """
    names: list[str] = []
    read = partial(_delimited_cells, path=path, columns=columns, names=names)
    positions, cells = list[int](), list[dict[str, object]]()
    with open_rows(path, read, columns=columns or None) as rows:
        for position, record in rows.records:
            if not rows.is_delimited:
                names += [name for name in record if name not in names]
            positions.append(position if rows.by_line else position + 1)
            cells.append({name: record[name] for name in columns if name in record})
    return positions, names, cells


def _delimited_cells(
    lines: io.TextIOWrapper, path: Path, columns: Sequence[str], names: list[str]
) -> Generator[tuple[int, dict[str, object]], None, None]:
    """Yield the line and the cells of each row of a delimited file, and add the names of its columns to ``names``."""
    dialect = choose_dialect(lines, path, header=True, columns=columns[:1], labels=(), delimiter=None, quoting=None)
    with long_fields():
        reader = delimited_reader(lines, dialect)
        try:
            header: list[str] = next(reader, [])
            names += [name for name in header if name]
            number = reader.line_num + 1
            for row in reader if columns and set(columns) <= set(header) else ():
                if row:  # blank lines are no rows
                    yield number, dict(zip(header, row, strict=False))
                number = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
