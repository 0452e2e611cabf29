"""Datasets from tables with examples and labels: CSV, TSV, JSON Lines."""

from __future__ import annotations

import codecs
import io
import math
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from transfer.data.records import (
    JSON_LINES,
    UTF_16,
    LineNames,
    Record,
    open_table,
    read_delimited,
    read_json_lines,
    table_suffix,
)
from transfer.data.splits import split_off
from transfer.data.targets import encode_labels, multi_hot
from transfer.errors import ConfigError, DataError, unknown_name
from transfer.interfaces import Data, DataSpec, Split
from transfer.system.downloads import find_file

TableTarget = Literal["class", "labels", "label_list", "number"]
"""``class``: one column contains the class. ``labels``: each column contains 0 or 1. ``label_list``: one column
contains the names of all labels. ``number``: each column contains a number."""
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


class Tables:
    """Reader of examples and labels in tables: CSV, TSV, or JSON Lines (``.jsonl``), plain or ``.gz``.

    Args:
        train: Path of the table to train on, or its name in the data folder.
        val: Path of the table to select the best epoch on; None if there is none.
        test: Path of the table to test on; None if there is none.
        example: Name of an example in messages, and of the option that names its column (``text``).
        column: Name of the column of the example. None makes an example a dict of all columns that are not named here.
        label: Name of the column of the label; for ``labels`` and ``number``, the names of several columns.
        target: Content of the label columns: class, labels, label_list or number.
        separator: Separator of the labels in a ``label_list``. JSON Lines may contain lists instead.
        delimiter: Character between columns; None uses a tab in .tsv files and a comma otherwise.
        encoding: Character encoding of the files.
        split: Name of the column with the split of each row, if there is only one table.
        group: Name of the column with the group of each row (a patient, an author). No group is in two splits.
        test_fraction: Fraction of ``train`` to use for testing if there is no test split; 0 uses none.
        extra_fields: Columns of further fields of an example, by field (``{"text": "caption"}``).

    Raises:
        ConfigError: The options are inconsistent.
    """

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        example: str,
        column: str | None,
        label: str | tuple[str, ...],
        target: TableTarget = "class",
        separator: str = ",",
        delimiter: str | None = None,
        encoding: str = "utf-8-sig",
        split: str | None = None,
        group: str | None = None,
        test_fraction: float = 0.0,
        extra_fields: Mapping[str, str] | None = None,
    ) -> None:
        labels = (label,) if isinstance(label, str) else label
        # Every column may have only one meaning.
        columns = ({} if column is None else {example: column}) | dict(extra_fields or {})
        if not labels or len({*columns.values(), *labels}) != len(columns) + len(labels):
            named = ", ".join(f"{what} {name!r}" for what, name in columns.items()) + (" and " if columns else "")
            one_for_each = "".join(f"one column for the {what} and " for what in columns)
            raise ConfigError(
                f"{named}label {', '.join(map(repr, labels)) or '()'} do not name different columns",
                fix=f"name {one_for_each}at least one other column for the label",
            )
        if target in ("class", "label_list") and len(labels) > 1:
            raise ConfigError(
                f"a {target.replace('_', ' ')} is in one column, but label names {len(labels)}: {', '.join(labels)}",
                fix="name one column, or set target: labels (columns of zeros and ones) or target: number",
            )
        if not separator:
            raise ConfigError("separator is empty", fix='set the text between two labels, such as "|"')
        if delimiter is not None and len(delimiter) != 1:
            raise ConfigError(
                f"delimiter is wrong: expected one character, got {delimiter!r}", fix=r'write ";" or "\t"'
            )
        try:
            codecs.lookup(encoding)
        except LookupError:
            common = ("utf-8-sig", "utf-16", "latin-1", "cp1252")
            raise ConfigError.of([unknown_name("encoding", encoding, common)]) from None
        if split is not None and (val is not None or test is not None):
            raise ConfigError(
                f"split: {split!r} takes all splits from one table, and val or test names another",
                fix="remove val and test, or split",
            )
        if test_fraction and (test is not None or split is not None):
            raise ConfigError(
                "test_fraction cuts a test split from train, but there is a test split", fix="remove test_fraction"
            )
        paths = {"train": train, "validation": val, "test": test}
        self.paths = {name: path for name, path in paths.items() if path is not None}
        self.example = example
        self.column = column
        self.labels = labels
        self.target: TableTarget = target
        self.separator = separator
        self.delimiter = delimiter
        self.encoding = encoding
        self.split = split
        self.group = group
        self.test_fraction = test_fraction
        self.extra_fields = dict(extra_fields or {})

    def spec(self, field: str) -> DataSpec:
        """Return the spec of data with examples in ``field``, as far as the options determine it."""
        fields = (field, *self.extra_fields)
        if self.target == "class":
            return DataSpec(fields, "class")
        if self.target == "label_list":
            return DataSpec(fields, "labels")
        return DataSpec(fields, self.target, self.labels)

    def read(self, field: str) -> Data:
        """Read the tables. Raw values are the texts in the column, and classes are in alphabetical order.

        Args:
            field: Name of the field for the examples (``text``).

        Raises:
            DataError: A table is missing or malformed; the error names the file and line.
        """
        tables = {name: self._read(path) for name, path in self.paths.items()}
        if self.split is not None:
            tables = _by_split(tables["train"], self.split)
        spec, targets = self._targets(field, tables)
        codes = _group_codes(tables, self.group)
        splits = {
            name: Split({field: table.values} | self._extra_columns(table), targets[name], table.names, codes.get(name))
            for name, table in tables.items()
        }
        if self.test_fraction:
            splits["train"], splits["test"] = split_off(splits["train"], self.test_fraction)
        return Data(spec, splits)

    def _extra_columns(self, table: _Table) -> dict[str, list[str]]:
        return {name: [extra[column] for extra in table.extra] for name, column in self.extra_fields.items()}

    def _targets(self, field: str, tables: Mapping[str, _Table]) -> tuple[DataSpec, dict[str, npt.NDArray[Any]]]:
        train = tables["train"]
        if self.target == "class":
            columns = {name: [row[0] for row in table.labels] for name, table in tables.items()}
            classes = tuple(sorted(set(columns["train"])))
            if len(classes) < 2:
                raise DataError(
                    f"column {self.labels[0]!r} contains only the class {classes[0]!r}",
                    where=self.paths["train"],
                    fix="add examples of another class",
                )
            return replace(self.spec(field), classes=classes), {
                name: encode_labels(columns[name], classes, table.names.__getitem__) for name, table in tables.items()
            }
        if self.target == "label_list":
            classes = tuple(sorted({name for row in train.labels for name in row}))
            if not classes:
                raise DataError(f"column {self.labels[0]!r} contains no label", where=self.paths["train"])
            return replace(self.spec(field), classes=classes), {
                name: multi_hot(table.labels, classes, table.names.__getitem__) for name, table in tables.items()
            }
        parse = _zero_or_one if self.target == "labels" else _number
        return self.spec(field), {name: _floats(table, self.labels, parse) for name, table in tables.items()}

    def find(self, written: str) -> Path:
        """Return the path of a table: relative to the working folder, or in the data folder if it is not there."""
        path = Path(written).expanduser()
        return path if path.is_file() else find_file(written) or path

    def _read(self, written: str) -> _Table:
        path = self.find(written)
        try:
            # The csv module must see the line ends, which may be part of a quoted field. JSON Lines end at "\n" only.
            newline = "\n" if table_suffix(path) in JSON_LINES else ""
            with open_table(path) as file, io.TextIOWrapper(file, self.encoding, newline=newline) as lines:
                return self._rows(lines, path)
        except UnicodeError:  # not UnicodeDecodeError: UTF-16 without a byte order mark raises the base class
            raise self._wrong_encoding(path) from None
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"the table cannot be read: {getattr(error, 'strerror', None) or error}",
                where=str(path),
                fix="give the path of a .csv, .tsv or .jsonl file",
            ) from error

    def _rows(self, lines: Iterable[str], path: Path) -> _Table:
        """Read a table row by row, so that memory contains only the values that are kept."""
        suffix = table_suffix(path)
        if suffix in JSON_LINES:
            records = read_json_lines(lines, path, self.column, self.example)
        else:
            records = read_delimited(lines, path, self.delimiter or ("\t" if suffix == ".tsv" else ","))
        table = _Table(path)
        example_columns = () if self.column is None else (self.column,)
        single = tuple(column for column in (self.split, self.group, *self.extra_fields.values()) if column is not None)
        # Equal labels share one tuple: a million rows of two classes need two objects.
        unique: dict[tuple[str, ...], tuple[str, ...]] = {}
        for line, record in records:
            where = f"{path}:{line}"
            for column in (*example_columns, *self.labels, *single):
                if column not in record:
                    options = f"{self.example} and label" if example_columns else "label"
                    raise _missing_column(column, record, where, options, json_lines=suffix in JSON_LINES)
            labels = self._label_list(record) if self.target == "label_list" else _single(record, self.labels, where)
            table.values.append(self._example(record, where))
            table.labels.append(unique.setdefault(labels, labels))
            table.lines.append(line)
            if single:  # most tables have no such columns: save a dict per row
                table.extra.append(dict(zip(single, _single(record, single, where), strict=True)))
        if not table.values:
            raise DataError("the table contains no rows", where=str(path))
        return table

    def _example(self, record: Record, where: str) -> Any:
        if self.column is None:
            named = {*self.labels, self.split, self.group, *self.extra_fields.values()}
            row = {name: value for name, value in record.items() if name not in named}
            if not row:
                raise DataError(f"the {self.example} is empty: every column is used for something else", where=where)
            return row
        value = record[self.column]
        assert isinstance(value, str)
        if not value.strip():
            raise DataError(f"column {self.column!r} is empty", where=where, fix="fill it, or remove the row")
        return value

    def _label_list(self, record: Record) -> tuple[str, ...]:
        value = record[self.labels[0]]
        names = value.split(self.separator) if isinstance(value, str) else value
        return tuple(stripped for name in names if (stripped := name.strip()))

    def _wrong_encoding(self, path: Path) -> DataError:
        """Return the error of a table in another encoding, with the line of the first wrong byte.

        Decoding in chunks does not give the position in the file, so the file is read again and decoded at once.
        """
        with open_table(path) as file:
            content = file.read()
        if codecs.lookup(self.encoding).name == "utf-16" and not content.startswith(UTF_16):
            fix = "set encoding to that of the file; all tables of a dataset must have the same one"
            return DataError("the table has no byte order mark of UTF-16", where=f"{path}:1", fix=fix)
        try:
            content.decode(self.encoding)
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            fix = "set encoding to that of the file (cp1252 and utf-16 are common), or save it as UTF-8"
            if content.startswith(UTF_16):
                fix = "the file has a byte order mark of UTF-16: set encoding: utf-16"
            byte = error.object[error.start]
            return DataError(f"byte {byte:#04x} is not {self.encoding}", where=f"{path}:{line}", fix=fix)
        return DataError("the table changed while it was read", where=str(path), fix="run the command again")


