"""Rows of a table of your own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from transfer import Data, DataError, Dataset, DataSpec, Split, class_indices, cut, find_file


class TabularCSV(Dataset):
    """Rows of a CSV file with a header; every column but the label is a feature.

    Args:
        train: The table to train on, by its path (or its name in the data folder).
        test: The table to test on, with the same columns.
        label: Column of what is to be predicted.
        target: ``class``: a name in each row. ``number``: a number.
        test_fraction: The part of ``train`` that becomes the test split where there is none.
    """

    def __init__(
        self,
        *,
        train: str,
        test: str | None = None,
        label: str = "label",
        target: Literal["class", "number"] = "class",
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        self._paths = {"train": train} | ({} if test is None else {"test": test})
        self._label, self._target, self._test_fraction = label, target, 0.0 if test else test_fraction

    @property
    def spec(self) -> DataSpec:
        """One field, ``row``; classes are in the data."""
        return DataSpec(("row",), self._target, (self._label,) if self._target == "number" else ())

    def load(self) -> Data:
        """Read the tables: a row is a dict of texts by column.

        Raises:
            DataError: A table is missing or not what it should be.
        """
        tables = {name: self._read(written) for name, written in self._paths.items()}
        classes = self.spec.classes or tuple(sorted({label for _, label, _ in tables["train"]}))
        splits = {}
        for name, table in tables.items():
            rows, labels, places = ([record[part] for record in table] for part in range(3))
            if self._target == "class":
                targets = class_indices(labels, classes, places.__getitem__)
            else:
                numbers = [_number(label, where) for label, where in zip(labels, places, strict=True)]
                targets = np.array(numbers, dtype=np.float32)[:, None]
            splits[name] = Split({"row": rows}, targets, places)
        if self._test_fraction:
            splits["train"], splits["test"] = cut(splits["train"], self._test_fraction)
        return Data(DataSpec(("row",), self._target, classes), splits)

    def _read(self, written: str) -> list[tuple[dict[str, str], str, str]]:
        """Return of each row its features, its label, and where it stands."""
        path = Path(written) if Path(written).is_file() else find_file(written)
        if path is None:
            raise DataError(f"there is no table {written!r}", fix="give the path of a CSV file")
        found = []
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            if self._label not in (header := reader.fieldnames or ()):
                raise DataError(f"there is no column {self._label!r}", where=f"{path}:1", available=list(header))
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"the row has not {len(header)} fields, as the header has", where=where)
                if not (label := row.pop(self._label).strip()):
                    raise DataError(f"column {self._label!r} is empty", where=where, fix="fill it, or remove the row")
                found.append((row, label, where))
        if not found:
            raise DataError("the table holds no rows", where=str(path))
        return found


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise DataError(f"the label is {text!r}, which is no finite number", where=where)
    return number
