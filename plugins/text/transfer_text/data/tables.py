"""Texts and labels from tables of your own."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from transfer import Data, Dataset, DataSpec, Tables, TableTarget


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
        split: Column that says of each row of ``train`` which split it is of: train, val or test.
        group: Column of what must not be torn apart (an author, a film): no group is in two splits.
        test_fraction: The part of ``train`` that becomes the test split where there is none; alike in every class.
    """

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        text: str = "text",
        label: str | tuple[str, ...] = "label",
        target: TableTarget = "class",
        separator: str = ",",
        delimiter: str | None = None,
        encoding: str = "utf-8-sig",
        split: str | None = None,
        group: str | None = None,
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        self._tables = Tables(
            train=train,
            val=val,
            test=test,
            example="text",
            column=text,
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
        """A text and its target; the names of classes are in the data."""
        return self._tables.spec("text")

    def load(self) -> Data:
        """Read the tables; classes are in alphabetical order.

        Raises:
            transfer.DataError: A table is missing or not what it should be; the message names file and line.
        """
        return self._tables.read("text")
