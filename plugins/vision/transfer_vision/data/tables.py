"""Pictures that a table of your own lists, alone or each beside a text, with their labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from transfer import ConfigError, Data, DataError, Dataset, DataSpec, Split, Tables, TableTarget, find_file
from transfer_vision.images.image_sources import Pictures, Source, open_source
from transfer_vision.images.validation import BadFiles, good_pictures


class _Listed(Dataset):
    """Pictures whose paths stand in tables.

    Args:
        tables: With the path of a picture as the example.
        root: As :class:`ImageCSV` has it.
        bad_files: As :class:`ImageCSV` has it.
    """

    def __init__(self, tables: Tables, root: str | None, bad_files: BadFiles) -> None:
        if root == "":
            raise ConfigError("root is empty", fix="name a folder, or leave root out")
        self._tables = tables
        self._root = root
        self._bad_files: BadFiles = bad_files

    @property
    def spec(self) -> DataSpec:
        """What an example consists of, and its target; the names of classes are in the data."""
        return self._tables.spec("image")

    def load(self) -> Data:
        """Read the tables, and decode the pictures that are new to see whether they are good.

        Raises:
            transfer.DataError: A table is missing or not what it should be, or a picture is missing or bad.
        """
        data = self._tables.read("image")
        source = self._source()
        everything = [path for split in data.splits.values() for path in split.fields["image"]]
        good = good_pictures(source, list(dict.fromkeys(everything)), self._bad_files)
        return Data(data.spec, {name: _pictures(split, source, good, name) for name, split in data.splits.items()})

    def _source(self) -> Source:
        if self._root is None:
            return open_source(self._tables.find(self._tables.paths["train"]).parent)
        root = Path(self._root).expanduser()
        return open_source(root if root.exists() else find_file(self._root) or root)


class ImageCSV(_Listed):
    """Pictures and labels from a table of your own: CSV, TSV, or JSON Lines (``.jsonl``), plain or ``.gz``.

    Args:
        train: The table to train on, by its path (or its name in the data folder).
        val: The table that picks the best epoch; null: it is cut from ``train``. Without a test table it is the test
            split, and validation is cut from ``train``.
        test: The table to test on.
        root: The folder or zip archive in which the paths begin; null: the folder of the training table.
        path: Column of the picture's path.
        label: Column of the label; for ``labels`` and ``number``, one column each.
        target: ``class``: each picture is of one class. ``labels``: each column says 0 or 1. ``label_list``: one column
            names all labels of a picture. ``number``: each column is a number.
        separator: What separates the labels of a ``label_list``; JSON Lines may hold lists instead.
        delimiter: What separates the columns; null: a tab in a .tsv file, a comma elsewhere.
        encoding: Character encoding of the tables.
        split: Column that says of each row of ``train`` which split it is of: train, val or test.
        group: Column of what must not be torn apart (a patient, a camera): no group is in two splits.
        test_fraction: The part of ``train`` that becomes the test split where there is none; alike in every class.
        bad_files: What to do about pictures that cannot be decoded: ``error``, or ``skip`` them with a table in the
            log.
    """

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        root: str | None = None,
        path: str = "path",
        label: str | tuple[str, ...] = "label",
        target: TableTarget = "class",
        separator: str = ",",
        delimiter: str | None = None,
        encoding: str = "utf-8-sig",
        split: str | None = None,
        group: str | None = None,
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        bad_files: BadFiles = "error",
    ) -> None:
        tables = Tables(
            train=train,
            val=val,
            test=test,
            example="path",
            column=path,
            label=label,
            target=target,
            separator=separator,
            delimiter=delimiter,
            encoding=encoding,
            split=split,
            group=group,
            test_fraction=test_fraction,
        )
        super().__init__(tables, root, bad_files)


class MultimodalCSV(_Listed):
    """Pictures, a text beside each, and labels from a table of your own: CSV, TSV, or JSON Lines, plain or ``.gz``.

    Args:
        train: The table to train on, by its path (or its name in the data folder).
        val: The table that picks the best epoch; null: it is cut from ``train``. Without a test table it is the test
            split, and validation is cut from ``train``.
        test: The table to test on.
        root: The folder or zip archive in which the paths begin; null: the folder of the training table.
        image: Column of the picture's path.
        text: Column of the text.
        label: Column of the label; for ``labels`` and ``number``, one column each.
        target: ``class``: each example is of one class. ``labels``: each column says 0 or 1. ``label_list``: one column
            names all labels of an example. ``number``: each column is a number.
        separator: What separates the labels of a ``label_list``; JSON Lines may hold lists instead.
        delimiter: What separates the columns; null: a tab in a .tsv file, a comma elsewhere.
        encoding: Character encoding of the tables.
        split: Column that says of each row of ``train`` which split it is of: train, val or test.
        group: Column of what must not be torn apart (a patient, a product): no group is in two splits.
        test_fraction: The part of ``train`` that becomes the test split where there is none; alike in every class.
        bad_files: What to do about pictures that cannot be decoded: ``error``, or ``skip`` them with a table in the
            log.
    """

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        root: str | None = None,
        image: str = "image",
        text: str = "text",
        label: str | tuple[str, ...] = "label",
        target: TableTarget = "class",
        separator: str = ",",
        delimiter: str | None = None,
        encoding: str = "utf-8-sig",
        split: str | None = None,
        group: str | None = None,
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        bad_files: BadFiles = "error",
    ) -> None:
        tables = Tables(
            train=train,
            val=val,
            test=test,
            example="image",
            column=image,
            label=label,
            target=target,
            separator=separator,
            delimiter=delimiter,
            encoding=encoding,
            split=split,
            group=group,
            test_fraction=test_fraction,
            extra_fields={"text": text},
        )
        super().__init__(tables, root, bad_files)


def _pictures(split: Split, source: Source, good: set[str], name: str) -> Split:
    paths = split.fields["image"]
    left = np.flatnonzero([path in good for path in paths])
    if not len(left):
        raise DataError(f"the {name} split has no good picture", where=source.name(""), fix="mend some")
    kept = split.select(left)
    pictures = Pictures(source, list(kept.fields["image"]))
    return replace(kept, fields={**kept.fields, "image": pictures})
