"""Texts and labels from tables of your own: CSV, TSV, JSON Lines."""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from transfer import ConfigError, Data, DataError, Dataset, DataSpec, Split, find_file
from transfer_text.targets import class_indices, label_sets

JSON_LINES = (".jsonl", ".ndjson")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Record = dict[str, str | list[str]]


class TextCSV(Dataset):
    """Texts and labels from a table of your own: CSV, TSV, or JSON Lines (``.jsonl``), plain or ``.gz``.

    Args:
        train: The table to train on, by its path (or its name in the data folder).
        val: The table that picks the best epoch; null: it is cut from ``train``. Without a test table it is the test
            split, and validation is cut from ``train``.
        test: The table to test on.
        text: Column of the text.
        label: Column of the label; for ``labels`` and ``number``, one column each.
        target: ``class``: each text is of one class. ``labels``: each column says 0 or 1. ``label_list``: one column
            names all labels of a text. ``number``: each column is a number.
        separator: What separates the labels of a ``label_list``; JSON Lines may hold lists instead.
        delimiter: What separates the columns; null: a tab in a .tsv file, a comma elsewhere.
        encoding: Character encoding of the files.
    """

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        text: str = "text",
        label: str | tuple[str, ...] = "label",
        target: Literal["class", "labels", "label_list", "number"] = "class",
        separator: str = ",",
        delimiter: str | None = None,
        encoding: str = "utf-8-sig",
    ) -> None:
        labels = (label,) if isinstance(label, str) else label
        if not labels or len({text, *labels}) != len(labels) + 1:
            raise ConfigError(
                f"text {text!r} and label {', '.join(map(repr, labels)) or '()'} do not name different columns",
                fix="name one column for the text and at least one other for the label",
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
        paths = {"train": train, "validation": val, "test": test}
        self.paths = {split: path for split, path in paths.items() if path is not None}
        self.text = text
        self.labels = labels
        self.target = target
        self.separator = separator
        self.delimiter = delimiter
        self.encoding = encoding

    @property
    def spec(self) -> DataSpec:
        """A text and its target; the names of classes are in the data."""
        if self.target == "class":
            return DataSpec(("text",), "class")
        if self.target == "label_list":
            return DataSpec(("text",), "labels")
        return DataSpec(("text",), self.target, self.labels)

    def load(self) -> Data:
        """Read the tables; classes are in alphabetical order."""
        tables = {split: self._read(path) for split, path in self.paths.items()}
        train = tables["train"]
        if self.target == "class":
            columns = {split: [row[0] for row in table.labels] for split, table in tables.items()}
            classes = tuple(sorted(set(columns["train"])))
            if len(classes) < 2:
                raise DataError(
                    f"column {self.labels[0]!r} holds one class alone: {classes[0]!r}",
                    where=self.paths["train"],
                    fix="training needs two classes or more",
                )
            targets: dict[str, npt.NDArray[Any]] = {
                split: class_indices(columns[split], classes, table.names.__getitem__)
                for split, table in tables.items()
            }
            return _data(DataSpec(("text",), "class", classes), tables, targets)
        if self.target == "label_list":
            classes = tuple(sorted({name for row in train.labels for name in row}))
            if not classes:
                raise DataError(f"column {self.labels[0]!r} names no label", where=self.paths["train"])
            targets = {s: label_sets(t.labels, classes, t.names.__getitem__) for s, t in tables.items()}
            return _data(DataSpec(("text",), "labels", classes), tables, targets)
        parse = _zero_or_one if self.target == "labels" else _number
        return _data(self.spec, tables, {s: _floats(t, self.labels, parse) for s, t in tables.items()})

    def _read(self, written: str) -> _Table:
        path = Path(written).expanduser()
        if not path.is_file():
            path = find_file(written) or path
        content = self._decode(path)
        suffix = Path(path.name.lower().removesuffix(".gz")).suffix
        if suffix in JSON_LINES:
            records = _json_lines(content, path, self.text)
        else:
            records = _delimited(content, path, self.delimiter or ("\t" if suffix == ".tsv" else ","))
        table = _Table(path)
        for line, record in records:
            where = f"{path}:{line}"
            for column in (self.text, *self.labels):
                if column not in record:
                    raise _missing_column(column, record, where)
            text = record[self.text]
            assert isinstance(text, str)
            if not text.strip():
                raise DataError(f"column {self.text!r} is empty", where=where, fix="fill it, or remove the row")
            table.texts.append(text)
            table.labels.append(
                self._label_list(record) if self.target == "label_list" else self._values(record, where)
            )
            table.lines.append(line)
        if not table.texts:
            raise DataError("the table holds no rows", where=str(path))
        return table

    def _label_list(self, record: Record) -> tuple[str, ...]:
        found = record[self.labels[0]]
        names = found.split(self.separator) if isinstance(found, str) else found
        return tuple(stripped for name in names if (stripped := name.strip()))

    def _values(self, record: Record, where: str) -> tuple[str, ...]:
        values = []
        for column in self.labels:
            value = record[column]
            if not isinstance(value, str):
                fix = "set target: label_list, or give a single value"
                raise DataError(f"{column!r} holds a list, not a single value", where=where, fix=fix)
            if not value.strip():
                raise DataError(f"column {column!r} is empty", where=where, fix="fill it, or remove the row")
            values.append(value.strip())
        return tuple(values)

    def _decode(self, path: Path) -> str:
        content = b""
        try:
            content = path.read_bytes()
            if path.name.lower().endswith(".gz"):
                content = gzip.decompress(content)
            return content.decode(self.encoding)
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            fix = "set encoding to that of the file (cp1252 and utf-16 are common), or save it as UTF-8"
            if content.startswith(_UTF_16):
                fix = "the file begins as one of UTF-16 does: set encoding: utf-16"
            byte = error.object[error.start]
            raise DataError(f"byte {byte:#04x} is not {self.encoding}", where=f"{path}:{line}", fix=fix) from error
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"the table cannot be read: {getattr(error, 'strerror', None) or error}",
                where=str(path),
                fix="give the path of a .csv, .tsv or .jsonl file",
            ) from error


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


