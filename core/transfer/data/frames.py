"""Columns of tables in memory: data frames of pandas and polars, datasets of Hugging Face, dicts and lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transfer.errors import DataError
from transfer.interfaces.columns import as_positional


class RowColumn(Sequence[Any]):
    """A column of a dataset that decodes its rows on access, such as an image column of Hugging Face's ``datasets``.

    Args:
        rows: Dataset with ``select_columns``; ``rows[i]`` is a dict.
        name: Name of the column.
    """

    def __init__(self, rows: Any, name: str) -> None:
        # Without the other columns, reading a label does not decode the image in the same row.
        self._rows = rows.select_columns([name])
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return self._rows[int(index)][self._name]

    def tolist(self) -> list[Any]:
        """Return all values."""
        return list(self._rows[:][self._name])

    def encoded(self, index: int) -> Any:
        """Return a value without decoding it: an image is a dict of the ``bytes`` and the ``path`` of its file."""
        value = self._rows.with_format("arrow")[index : index + 1][self._name].to_pylist()[0]
        return value if isinstance(value, Mapping) and {"bytes", "path"} <= set(value) else self[index]


def frame_columns(frame: Any) -> dict[str, Sequence[Any]]:
    """Return the columns of a table in memory, read by position.

    Args:
        frame: Data frame of pandas or polars, table of pyarrow, dataset of Hugging Face, dict of columns, or list of
            rows as dicts.

    Raises:
        DataError: The object is no table, or its columns differ in length.
    """
    if isinstance(frame, Mapping):
        columns = {str(name): column for name, column in frame.items()}
    elif isinstance(frame, Sequence) and frame and all(isinstance(row, Mapping) for row in frame):
        names = dict.fromkeys(name for row in frame for name in row)
        columns = {str(name): [row.get(name) for row in frame] for name in names}
    elif callable(getattr(frame, "select_columns", None)):
        columns = {name: RowColumn(frame, name) for name in frame.column_names}
    else:
        # pyarrow's `columns` are the columns themselves, and its names are `column_names`.
        labels = getattr(frame, "column_names", getattr(frame, "columns", None))
        if labels is None or isinstance(frame, type):
            raise DataError(
                f"this is no table: expected a data frame, a dict of columns or a list of dicts, got "
                f"{type(frame).__name__}"
            )
        columns = {str(name): frame[name] for name in labels}
    try:
        columns = {name: as_positional(column, f"column {name!r}") for name, column in columns.items()}
    except ValueError as error:
        raise DataError(str(error)) from error
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the columns of the table differ in length: {lengths}")
    return columns
