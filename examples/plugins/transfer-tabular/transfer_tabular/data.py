"""Rows of a table of your own."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from transfer import Data, Dataset, DataSpec, Tables, TableTarget


class TabularCSV(Dataset):
    """Rows of a table with a header: CSV, TSV, or JSON Lines; every column that has no other meaning is a feature.

    Args:
        train: The table to train on, by its path (or its name in the data folder).
        val: The table that picks the best epoch; null: it is cut from ``train``.
        test: The table to test on, with the same columns.
        label: Column of what is to be predicted; for ``labels`` and ``number``, one column each.
        target: ``class``: a name in each row. ``labels``: columns of 0 and 1. ``label_list``: all names in one column.
            ``number``: columns of numbers.
        delimiter: What separates the columns; null: a tab in a .tsv file, a comma elsewhere.
        split: Column that says of each row of ``train`` which split it is of: train, val or test.
        group: Column of what must not be torn apart (a customer, a patient): no group is in two splits.
        test_fraction: The part of ``train`` that becomes the test split where there is none.
    """

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        label: str | tuple[str, ...] = "label",
        target: TableTarget = "class",
        delimiter: str | None = None,
        split: str | None = None,
        group: str | None = None,
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        files = {"train": train, "val": val, "test": test, "delimiter": delimiter}
        splits = {"split": split, "group": group, "test_fraction": test_fraction}
        self._tables = Tables(example="row", column=None, label=label, target=target, **files, **splits)

    @property
    def spec(self) -> DataSpec:
        """One field, ``row``; classes are in the data."""
        return self._tables.spec("row")

    def load(self) -> Data:
        """Read the tables: a row is a dict of texts by column.

        Raises:
            DataError: A table is missing or not what it should be; the message names file and line.
        """
        return self._tables.read("row")
