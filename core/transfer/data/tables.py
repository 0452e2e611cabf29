"""Examples and their labels from tables of your own: CSV, TSV, JSON Lines."""

from __future__ import annotations

import codecs
import difflib
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
from transfer.errors import ConfigError, DataError
from transfer.interfaces import Data, DataSpec, Split
from transfer.system.downloads import find_file

TableTarget = Literal["class", "labels", "label_list", "number"]
"""``class``: each example is of one class. ``labels``: each column says 0 or 1. ``label_list``: one column names all
labels of an example. ``number``: each column is a number."""
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


class Tables:
    """Examples and their labels in tables: CSV, TSV, or JSON Lines (``.jsonl``), plain or ``.gz``.

    Args:
        train: The table to train on, by its path (or its name in the data folder).
        val: The table that picks the best epoch.
        test: The table to test on.
        example: The option that names the column of the example (``text``), which is also what an example is called.
        column: The name of that column; None: an example is the whole row, a dict of all columns not named here.
        label: Column of the label; for ``labels`` and ``number``, one column each.
        target: What the labels say.
        separator: What separates the labels of a ``label_list``; JSON Lines may hold lists instead.
        delimiter: What separates the columns; None: a tab in a .tsv file, a comma elsewhere.
        encoding: Character encoding of the files.
        split: Column that says for each row of the one table which split it is of.
        group: Column of what must not be torn apart (a patient, an author): no group is in two splits.
        test_fraction: The part of ``train`` that becomes the test split where there is none.
        extra_fields: Further fields of an example, and the column of each (``{"text": "caption"}``).

    Raises:
        ConfigError: Options that do not go together.
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
        columns = ({} if column is None else {example: column}) | dict(extra_fields or {})
        if not labels or len({*columns.values(), *labels}) != len(columns) + len(labels):
            named = ", ".join(f"{what} {name!r}" for what, name in columns.items()) + (" and " if columns else "")
            one_for_each = "".join(f"one column for the {what} and " for what in columns)
            raise ConfigError(
                f"{named}label {', '.join(map(repr, labels)) or '()'} do not name different columns",
                fix=f"name {one_for_each}at least one other for the label",
            )
        if target in ("class", "label_list") and len(labels) > 1:
            raise ConfigError(
                f"a {target.replace('_', ' ')} is in one column, but label names {len(labels)}: {', '.join(labels)}",
                fix="name one column, or set target: labels (zeros and ones) or target: number",
            )
        if not separator:
            raise ConfigError("separator is empty", fix='write what stands between two labels, such as "|"')
        if delimiter is not None and len(delimiter) != 1:
            raise ConfigError(f"delimiter is one character, not {delimiter!r}", fix=r'write ";" or "\t"')
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ConfigError(
                f"there is no encoding called {encoding!r}", available=("utf-8-sig", "utf-16", "latin-1", "cp1252")
            ) from None
        if split is not None and (val is not None or test is not None):
            raise ConfigError(
                f"column {split!r} says which split a row is of, so there is no other table",
                fix="remove val and test, or split",
            )
        if test_fraction and (test is not None or split is not None):
            raise ConfigError(
                "test_fraction cuts a test split from train, and there is one already", fix="remove test_fraction"
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
        """Return what the options alone say of data whose examples are in ``field``."""
        fields = (field, *self.extra_fields)
        if self.target == "class":
            return DataSpec(fields, "class")
        if self.target == "label_list":
            return DataSpec(fields, "labels")
        return DataSpec(fields, self.target, self.labels)

    def read(self, field: str) -> Data:
        """Read the tables; classes are in alphabetical order. The raw values are what stands in the column, as texts.

        Raises:
            DataError: A table is missing or not what it should be; the message names file and line.
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
                    f"column {self.labels[0]!r} holds one class alone: {classes[0]!r}",
                    where=self.paths["train"],
                    fix="training needs two classes or more",
                )
            return replace(self.spec(field), classes=classes), {
                name: encode_labels(columns[name], classes, table.names.__getitem__) for name, table in tables.items()
            }
        if self.target == "label_list":
            classes = tuple(sorted({name for row in train.labels for name in row}))
            if not classes:
                raise DataError(f"column {self.labels[0]!r} names no label", where=self.paths["train"])
            return replace(self.spec(field), classes=classes), {
                name: multi_hot(table.labels, classes, table.names.__getitem__) for name, table in tables.items()
            }
        parse = _zero_or_one if self.target == "labels" else _number
        return self.spec(field), {name: _floats(table, self.labels, parse) for name, table in tables.items()}

    def find(self, written: str) -> Path:
        """Return the path of a table, from the working folder or else from the data folder."""
        path = Path(written).expanduser()
        return path if path.is_file() else find_file(written) or path

    def _read(self, written: str) -> _Table:
        path = self.find(written)
        try:
            newline = "\n" if table_suffix(path) in JSON_LINES else ""
            with open_table(path) as file, io.TextIOWrapper(file, self.encoding, newline=newline) as lines:
                return self._rows(lines, path)
        except UnicodeError:  # of UTF-16 without its mark it is no UnicodeDecodeError
            raise self._of_another_encoding(path) from None
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"the table cannot be read: {getattr(error, 'strerror', None) or error}",
                where=str(path),
                fix="give the path of a .csv, .tsv or .jsonl file",
            ) from error

    def _rows(self, lines: Iterable[str], path: Path) -> _Table:
        """Read a table row by row: no more of it is in memory at once than the values that are kept."""
        suffix = table_suffix(path)
        if suffix in JSON_LINES:
            records = read_json_lines(lines, path, self.column, self.example)
        else:
            records = read_delimited(lines, path, self.delimiter or ("\t" if suffix == ".tsv" else ","))
        table = _Table(path)
        own = () if self.column is None else (self.column,)
        single = tuple(column for column in (self.split, self.group, *self.extra_fields.values()) if column is not None)
        known: dict[tuple[str, ...], tuple[str, ...]] = {}  # a million rows of two classes are two objects
        for line, record in records:
            where = f"{path}:{line}"
            for column in (*own, *self.labels, *single):
                if column not in record:
                    options = f"{self.example} and label" if own else "label"
                    raise _missing_column(column, record, where, options, json_lines=suffix in JSON_LINES)
            labels = self._label_list(record) if self.target == "label_list" else _single(record, self.labels, where)
            table.values.append(self._example(record, where))
            table.labels.append(known.setdefault(labels, labels))
            table.lines.append(line)
            if single:
                table.extra.append(dict(zip(single, _single(record, single, where), strict=True)))
        if not table.values:
            raise DataError("the table holds no rows", where=str(path))
        return table

    def _example(self, record: Record, where: str) -> Any:
        if self.column is None:
            named = {*self.labels, self.split, self.group, *self.extra_fields.values()}
            row = {name: value for name, value in record.items() if name not in named}
            if not row:
                raise DataError(f"the {self.example} is empty: every column has another meaning", where=where)
            return row
        value = record[self.column]
        assert isinstance(value, str)
        if not value.strip():
            raise DataError(f"column {self.column!r} is empty", where=where, fix="fill it, or remove the row")
        return value

    def _label_list(self, record: Record) -> tuple[str, ...]:
        found = record[self.labels[0]]
        names = found.split(self.separator) if isinstance(found, str) else found
        return tuple(stripped for name in names if (stripped := name.strip()))

    def _of_another_encoding(self, path: Path) -> DataError:
        """Say where the table is not of its encoding: read at once, it tells the place."""
        with open_table(path) as file:
            content = file.read()
        if codecs.lookup(self.encoding).name == "utf-16" and not content.startswith(UTF_16):
            fix = "set encoding to that of the file; all tables of a dataset have the same one"
            return DataError("the table does not begin as one of UTF-16 does", where=f"{path}:1", fix=fix)
        try:
            content.decode(self.encoding)
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            fix = "set encoding to that of the file (cp1252 and utf-16 are common), or save it as UTF-8"
            if content.startswith(UTF_16):
                fix = "the file begins as one of UTF-16 does: set encoding: utf-16"
            byte = error.object[error.start]
            return DataError(f"byte {byte:#04x} is not {self.encoding}", where=f"{path}:{line}", fix=fix)
        return DataError("the table was changed while it was read", where=str(path), fix="run it again")


