"""Datasets from tables with examples and labels: CSV, TSV, JSON, JSON Lines, Parquet."""

from __future__ import annotations

import codecs
import io
import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from transfer.data.delimited import Quoting, choose_dialect, read_delimited
from transfer.data.records import (
    UNREADABLE,
    UTF_16,
    Record,
    open_rows,
    open_table,
    row_name,
)
from transfer.data.splits import split_off
from transfer.data.table_rows import TableRows, by_split, group_codes
from transfer.data.table_targets import class_targets, column_targets, label_list_targets
from transfer.data.targets import (
    as_text,
    label_text,
    parse_label_list,
)
from transfer.errors import ConfigError, DataError, Problem, unknown_name
from transfer.interfaces import Data, DataSpec, Split
from transfer.system.downloads import find_file

logger = logging.getLogger(__name__)

TableTarget = Literal["class", "labels", "label_list", "number"]
"""``class``: one column contains the class. ``labels``: each column contains 0 or 1. ``label_list``: one column
contains the names of all labels. ``number``: each column contains a number."""
MAX_POSITIONS_SHOWN = 30
"""Maximum number of lines in the message about empty examples."""


class Tables:
    r"""Reader of examples and labels in tables: CSV, TSV, JSON, JSON Lines, or Parquet, plain or compressed.

    The format, the compression, the delimiter and the quoting are recognized by the content of the file. The suffix
    only decides if several delimiters fit. Parquet needs pyarrow, which the extra ``huggingface`` installs.

    Args:
        train: Path of the table to train on, or its name in the data folder.
        val: Path of the table to select the best epoch on; None if there is none.
        test: Path of the table to test on; None if there is none.
        example: Name of an example in messages, and of the option that names its column (``text``).
        column: Name of the column of the example, or its number if there is no header. None makes an example a dict of
            all columns that are not named here.
        label: Name of the column of the label; for ``labels`` and ``number``, the names of several columns.
        target: Content of the label columns: class, labels, label_list or number.
        separator: Separator of the labels in a ``label_list``. Lists in JSON or Python notation are read as lists.
        delimiter: Character between columns; None chooses the one that gives the named columns.
        encoding: Character encoding of the files.
        split: Name of the column with the split of each row, if there is only one table.
        group: Name of the column with the group of each row (a patient, an author). No group is in two splits.
        test_fraction: Fraction of ``train`` to use for testing if there is no test split; 0 uses none.
        extra_fields: Columns of further fields of an example, by field (``{"text": "caption"}``).
        header: Whether the first row of a delimited file contains the names of the columns. False numbers the columns
            from 0; a list contains the names of the columns of a file without header.
        quoting: Meaning of quotes in a delimited file. ``csv``: a field in quotes may contain delimiters, line ends
            and doubled quotes. ``backslash``: the same with ``\"`` for a quote. ``none``: quotes are part of the text.
            None chooses one by the content.
        label_names: Names of the labels if a ``label_list`` contains a zero or one for each label (``[0, 1, 0]``).
        bad_examples: Action for empty examples and those without a class: ``error`` refuses the table; ``skip`` leaves
            them out and logs their lines. The messages call the option ``bad_texts`` if ``example`` is ``text``. None
            has no such option.
        is_empty: Function that returns whether an example is empty. By default, only whitespace is.

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
        column: str | int | None,
        label: str | int | tuple[str | int, ...],
        target: TableTarget = "class",
        separator: str = ",",
        delimiter: str | None = None,
        encoding: str = "utf-8-sig",
        split: str | int | None = None,
        group: str | int | None = None,
        test_fraction: float = 0.0,
        extra_fields: Mapping[str, str | int] | None = None,
        header: bool | tuple[str, ...] = True,
        quoting: Quoting | None = None,
        label_names: tuple[str, ...] = (),
        bad_examples: Literal["error", "skip"] | None = None,
        is_empty: Callable[[str], bool] = lambda text: not text.strip(),
    ) -> None:
        # Columns of a file without header have their numbers as names.
        labels = tuple(map(str, label if isinstance(label, tuple) else (label,)))
        column, split, group = (None if name is None else str(name) for name in (column, split, group))
        extra_columns = {name: str(written) for name, written in (extra_fields or {}).items()}
        # Every column may have only one meaning.
        columns = ({} if column is None else {example: column}) | extra_columns
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
        if label_names and target != "label_list":
            raise ConfigError(
                f"label_names names the values of a label_list, but target is {target}", fix="remove label_names"
            )
        if len(set(label_names)) < len(label_names):
            raise ConfigError("label_names contains a name twice", fix="give each label its own name")
        if not isinstance(header, bool) and (not header or len(set(header)) < len(header)):
            raise ConfigError(
                "header is wrong: expected different names of columns",
                fix="name every column of the file in order, or write header: false and use numbers",
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
        self.column: str | None = column
        self.labels = labels
        self.target: TableTarget = target
        self.separator = separator
        self.delimiter = delimiter
        self.encoding = encoding
        self.split = split
        self.group = group
        self.test_fraction = test_fraction
        self.extra_fields = extra_columns
        self.header = header
        self.quoting = quoting
        self.label_names = label_names
        self.bad_examples = bad_examples
        self.is_empty = is_empty

    def spec(self, field: str) -> DataSpec:
        """Return the spec of data with examples in ``field``, as far as the options determine it."""
        fields = (field, *self.extra_fields)
        if self.target == "class":
            return DataSpec(fields, "class")
        if self.target == "label_list":
            return DataSpec(fields, "labels", self.label_names)
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
            tables = by_split(tables["train"], self.split)
        return self._data(field, tables)

    def read_records(
        self, field: str, splits: Mapping[str, Iterable[Record]], class_names: Mapping[str, Sequence[str]]
    ) -> Data:
        """Read rows that another library has read, by the same rules as tables.

        Args:
            field: Name of the field for the examples (``text``).
            splits: Rows of each split, as mappings from column to value.
            class_names: Names of the classes of columns that contain class indices, by column.

        Raises:
            DataError: A row is malformed; the error names the split and the index of the row.
        """
        tables = {
            name: self._table(enumerate(rows), Path(name), by_line=False, class_names=class_names)
            for name, rows in splits.items()
        }
        return self._data(field, tables)

    def _data(self, field: str, tables: Mapping[str, TableRows]) -> Data:
        spec, targets = self._targets(self.spec(field), tables)
        codes = group_codes(tables, self.group)
        splits = {
            name: Split({field: table.values} | self._extra_columns(table), targets[name], table.names, codes.get(name))
            for name, table in tables.items()
        }
        if self.test_fraction:
            splits["train"], splits["test"] = split_off(splits["train"], self.test_fraction)
        return Data(spec, splits)

    def _extra_columns(self, table: TableRows) -> dict[str, list[str]]:
        return {name: [extra[column] for extra in table.extra] for name, column in self.extra_fields.items()}

    def _targets(self, spec: DataSpec, tables: Mapping[str, TableRows]) -> tuple[DataSpec, dict[str, npt.NDArray[Any]]]:
        if self.target == "class":
            return class_targets(tables, self.labels[0], spec)
        if self.target == "label_list":
            return label_list_targets(tables, self.labels[0], self.separator, spec)
        return spec, column_targets(tables, spec)

    def find(self, written: str) -> Path:
        """Return the path of a table: relative to the working folder, or in the data folder if it is not there."""
        path = Path(written).expanduser()
        return path if path.is_file() else find_file(written) or path

    def _read(self, written: str) -> TableRows:
        path = self.find(written)
        try:
            columns = None if self.column is None else self._columns()
            read = partial(self._delimited, path=path)
            with open_rows(path, read, columns=columns, encoding=self.encoding, example=self.example) as rows:
                return self._table(
                    rows.records,
                    path,
                    by_line=rows.by_line,
                    is_delimited=rows.is_delimited,
                    class_names=rows.class_names,
                )
        except UnicodeError:  # not UnicodeDecodeError: UTF-16 without a byte order mark raises the base class
            raise self._wrong_encoding(path) from None
        except UNREADABLE as error:
            raise DataError(
                f"the table cannot be read: {getattr(error, 'strerror', None) or error}",
                where=str(path),
                fix="give the path of a table: CSV, TSV, JSON, JSON Lines or Parquet",
            ) from error

    def _columns(self) -> tuple[str, ...]:
        """Return the names of the columns that are read: of the example, the labels, and those with one text each."""
        return (*(() if self.column is None else (self.column,)), *self.labels, *self._single_columns())

    def _single_columns(self) -> tuple[str, ...]:
        return tuple(column for column in (self.split, self.group, *self.extra_fields.values()) if column is not None)

    def _delimited(self, lines: io.TextIOWrapper, path: Path) -> Generator[tuple[int, Record], None, None]:
        columns = self._columns()
        # Lists of labels differ from row to row, so they do not show whether a line is a row.
        labels = () if self.target == "label_list" else self.labels
        dialect = choose_dialect(
            lines,
            path,
            header=self.header,
            columns=columns,
            labels=labels,
            delimiter=self.delimiter,
            quoting=self.quoting,
        )
        read = columns if self.column is not None else None
        return read_delimited(lines, path, dialect, header=self.header, columns=read, labels=labels)

    def _table(
        self,
        rows: Iterator[tuple[int, Record]],
        path: Path,
        *,
        by_line: bool = True,
        is_delimited: bool = False,
        class_names: Mapping[str, Sequence[str]] | None = None,
    ) -> TableRows:
        """Read a table row by row, so that memory contains only the values that are kept."""
        single, columns = self._single_columns(), self._columns()
        table = TableRows(path, by_line, tuple((class_names or {}).get(self.labels[0], ())))
        # Equal labels share one tuple: a million rows of two classes need two objects.
        unique: dict[tuple[str, ...], tuple[str, ...]] = {}
        bad_rows: dict[str, list[int]] = {}
        for position, record in rows:
            where = row_name(path, position, by_line=by_line)
            for column in columns:
                if column not in record:
                    raise self._missing_column(column, record, where, is_delimited=is_delimited)
            value = self._example(record, where)
            if problem := self._row_problem(value, record, table):
                bad_rows.setdefault(problem, []).append(position)
                continue
            if table.class_names and self.target in ("class", "label_list"):
                record = {**record, self.labels[0]: _named(record[self.labels[0]], table.class_names)}
            labels = (
                self._label_list(record, where) if self.target == "label_list" else _single(record, self.labels, where)
            )
            table.values.append(value)
            table.labels.append(unique.setdefault(labels, labels))
            table.positions.append(position)
            if single:  # most tables have no such columns: save a dict per row
                table.extra.append(dict(zip(single, _single(record, single, where), strict=True)))
        if bad_rows:
            self._report(bad_rows, table)
        if not table.values:
            raise DataError("the table contains no rows", where=str(path))
        return table

    def _row_problem(self, value: Any, record: Record, table: TableRows) -> str | None:
        """Return the reason why a row cannot be used: its example or its class is missing. None if there is none."""
        if isinstance(value, str) and self.is_empty(value):
            return f"column {self.column!r} is empty"
        if self.bad_examples is not None:  # the further fields are texts of the same example
            for column in self.extra_fields.values():
                text = as_text(record[column])
                if text is not None and self.is_empty(text):
                    return f"column {column!r} is empty"
        if self.target == "class":
            label = record[self.labels[0]]
            if label_text(label) == "":
                return f"column {self.labels[0]!r} is empty"
            if table.class_names and label == -1:  # the convention of the Hub for examples without a label
                return f"column {self.labels[0]!r} is -1, no label,"
        return None

    def _report(self, bad_rows: Mapping[str, Sequence[int]], table: TableRows) -> None:
        """Refuse or log all rows that cannot be used, with one problem per reason."""
        count = len(table.values) + sum(map(len, bad_rows.values()))
        option = f", or set bad_{self.example}s: skip to leave them out" if self.bad_examples else ""
        problems = []
        for reason, positions in bad_rows.items():
            shown = ", ".join(map(str, positions[:MAX_POSITIONS_SHOWN]))
            more = len(positions) - MAX_POSITIONS_SHOWN
            unit = ("line" if table.by_line else "row") + "s" * (len(positions) > 1)
            message = f"{reason} in {len(positions):,} of {count:,} rows: {unit} {shown}"
            message += f" and {more:,} more" if more > 0 else ""
            where = row_name(table.path, positions[0], by_line=table.by_line)
            problems.append(Problem(message, where, fix=f"fill or remove them{option}"))
        if self.bad_examples != "skip":
            raise DataError.of(problems)
        for problem in problems:
            logger.warning("%s: left out: %s", table.path, problem.message)

    def _example(self, record: Record, where: str) -> Any:
        if self.column is None:
            named = {*self._columns()}
            row = {name: _as_cell(value) for name, value in record.items() if name not in named}
            if not row:
                raise DataError(f"the {self.example} is empty: every column is used for something else", where=where)
            return row
        value = record[self.column]
        text = as_text(value)
        if text is None:
            raise DataError(
                f"column {self.column!r} is wrong: expected {self.example}, got {type(value).__name__}",
                where=where,
                fix=f"give one {self.example} per row",
            )
        return text

    def _label_list(self, record: Record, where: str) -> tuple[str, ...]:
        value = record[self.labels[0]]
        try:
            return parse_label_list(value, self.separator)
        except ValueError as error:
            raise DataError(
                f"column {self.labels[0]!r} is wrong: expected {error}, got {value!r}",
                where=where,
                fix="write [] for an example without labels",
            ) from None

    def _missing_column(self, column: str, record: Record, where: str, *, is_delimited: bool) -> DataError:
        options = "label" if self.column is None else f"{self.example} and label"
        fix = f"set {options} to the names of the columns"
        if is_delimited and len(record) == 1:
            fix = "there is only one column; set delimiter to the character between columns"
        elif is_delimited and self.header is True:
            fix += ", or header: false if the first row contains no names"
        return DataError.of([unknown_name("column", column, record, where=where, fix=fix)])

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


def _as_cell(value: object) -> str | list[str]:
    """Return a value as the cell of a row: text, or a list of texts."""
    return list(map(_cell_text, value)) if isinstance(value, list) else _cell_text(value)


def _cell_text(value: object) -> str:
    text = as_text(value)
    return json.dumps(value, default=str) if text is None else text


def _named(value: object, names: Sequence[str]) -> object:
    """Return a class index, or a list of them, as the names of the classes. Other values stay."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _single(record: Record, columns: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the values of some columns that must contain one value each."""
    values = []
    for column in columns:
        value = record[column]
        text = label_text(value)
        if text is None:
            got = "a list" if isinstance(value, list) else type(value).__name__
            fix = "set target: label_list, or give one value per row"
            raise DataError(f"column {column!r} is wrong: expected one value, got {got}", where=where, fix=fix)
        if not text:
            raise DataError(f"column {column!r} is empty", where=where, fix="fill it, or remove the row")
        values.append(text)
    return tuple(values)
