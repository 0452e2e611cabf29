"""A dataset of table rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from transfer import Data, Dataset, DataSpec, Tables, TableTarget


class TabularCSV(Dataset):
    """Rows of a table with a header: CSV, TSV, or JSON Lines. Every column without another role is a feature.

    Args:
        train: Path of the training table, or its name in the data folder.
        val: Path of the validation table; null: the validation split is split off from ``train``.
        test: Path of the test table, with the same columns; null: no separate test table.
        label: Column of the target. With target ``labels`` or ``number``, one column or several.
        target: Kind of target. ``class``: one class name per row. ``labels``: a 0/1 column per label. ``label_list``: all
            label names in one column. ``number``: columns of numbers.
        delimiter: Column separator; null: a tab for .tsv files, otherwise a comma.
        split: Column with the split of each row of ``train``: train, val or test. Null: no such column.
        group: Column of groups (a customer, a patient) that must not occur in two splits. Null: no groups.
        test_fraction: Fraction of ``train`` that becomes the test split if there is none.
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
        """One field, ``row``. The classes are read from the data."""
        return self._tables.spec("row")

    def load(self) -> Data:
        """Read the tables. Each row is a dict from column to text.

        Raises:
            DataError: A table is missing or invalid; the message names file and line.
        """
        return self._tables.read("row")
