"""Texts and labels from tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from transfer import ConfigError, Data, Dataset, DataSpec, Quoting, Tables, TableTarget
from transfer_text.data.empty_texts import BadTexts, is_empty
from transfer_text.interfaces import PAIR_SEPARATOR


class TextCSV(Dataset):
    r"""Texts and labels from a table: CSV, TSV, JSON, JSON Lines or Parquet, plain or compressed (gz, bz2, xz, zip).

    Args:
        train: Path of the training table, or its name in the data folder.
        val: Path of the validation table. null splits validation off from ``train``. If there is no test table, this
            table is the test split, and validation is split off from ``train``.
        test: Path of the test table.
        text: Name of the column of the text, or its number if there is no header. The texts of several columns,
            ``[premise, hypothesis]``, are joined by ``[SEP]``.
        label: Name or number of the column of the label; several for ``labels`` and ``number``.
        target: ``class``: one class per text. ``labels``: each column contains 0 or 1. ``label_list``: one column
            lists all labels of a text. ``number``: each column contains a number.
        separator: Separator of the labels of a ``label_list``. Lists in JSON or Python notation are read as lists.
        delimiter: Separator of the columns. null chooses the one that gives the named columns.
        encoding: Character encoding of the files.
        split: Name of a column with the split of each row of ``train``: train, val or test.
        group: Name of a column of groups (an author, a film). Rows of one group are always in the same split.
        test_fraction: Fraction of ``train`` that becomes the test split if there is none; the same in every class.
        header: Whether the first row of a delimited file contains the names of the columns. false numbers the columns
            from 0 (``text: 1``); a list names the columns of a file without header.
        quoting: Meaning of quotes in a delimited file. ``csv``: a field in quotes may contain delimiters, line ends
            and doubled quotes. ``backslash``: the same with ``\"`` for a quote. ``none``: quotes are part of the text.
            null chooses one by the content.
        label_names: Names of the labels if a ``label_list`` contains a zero or one for each label (``[0, 1, 0]``).
        bad_texts: Action for texts that have no class, or are empty after cleaning (whitespace, markup): ``error``
            refuses the data; ``skip`` leaves them out and logs their lines.
    """

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        text: str | int | tuple[str | int, ...] = "text",
        label: str | int | tuple[str | int, ...] = "label",
        target: TableTarget = "class",
        separator: str = ",",
        delimiter: str | None = None,
        encoding: str = "utf-8-sig",
        split: str | int | None = None,
        group: str | int | None = None,
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        header: bool | tuple[str, ...] = True,
        quoting: Quoting | None = None,
        label_names: tuple[str, ...] = (),
        bad_texts: BadTexts = "error",
    ) -> None:
        # The first column is the text; the others are further fields, which join_texts appends.
        columns = text if isinstance(text, tuple) else (text,)
        if not columns:
            raise ConfigError("text names no column", fix="name the column of the text, or several in a list")
        self._tables = Tables(
            train=train,
            val=val,
            test=test,
            example="text",
            column=columns[0],
            extra_fields={str(column): str(column) for column in columns[1:]},
            label=label,
            target=target,
            separator=separator,
            delimiter=delimiter,
            encoding=encoding,
            split=split,
            group=group,
            test_fraction=test_fraction,
            header=header,
            quoting=quoting,
            label_names=label_names,
            bad_examples=bad_texts,
            is_empty=is_empty,
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
        return join_texts(self._tables.read("text"))


def join_texts(data: Data) -> Data:
    """Return data with the field ``text`` only: texts of several fields are joined by ``[SEP]``."""
    if len(data.spec.fields) == 1:
        return data
    splits = {
        name: replace(split, fields={"text": [PAIR_SEPARATOR.join(texts) for texts in split.column(*data.spec.fields)]})
        for name, split in data.splits.items()
    }
    return Data(replace(data.spec, fields=("text",)), splits)