@dataclass
class _Table:
    path: Path
    lines: array[int] = field(default_factory=lambda: array("q"))
    values: list[Any] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    extra: list[dict[str, str]] = field(default_factory=list)

    @property
    def names(self) -> LineNames:
        return LineNames(self.path, self.lines)


def _single(record: Record, columns: Sequence[str], where: str) -> tuple[str, ...]:
    values = []
    for column in columns:
        value = record[column]
        if not isinstance(value, str):
            fix = "set target: label_list, or give a single value"
            raise DataError(f"{column!r} holds a list, not a single value", where=where, fix=fix)
        if not value.strip():
            raise DataError(f"column {column!r} is empty", where=where, fix="fill it, or remove the row")
        values.append(value.strip())
    return tuple(values)


def _by_split(table: _Table, column: str) -> dict[str, _Table]:
    """Take a table apart by the column that names each row's split."""
    found: dict[str, _Table] = {}
    for line, value, labels, extra in zip(table.lines, table.values, table.labels, table.extra, strict=True):
        name = SPLIT_NAMES.get(extra[column].lower())
        if name is None:
            raise DataError(
                f"column {column!r} names no split: {extra[column]!r}",
                where=f"{table.path}:{line}",
                available=tuple(SPLIT_NAMES),
                fix="write one of these",
            )
        part = found.setdefault(name, _Table(table.path))
        part.lines.append(line)
        part.values.append(value)
        part.labels.append(labels)
        part.extra.append(extra)
    if "train" not in found:
        raise DataError(f"no row is of the split train by column {column!r}", where=str(table.path))
    return found