@dataclass
class _Table:
    """Rows of a table as columns.

    Args:
        path: Path of the table.
        lines: First line of each row.
        values: Raw value of each row.
        labels: Labels of each row.
        extra: Values of the columns for split, group and further fields, by column.
    """

    path: Path
    lines: array[int] = field(default_factory=lambda: array("q"))
    values: list[Any] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    extra: list[dict[str, str]] = field(default_factory=list)

    @property
    def names(self) -> LineNames:
        return LineNames(self.path, self.lines)


def _single(record: Record, columns: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the values of some columns that must contain one value each."""
    values = []
    for column in columns:
        value = record[column]
        if not isinstance(value, str):
            fix = "set target: label_list, or give one value per row"
            raise DataError(f"column {column!r} is wrong: expected one value, got a list", where=where, fix=fix)
        if not value.strip():
            raise DataError(f"column {column!r} is empty", where=where, fix="fill it, or remove the row")
        values.append(value.strip())
    return tuple(values)


def _by_split(table: _Table, column: str) -> dict[str, _Table]:
    """Divide a table by the column with the split of each row."""
    tables: dict[str, _Table] = {}
    for line, value, labels, extra in zip(table.lines, table.values, table.labels, table.extra, strict=True):
        name = SPLIT_NAMES.get(extra[column].lower())
        if name is None:
            where, fix = f"{table.path}:{line}", "write one of the available names"
            raise DataError.of(
                [unknown_name("split", extra[column], SPLIT_NAMES, owner=f"column {column!r}", where=where, fix=fix)]
            )
        part = tables.setdefault(name, _Table(table.path))
        part.lines.append(line)
        part.values.append(value)
        part.labels.append(labels)
        part.extra.append(extra)
    if "train" not in tables:
        raise DataError(f"column {column!r} assigns no row to the split train", where=str(table.path))
    return tables


def _group_codes(tables: Mapping[str, _Table], column: str | None) -> dict[str, npt.NDArray[np.int64]]:
    """Return the group of each row as an integer, by split, and refuse a group that is in two splits."""
    if column is None:
        return {}
    numbers: dict[str, int] = {}
    split_of: dict[str, str] = {}
    codes = {}
    for name, table in tables.items():
        for row, extra in enumerate(table.extra):
            group = extra[column]
            if split_of.setdefault(group, name) != name:
                raise DataError(
                    f"the group {group!r} is in {split_of[group]} and in {name}",
                    where=table.names[row],
                    fix="assign all rows of a group to one split",
                )
        codes[name] = np.array([numbers.setdefault(e[column], len(numbers)) for e in table.extra], dtype=np.int64)
    return codes


def _missing_column(column: str, record: Record, where: str, options: str, *, json_lines: bool) -> DataError:
    if len(record) == 1 and not json_lines:
        fix = "there is only one column; set delimiter to the character between columns"
    else:
        fix = f"set {options} to the names of the columns"
    return DataError.of([unknown_name("column", column, record, where=where, fix=fix)])


def _floats(table: _Table, columns: Sequence[str], parse: Callable[[str], float]) -> npt.NDArray[np.float32]:
    """Return the label columns as numbers, float32 (N, C)."""
    values = np.empty((len(table.values), len(columns)), dtype=np.float32)
    for index, labels in enumerate(table.labels):
        for position, (column, label) in enumerate(zip(columns, labels, strict=True)):
            try:
                values[index, position] = parse(label)
            except ValueError as error:
                where = table.names[index]
                raise DataError(f"column {column!r} is wrong: expected {error}, got {label!r}", where=where) from None
    return values


def _zero_or_one(text: str) -> float:
    try:
        return {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}[text.lower()]
    except KeyError:
        raise ValueError("0 or 1") from None


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number
