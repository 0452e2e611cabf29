"""Texts from the ``datasets`` library: a name on the Hugging Face Hub, or Arrow, Parquet, CSV and JSON files."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from transfer import ConfigError, Data, DataError, Dataset, DataSpec, Split, encode_labels, find_file, multi_hot
from transfer_text.interfaces import PAIR_SEPARATOR

INSTALL = "pip install 'transferkit[huggingface]'"
FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
}


class HuggingFace(Dataset):
    """Texts and labels read by the ``datasets`` library; install it with ``pip install 'transferkit[huggingface]'``.

    Args:
        dataset: Name on the Hub (``stanfordnlp/imdb``), or path of a folder that ``save_to_disk`` wrote or that
            contains data files. null: ``train``, ``val`` and ``test`` are paths of files.
        subset: Configuration of a dataset that has several.
        revision: Commit, tag or branch of a dataset on the Hub; fixes the version of the data.
        train: Training split, or the path of its file (``.parquet``, ``.arrow``, ``.csv``, ``.tsv``, ``.json``,
            ``.jsonl``).
        val: Validation split, or the path of its file. null uses ``validation`` if it exists. If there is no test
            split, this split is the test split, and validation is split off from train.
        test: Test split, or the path of its file. null uses ``test`` if it exists.
        text: Name of the column of the text. The texts of several columns, ``[premise, hypothesis]``, are joined by
            ``[SEP]``.
        label: Name of the column of the label; several names for ``labels`` and ``number``.
        target: ``class``: one class per text. ``labels``: each column contains 0 or 1. ``label_list``: one column
            lists all labels of a text. ``number``: each column contains a number.
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
        target: Literal["class", "labels", "label_list", "number"] = "class",
    ) -> None:
        labels = (label,) if isinstance(label, str) else label
        texts = (text,) if isinstance(text, str) else text
        if not labels or not texts or len({*texts, *labels}) != len(labels) + len(texts):
            raise ConfigError(
                f"text {', '.join(map(repr, texts)) or '()'} and label {', '.join(map(repr, labels)) or '()'} "
                "do not name different columns",
                fix="name one column for the text and at least one other column for the label",
            )
        if target in ("class", "label_list") and len(labels) > 1:
            raise ConfigError(
                f"target {target!r} uses one column, but label names {len(labels)}: {', '.join(labels)}",
                fix="name one column, or set target: labels (zeros and ones) or target: number",
            )
        self.splits = {"train": train, "validation": val, "test": test}
        if dataset is None:
            for written in filter(None, self.splits.values()):
                if Path(written).suffix.lower() not in FORMATS:
                    raise ConfigError(
                        f"{written!r} is not the path of a supported file",
                        available=tuple(FORMATS),
                        fix="set dataset to a name on the Hub, or train to the path of a file",
                    )
        self.dataset = dataset
        self.subset = subset
        self.revision = revision
        self.texts = texts
        self.labels = labels
        self.target = target

    @property
    def spec(self) -> DataSpec:
        """Field ``text`` and its target; class names are read from the data."""
        if self.target == "class":
            return DataSpec(("text",), "class")
        if self.target == "label_list":
            return DataSpec(("text",), "labels")
        return DataSpec(("text",), self.target, self.labels)

    def load(self) -> Data:
        """Read the splits, or download them into the cache folder of the library.

        Raises:
            transfer.DataError: The library is not installed or cannot read the data, or a split, column or value is
                invalid.
        """
        try:
            library = importlib.import_module("datasets")
        except ImportError as error:
            raise DataError("the library `datasets` is not installed", fix=INSTALL) from error
        tables = self._read_files(library) if self.dataset is None else self._choose(self._read(library, self.dataset))
        for name, rows in tables.items():
            self._check(name, rows)
        classes = self._classes(tables["train"])
        splits = {}
        for name, rows in tables.items():
            columns = {column: list(rows[column]) for column in self.texts}
            for column, values in columns.items():
                for index, text in enumerate(values):
                    if not isinstance(text, str) or not text.strip():
                        raise DataError(
                            f"column {column!r} contains {text!r}: expected a text", where=f"{name}[{index}]"
                        )
            texts = [PAIR_SEPARATOR.join(parts) for parts in zip(*columns.values(), strict=True)]
            targets = self._targets(rows, classes, lambda index, name=name: f"{name}[{index}]")  # type: ignore[misc]
            splits[name] = Split({"text": texts}, targets, _Names(name, len(texts)))
        spec = self.spec
        return Data(DataSpec(spec.fields, spec.target, classes), splits)

    def _read_files(self, library: Any) -> dict[str, Any]:
        tables = {}
        for name, written in self.splits.items():
            if written is None:
                continue
            path = Path(written).expanduser()
            path = path if path.is_file() else find_file(written) or path
            if not path.is_file():
                raise DataError("the file does not exist", where=str(path), fix=f"set the path of the {name} file")
            options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
            files = {name: str(path)}
            tables[name] = _load(library, FORMATS[path.suffix.lower()], data_files=files, split=name, **options)
        return tables

    def _read(self, library: Any, dataset: str) -> Mapping[str, Any]:
        folder = Path(dataset).expanduser()
        folder = folder if folder.is_dir() else find_file(dataset) or folder
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
        """Return the splits that the options name, and those with the default names."""
        tables = {}
        for name, asked in self.splits.items():
            wanted = asked if asked is not None else name
            if wanted in available:
                tables[name] = available[wanted]
            elif asked is not None:
                raise DataError(
                    f"unknown split {asked!r}",
                    where=self.dataset,
                    available=list(available),
                    fix="use one of the available splits",
                )
        return tables

    def _check(self, name: str, rows: Any) -> None:
        for column in (*self.texts, *self.labels):
            if column not in rows.column_names:
                raise DataError(
                    f"unknown column {column!r}",
                    where=name,
                    available=rows.column_names,
                    fix="set text and label to names of columns",
                )

    def _classes(self, rows: Any) -> tuple[str, ...]:
        if self.target in ("labels", "number"):
            return self.labels
        (column,) = self.labels
        feature = rows.features[column]
        if (names := getattr(getattr(feature, "feature", feature), "names", None)) is not None:
            return tuple(names)
        values = list(rows[column])
        if self.target == "label_list":
            values = [item for value in values for item in value or ()]
        classes = tuple(sorted({_written(value) for value in values}))
        if len(classes) < (2 if self.target == "class" else 1):
            raise DataError(
                f"column {column!r} contains {'one class' if classes else 'no label'}: expected two or more classes",
                where="train",
                available=classes,
                fix="choose another label column, or add examples of other classes",
            )
        return classes

    def _targets(self, rows: Any, classes: Sequence[str], where: Callable[[int], str]) -> npt.NDArray[Any]:
        if self.target in ("class", "label_list"):
            (column,) = self.labels
            feature = rows.features[column]
            names = getattr(getattr(feature, "feature", feature), "names", None)
            values = list(rows[column])
            if self.target == "class":
                return encode_labels([_label(value, names) for value in values], classes, where)
            return multi_hot([[_label(item, names) for item in value or ()] for value in values], classes, where)
        targets = np.empty((len(rows), len(self.labels)), dtype=np.float32)
        for position, column in enumerate(self.labels):
            try:
                targets[:, position] = np.array(list(rows[column]), dtype=np.float32)
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"column {column!r} contains a value that is not a number: {error}", where=where(0)
                ) from error
            bad = ~np.isfinite(targets[:, position])
            if self.target == "labels":
                bad = ~np.isin(targets[:, position], (0, 1))
            if bad.any():
                index = int(np.flatnonzero(bad)[0])
                expected = "0 or 1" if self.target == "labels" else "a finite number"
                raise DataError(
                    f"column {column!r} contains {rows[column][index]!r}: expected {expected}", where=where(index)
                )
        return targets


class _Names(Sequence[str]):
    """The names ``train[0]``, ``train[1]`` and so on, computed on access."""

    def __init__(self, split: str, count: int) -> None:
        self._split = split
        self._indices = range(count)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in self._indices[index]]
        return f"{self._split}[{self._indices[index]}]"


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


def _label(value: object, names: Sequence[str] | None) -> str:
    """Return the name of a label; a value without a name, such as -1 for unlabeled texts, as text."""
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else str(value)
    return _written(value)


def _written(value: object) -> str:
    return value.strip() if isinstance(value, str) else str(value)