def _group_codes(tables: Mapping[str, _Table], column: str | None) -> dict[str, npt.NDArray[np.int64]]:
    """Return the number of each row's group, and refuse a group that is in two splits."""
    if column is None:
        return {}
    numbers: dict[str, int] = {}
    home: dict[str, str] = {}
    codes = {}
    for name, table in tables.items():
        for row, extra in enumerate(table.extra):
            group = extra[column]
            if home.setdefault(group, name) != name:
                raise DataError(
                    f"the group {group!r} is in {home[group]} and in {name}",
                    where=table.names[row],
                    fix="give all rows of a group to one split",
                )
        codes[name] = np.array([numbers.setdefault(e[column], len(numbers)) for e in table.extra], dtype=np.int64)
    return codes


def _missing_column(column: str, record: Record, where: str, options: str, *, json_lines: bool) -> DataError:
    close = difflib.get_close_matches(column, record, n=1)
    if close:
        fix = f"did you mean {close[0]!r}?"
    elif len(record) == 1 and not json_lines:
        fix = "there is one column alone; set delimiter to what separates them"
    else:
        fix = f"set {options} to the names of the columns"
    return DataError(f"there is no column {column!r}", where=where, available=list(record), fix=fix)


def _floats(table: _Table, columns: Sequence[str], parse: Callable[[str], float]) -> npt.NDArray[np.float32]:
    values = np.empty((len(table.values), len(columns)), dtype=np.float32)
    for index, labels in enumerate(table.labels):
        for position, (column, label) in enumerate(zip(columns, labels, strict=True)):
            try:
                values[index, position] = parse(label)
            except ValueError as error:
                where = table.names[index]
                raise DataError(f"column {column!r} holds {label!r}, which is {error}", where=where) from None
    return values


def _zero_or_one(text: str) -> float:
    try:
        return {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}[text.lower()]
    except KeyError:
        raise ValueError("neither 0 nor 1") from None


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("no finite number")
    return number