@dataclass
class _Table:
    path: Path
    lines: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def names(self) -> LineNames:
        return LineNames(self.path, self.lines)


def _data(spec: DataSpec, tables: Mapping[str, _Table], targets: Mapping[str, npt.NDArray[Any]]) -> Data:
    splits = {s: Split({"text": table.texts}, targets[s], table.names) for s, table in tables.items()}
    return Data(spec, splits)


def _delimited(content: str, path: Path, delimiter: str) -> Iterator[tuple[int, Record]]:
    """Give each record of a table with a header, and the line where it begins."""
    # Python's limit on a field is meant for broken files; a text may well be longer. It is global, so it is put back,
    # and never lowered: a reader that is left half way puts it back late.
    limit = csv.field_size_limit()
    csv.field_size_limit(max(len(content), limit))
    # Strict, because otherwise a quote that is never closed swallows the rest of the file in silence.
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
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


def _json_lines(content: str, path: Path, text: str) -> Iterator[tuple[int, Record]]:
    """Give each object of a file with one on every line; numbers and booleans as JSON writes them."""
    for number, line in enumerate(content.split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"the line is not JSON: {error}", where=where, fix="write one object on each line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"the line holds a {type(record).__name__}, not an object",
                where=where,
                fix='write one object on each line: {"text": ..., "label": ...}',
            )
        if isinstance(record.get(text), list | dict):
            raise DataError(
                f"{text!r} holds a {type(record[text]).__name__}, not a text", where=where, fix="give one text each"
            )
        yield number, {key: _plain(value) for key, value in record.items()}


def _plain(value: object) -> str | list[str]:
    if isinstance(value, list):
        return [item if isinstance(item, str) else json.dumps(item) for item in value]
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _missing_column(column: str, record: Record, where: str) -> DataError:
    close = difflib.get_close_matches(column, record, n=1)
    if close:
        fix = f"did you mean {close[0]!r}?"
    elif len(record) == 1:
        fix = "there is one column alone; set delimiter to what separates them"
    else:
        fix = "set text and label to the names of the columns"
    return DataError(f"there is no column {column!r}", where=where, available=list(record), fix=fix)


def _floats(table: _Table, columns: Sequence[str], parse: Callable[[str], float]) -> npt.NDArray[np.float32]:
    values = np.empty((len(table.texts), len(columns)), dtype=np.float32)
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
