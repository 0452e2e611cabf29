"""Examples that are left out of training and validation, listed in a CSV file such as that of an audit."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from transfer.errors import DataError
from transfer.interfaces import Data, Split
from transfer.system.formatting import format_names

MAX_NAMES_SHOWN = 5
"""Maximum number of unknown names in an error."""
_DECISIONS = {"yes": True, "no": False}


def read_exclusions(path: Path) -> frozenset[str]:
    """Return the names of the examples to leave out: those whose column ``exclude`` contains ``yes``.

    Raises:
        DataError: The file cannot be read, lacks a column, or contains another word than yes and no.
    """
    try:
        with path.expanduser().open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the list of excluded examples cannot be read: {error}", where=str(path)) from error
    if missing := {"name", "exclude"} - set(columns):
        raise DataError(
            f"the list of excluded examples has no column {' and '.join(sorted(missing))}",
            where=str(path),
            available=columns,
            fix="write it with: transfer audit CONFIG",
        )
    names = set()
    for line, row in rows:
        decision = (row["exclude"] or "").strip().lower()
        if decision not in _DECISIONS:
            raise DataError(f"exclude is wrong: expected yes or no, got {decision!r}", where=f"{path}:{line}")
        if _DECISIONS[decision]:
            names.add(row["name"])
    return frozenset(names)


def without(splits: Mapping[str, Split], names: frozenset[str], data: Data, where: str) -> dict[str, Split]:
    """Return the splits with fewer training and validation examples. The test split does not change.

    Args:
        splits: Complete splits.
        names: Names of the examples to leave out.
        data: Data with the splits of the dataset, in which the names must exist.
        where: Path of the list, for errors.

    Raises:
        DataError: An example does not exist, the examples have no names, or a split would be empty.
    """
    existing = {str(name) for split in data.splits.values() for name in split.names}
    if unknown := sorted(names - existing):
        raise DataError(
            f"the data has no example {format_names(unknown, MAX_NAMES_SHOWN)}: expected names of examples in the list",
            where=where,
            fix="list the examples of this data again: transfer audit CONFIG",
        )
    remaining = dict(splits)
    for name in ("train", "validation"):
        if name in splits:
            split = splits[name]
            stays = np.array([str(one) not in names for one in split.names], dtype=bool)
            if not stays.any():
                raise DataError(f"all examples of the {name} split are left out", where=where)
            remaining[name] = split.select(np.flatnonzero(stays))
    return remaining
