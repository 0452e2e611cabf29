"""Texts and labels from tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from transfer import ConfigError, Data, Dataset, DataSpec, Tables, TableTarget
from transfer_text.interfaces import PAIR_SEPARATOR


class TextCSV(Dataset):
    """Texts and labels from a table: CSV, TSV or JSON Lines (``.jsonl``), plain or ``.gz``.

    Args:
        train: Path of the training table, or its name in the data folder.
        val: Path of the validation table. null splits validation off from ``train``. If there is no test table, this
            table is the test split, and validation is split off from ``train``.
        test: Path of the test table.
        text: Name of the column of the text. The texts of several columns, ``[premise, hypothesis]``, are joined by
            ``[SEP]``.
        label: Name of the column of the label; several names for ``labels`` and ``number``.
        target: ``class``: one class per text. ``labels``: each column contains 0 or 1. ``label_list``: one column
            lists all labels of a text. ``number``: each column contains a number.
        separator: Separator of the labels of a ``label_list``; JSON Lines may contain lists instead.
        delimiter: Separator of the columns. null means a tab in a .tsv file and a comma otherwise.
        encoding: Character encoding of the files.
        split: Name of a column with the split of each row of ``train``: train, val or test.
        group: Name of a column of groups (an author, a film). Rows of one group are always in the same split.
        test_fraction: Fraction of ``train`` that becomes the test split if there is none; the same in every class.
    """

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        text: str | tuple[str, ...] = "text",
        label: str | tuple[str, ...] = "label",
        target: TableTarget = "class",
        separator: str = ",",
        delimiter: str | None = None,
        encoding: str = "utf-8-sig",
        split: str | None = None,
        group: str | None = None,
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        columns = (text,) if isinstance(text, str) else text
        if not columns:
            raise ConfigError("text names no column", fix="name the column of the text, or several in a list")
        self._tables = Tables(
            train=train,
            val=val,
            test=test,
            example="text",
            column=columns[0],
            extra_fields={column: column for column in columns[1:]},
            label=label,
            target=target,
            separator=separator,
            delimiter=delimiter,
            encoding=encoding,
            split=split,
            group=group,
            test_fraction=test_fraction,
        )

    @property
    def spec(self) -> DataSpec:
        """Field ``text`` and its target; class names are read from the data."""
        return replace(self._tables.spec("text"), fields=("text",))

    def load(self) -> Data:
        """Read the tables; classes are in alphabetical order.

        Raises:
            transfer.DataError: A table is missing or invalid; the message states file and line.
        """
        data = self._tables.read("text")
        if len(data.spec.fields) == 1:
            return data
        splits = {
            name: replace(
                split, fields={"text": [PAIR_SEPARATOR.join(texts) for texts in split.column(*data.spec.fields)]}
            )
            for name, split in data.splits.items()
        }
        return Data(replace(data.spec, fields=("text",)), splits)
