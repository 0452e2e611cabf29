"""Texts from the ``datasets`` library: a name on the Hugging Face Hub, or Arrow, Parquet, CSV and JSON files."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transfer import ConfigError, Data, DataError, Dataset, DataSpec, Quoting, Tables, TableTarget, find_file
from transfer_text.data.empty_texts import BadTexts, is_empty
from transfer_text.data.tables import join_texts

logger = logging.getLogger(__name__)

INSTALL = "pip install 'transferkit[huggingface]'"
FORMATS = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl")
UNLABELED = (-1, None)
BATCH_ROWS = 1000
"""Number of rows that are converted to Python objects together."""


class HuggingFace(Dataset):
    r"""Texts and labels of a dataset on the Hugging Face Hub, or of files.

    A dataset is read by the library ``datasets``, and files are read like those of ``text_csv``. The command
    ``pip install 'transferkit[huggingface]'`` installs the library.

    Args:
        dataset: Name on the Hub (``stanfordnlp/imdb``), or path of a folder that ``save_to_disk`` wrote or that
            contains data files. null: ``train``, ``val`` and ``test`` are paths of files.
        subset: Configuration of a dataset that has several.
        revision: Commit, tag or branch of a dataset on the Hub; fixes the version of the data.
        train: Training split, or the path of its file (``.parquet``, ``.arrow``, ``.csv``, ``.tsv``, ``.json``,
            ``.jsonl``).
        val: Validation split, or the path of its file. null uses ``validation`` if it exists and is not named by
            another option. If there is no test split, this split is the test split, and validation is split off from
            train.
        test: Test split, or the path of its file. null uses ``test`` if it exists and has labels.
        text: Name of the column of the text. The texts of several columns, ``[premise, hypothesis]``, are joined by
            ``[SEP]``.
        label: Name of the column of the label; several names for ``labels`` and ``number``.
        target: ``class``: one class per text. ``labels``: each column contains 0 or 1. ``label_list``: one column
            lists all labels of a text. ``number``: each column contains a number.
        quoting: Meaning of quotes in .csv and .tsv files. ``csv``: a field in quotes may contain delimiters, line ends
            and doubled quotes. ``backslash``: the same with ``\"`` for a quote. ``none``: quotes are part of the text.
            null chooses one by the content.
        label_names: Names of the labels if a ``label_list`` contains a zero or one for each label (``[0, 1, 0]``).
        bad_texts: Action for texts that have no class, or are empty after cleaning (whitespace, markup): ``error``
            refuses the data; ``skip`` leaves them out and logs their rows.
    """

    def __init__(
        self,
        *,
        dataset: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        text: str | tuple[str, ...] = "text",
        label: str | tuple[str, ...] = "label",
        target: TableTarget = "class",
        quoting: Quoting | None = None,
        label_names: tuple[str, ...] = (),
        bad_texts: BadTexts = "error",
    ) -> None:
        self.splits = {"train": train, "validation": val, "test": test}
        if dataset is None:
            for written in filter(None, self.splits.values()):
                if Path(written).suffix.lower() not in FORMATS:
                    raise ConfigError(
                        f"{written!r} is not the path of a supported file",
                        available=FORMATS,
                        fix="set dataset to a name on the Hub, or train to the path of a file",
                    )
        self.dataset = dataset
        self.subset = subset
        self.revision = revision
        texts = (text,) if isinstance(text, str) else text
        if not texts:
            raise ConfigError("text names no column", fix="name the column of the text, or several in a list")
        self.columns = (*texts, *((label,) if isinstance(label, str) else label))
        self._tables = Tables(
            train=train,
            val=val,
            test=test,
            example="text",
            column=texts[0],
            extra_fields={column: column for column in texts[1:]},
            label=label,
            target=target,
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
        """Read the splits, or download them into the cache folder of the library.

        Raises:
            transfer.DataError: The library is not installed or cannot read the data, or a split, column or value is
                invalid.
        """
        if self.dataset is None:
            return join_texts(self._tables.read("text"))
        try:
            library = importlib.import_module("datasets")
        except ImportError as error:
            raise DataError("the library `datasets` is not installed", fix=INSTALL) from error
        splits = self._choose(self._read(library, self.dataset))
        for name, rows in splits.items():
            for column in self.columns:
                if column not in rows.column_names:
                    raise DataError(
                        f"unknown column {column!r}",
                        where=name,
                        available=rows.column_names,
                        fix="set text and label to names of columns",
                    )
        names = {column: _class_names(feature) for column, feature in splits["train"].features.items()}
        class_names = {column: classes for column, classes in names.items() if classes}
        records = {name: _rows(rows, self.columns) for name, rows in splits.items()}
        return join_texts(self._tables.read_records("text", records, class_names))

    def _read(self, library: Any, dataset: str) -> Mapping[str, Any]:
        folder = Path(dataset).expanduser()
        folder = folder if folder.is_dir() else find_file(dataset) or folder
        # Files of save_to_disk, which load_dataset does not read.
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            try:
                loaded = library.load_from_disk(str(folder))
            except Exception as error:  # the library raises many types of exceptions
                raise DataError(f"the dataset cannot be read: {error}", where=str(folder)) from error
            return loaded if isinstance(loaded, Mapping) else {"train": loaded}
        name = str(folder) if folder.is_dir() else dataset
        splits: Mapping[str, Any] = _load(library, name, self.subset, revision=self.revision)
        return splits

    def _choose(self, available: Mapping[str, Any]) -> dict[str, Any]:
        """Return the splits that the options name, and those with the default names that contain labels."""
        tables = {}
        asked_names = set(filter(None, self.splits.values()))
        for name, asked in self.splits.items():
            wanted = asked if asked is not None else name
            if asked is None and wanted in asked_names:
                continue  # with `test: validation`, the validation split is not also used for validation
            if wanted in available and not self._is_unlabeled(available[wanted], wanted, by_default=asked is None):
                tables[name] = available[wanted]
            elif wanted not in available and asked is not None:
                raise DataError(
                    f"unknown split {asked!r}",
                    where=self.dataset,
                    available=list(available),
                    fix="use one of the available splits",
                )
        return tables

    def _is_unlabeled(self, rows: Any, name: str, *, by_default: bool) -> bool:
        """Return whether a split that no option names has no label; refuse such a split if an option names it.

        Benchmarks such as GLUE publish test splits whose labels are -1 or null.
        """
        columns = [column for column in self._tables.labels if column in rows.column_names]
        if not columns or not len(rows):
            return False
        # The first label ends the search.
        if any(value not in UNLABELED for row in _rows(rows, columns) for value in row.values()):
            return False
        if by_default:
            logger.warning("%s: the split %r is not used: all its labels are -1 or null", self.dataset, name)
            return True
        raise DataError(
            f"the split {name!r} has no labels: all are -1 or null",
            where=self.dataset,
            fix="use a split with labels, such as test: validation, or remove the option",
        )


def _class_names(feature: Any) -> tuple[str, ...]:
    """Return the class names of a column of class indices, or of lists of them; empty for other columns."""
    return tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())


def _rows(rows: Any, columns: Sequence[str]) -> Iterator[Mapping[str, object]]:
    """Yield the rows of a dataset of the library with some of its columns."""
    # Other columns may contain images, which would be decoded. Batches are faster than rows one by one.
    for batch in rows.select_columns(list(columns)).iter(batch_size=BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _load(library: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return library.load_dataset(*arguments, **options)
    except Exception as error:  # the library raises its own exceptions and those of its network and file layers
        named = next(iter(options.get("data_files", {}).values()), arguments[0])
        raise DataError(
            f"the dataset cannot be read: {type(error).__name__}: {error}",
            where=str(named),
            fix="check the name on the Hub, the subset and the connection, or use the path of a file or folder",
        ) from error
