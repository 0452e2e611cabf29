"""Rows of a table as columns, and their division into splits and groups."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.data.records import RowNames, row_name
from transfer.errors import DataError, unknown_name

SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


@dataclass
class TableRows:
    """Rows of a table as columns.

    Args:
        path: Path of the table.
        by_line: Whether the positions of the rows are lines.
        class_names: Names of the classes in the metadata of the file, in the order of their indices; may be empty.
        positions: First line of each row, or its index.
        values: Raw value of each row.
        labels: Labels of each row.
        extra: Values of the columns for split, group and further fields, by column.
    """

    path: Path
    by_line: bool
    class_names: tuple[str, ...] = ()
    positions: array[int] = field(default_factory=lambda: array("q"))
    values: list[Any] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    extra: list[dict[str, str]] = field(default_factory=list)

    @property
    def names(self) -> RowNames:
        """The name of each row in errors."""
        return RowNames(self.path, self.positions, by_line=self.by_line)


def by_split(table: TableRows, column: str) -> dict[str, TableRows]:
    """Divide a table by the column with the split of each row."""
    tables: dict[str, TableRows] = {}
    rows = zip(table.positions, table.values, table.labels, table.extra, strict=True)
    for position, value, labels, extra in rows:
        name = SPLIT_NAMES.get(extra[column].lower())
        if name is None:
            where = row_name(table.path, position, by_line=table.by_line)
            fix = "write one of the available names"
            raise DataError.of(
                [unknown_name("split", extra[column], SPLIT_NAMES, owner=f"column {column!r}", where=where, fix=fix)]
            )
        part = tables.setdefault(name, TableRows(table.path, table.by_line, table.class_names))
        part.positions.append(position)
        part.values.append(value)
        part.labels.append(labels)
        part.extra.append(extra)
    if "train" not in tables:
        raise DataError(f"column {column!r} assigns no row to the split train", where=str(table.path))
    return tables


def group_codes(tables: Mapping[str, TableRows], column: str | None) -> dict[str, npt.NDArray[np.int64]]:
    """Return the group of each row as an integer, by split, and refuse a group that is in two splits."""
    if column is None:
        return {}
    numbers: dict[str, int] = {}
    split_of: dict[str, str] = {}
    codes = {}
    for name, table in tables.items():
        for row, extra in enumerate(table.extra):
            group = extra[column]
            # Examples of one group resemble each other: a group in two splits would leak into the test.
            if split_of.setdefault(group, name) != name:
                raise DataError(
                    f"the group {group!r} is in {split_of[group]} and in {name}",
                    where=table.names[row],
                    fix="assign all rows of a group to one split",
                )
        codes[name] = np.array([numbers.setdefault(e[column], len(numbers)) for e in table.extra], dtype=np.int64)
    return codes
