"""Targets of the rows of a table: classes, lists of labels, or numbers."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.data.table_rows import TableRows
from transfer.data.targets import encode_labels, from_multi_hot, is_multi_hot, multi_hot
from transfer.errors import DataError
from transfer.interfaces import DataSpec

logger = logging.getLogger(__name__)

RowsOfSplits = Mapping[str, TableRows]
"""Rows of each split."""
Targets = dict[str, npt.NDArray[Any]]
"""Targets of each split."""

_LIST = re.compile(r"""\[(?=.*[,'"]).*\]$""", re.DOTALL)
_INTEGRAL = re.compile(r"-?\d+(\.0+)?")


def class_targets(tables: RowsOfSplits, column: str, spec: DataSpec) -> tuple[DataSpec, Targets]:
    """Return the spec with the classes of the training table, and the class index of each row, int64 (N,).

    Raises:
        DataError: The column contains lists, fewer than two classes, or a class that is not in the training table.
    """
    train = tables["train"]
    columns = {name: [row[0] for row in table.labels] for name, table in tables.items()}
    # Over all splits together, so that a class has the same name in each.
    _drop_zero_decimals(columns)
    classes = train.class_names or tuple(sorted(set(columns["train"])))
    # Lists that are read as names would give about as many classes as there are rows.
    for name in classes:
        if _LIST.match(name):
            raise DataError(
                f"column {column!r} contains lists of labels: expected one class, got {name}",
                where=train.names[columns["train"].index(name)] if name in columns["train"] else None,
                fix="set target: label_list",
            )
    if len(classes) < 2:
        raise DataError(
            f"column {column!r} contains only the class {classes[0]!r}",
            where=str(train.path),
            fix="add examples of another class",
        )
    return replace(spec, classes=classes), {
        name: encode_labels(columns[name], classes, table.names.__getitem__) for name, table in tables.items()
    }


def label_list_targets(tables: RowsOfSplits, column: str, separator: str, spec: DataSpec) -> tuple[DataSpec, Targets]:
    """Return the spec with the labels of the training table, and their multi-hot encoding, float32 (N, C).

    Args:
        tables: Rows of each split.
        column: Name of the column with the lists.
        separator: Separator of the labels in a list.
        spec: Spec of the data. If it names classes, a list contains a zero or one for each of them.

    Raises:
        DataError: The column contains no label, or a label that is not in the training table.
    """
    train = tables["train"]
    if spec.classes:
        return spec, {
            name: from_multi_hot(table.labels, spec.classes, table.names.__getitem__) for name, table in tables.items()
        }
    # Otherwise 0 and 1 would become two labels, which almost every row has.
    if is_multi_hot(train.labels):
        raise DataError(
            f"column {column!r} contains rows of zeros and ones, and their labels have no names",
            where=train.names[0],
            fix=f"set label_names to a list of {len(train.labels[0])} names, in the order of the values",
        )
    classes = train.class_names or tuple(sorted({name for row in train.labels for name in row}))
    if not classes:
        raise DataError(f"column {column!r} contains no label", where=str(train.path))
    # With a wrong separator, `a|b` is one label: the run would train on classes that do not exist.
    others = [s for s in "|;," if s != separator and any(s in name for name in classes)]
    if others and all(len(row) <= 1 for row in train.labels):
        message = "%s: no example has several labels, but some labels contain %r: set separator if it divides them"
        logger.warning(message, train.path, others[0])
    return replace(spec, classes=classes), {
        name: multi_hot(table.labels, classes, table.names.__getitem__) for name, table in tables.items()
    }


def column_targets(tables: RowsOfSplits, spec: DataSpec) -> Targets:
    """Return the columns that are the spec's classes as numbers, float32 (N, C): zeros and ones, or any.

    Raises:
        DataError: A cell is no such number.
    """
    parse = _zero_or_one if spec.target == "labels" else _number
    return {name: _floats(table, spec.classes, parse) for name, table in tables.items()}


def _drop_zero_decimals(columns: Mapping[str, list[str]]) -> None:
    """Write the labels 0.0 and 1.0 as 0 and 1, in place: tools add the decimals if a value in the column is missing."""
    if all(_INTEGRAL.fullmatch(label) for labels in columns.values() for label in set(labels)):
        for labels in columns.values():
            labels[:] = [label.partition(".")[0] for label in labels]


def _floats(table: TableRows, columns: Sequence[str], parse: Callable[[str], float]) -> npt.NDArray[np.float32]:
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
