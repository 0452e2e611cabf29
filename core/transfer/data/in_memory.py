"""Data that a Python program passes to a run: data frames, columns, pairs, and datasets of torch."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from PIL import Image
from torch import Tensor

from transfer.data.frames import RowColumn, frame_columns
from transfer.data.records import Record
from transfer.data.tables import Tables, TableTarget
from transfer.errors import ConfigError, DataError, unknown_name
from transfer.interfaces import Data, Dataset, DataSpec, TargetKind
from transfer.interfaces.columns import Selection, as_positional, content_bytes

TEXT, IMAGE = "text", "image"
IN_MEMORY = "in_memory"
"""Name of the dataset in the config of a run."""


class ImageValues(Sequence[Any]):
    """A column of images that are converted to raw values on access. Picklable.

    Args:
        column: PIL images; uint8 arrays (H, W) or (H, W, C); tensors (C, H, W), uint8 or with values in [0, 1]; paths
            or bytes of files; or the images of a dataset of Hugging Face.
    """

    def __init__(self, column: Sequence[Any]) -> None:
        self._column = column
        self._keys: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        """Return one PIL image or uint8 array, or a list for a slice.

        Raises:
            ValueError, OSError: The value is no image.
        """
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        value = self._value(int(index))
        if isinstance(value, Tensor):
            return _array_of(value)
        content = _file_content(value)
        return value if content is None else Image.open(io.BytesIO(content))

    def _value(self, index: int) -> Any:
        """Return a value as it is stored; Hugging Face's images are not decoded."""
        return self._column.encoded(index) if isinstance(self._column, RowColumn) else self._column[index]

    def content_keys(self) -> list[bytes]:
        """Return the digest of each value: of the file, or of the pixels. They are computed once."""
        if self._keys is None:
            self._keys = []
            for index in range(len(self)):
                value = self._value(index)
                try:
                    content = _file_content(value)
                except OSError:  # the error names the example when the image is encoded
                    content = str(value).encode()
                content = content_bytes(value) if content is None else content
                self._keys.append(hashlib.sha256(content).digest())
        return self._keys

    def fingerprint(self) -> str:
        """Return a digest of the content of all images."""
        return hashlib.sha256(b"".join(self.content_keys())).hexdigest()


class PairValues(Sequence[Any]):
    """The values of a dataset of pairs (value, label), read on access.

    Args:
        pairs: Dataset whose items are pairs.
    """

    def __init__(self, pairs: Any) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return self._pairs[int(index)][0]


class InMemoryTable:
    """Labeled examples in memory, as data of runs; :func:`table` makes one.

    Args:
        splits: Table of each split that is given: ``train`` and possibly ``validation`` and ``test``.
        fields: Column of each field of an example (``{"text": "review"}``).
        label: Column of the label, or several columns.
        target: Content of the label columns: class, labels, label_list or number.
        group: Column of the group of each row.
        test_fraction: Fraction of ``train`` that becomes the test split; 0 cuts none.
        separator: Separator of the labels in a ``label_list``.
        label_names: Names of the labels if a ``label_list`` contains a zero or one for each label.
    """

    def __init__(
        self,
        splits: Mapping[str, Any],
        fields: Mapping[str, str],
        label: str | Sequence[str],
        *,
        target: TableTarget = "class",
        group: str | None = None,
        test_fraction: float = 0.0,
        separator: str = ",",
        label_names: Sequence[str] = (),
    ) -> None:
        labels = (label,) if isinstance(label, str) else tuple(label)
        example, *others = fields
        rules = Tables(
            train="train",
            test="test" if "test" in splits else None,
            example=example,
            column=fields[example],
            extra_fields={name: fields[name] for name in others},
            label=labels,
            target=target,
            group=group,
            test_fraction=test_fraction,
            separator=separator,
            label_names=tuple(label_names),
        )
        columns, class_names = {}, dict[str, Sequence[str]]()
        for name, given in splits.items():
            columns[name], names = _columns(given, fields, labels, name)
            class_names |= names if name == "train" else {}
            for column in filter(None, (*fields.values(), *labels, group)):
                if column not in columns[name]:
                    where, fix = f"the {name} table", f"set {', '.join(fields)} and label to names of columns"
                    raise DataError.of([unknown_name("column", column, columns[name], where=where, fix=fix)])
        plain = [name for name in (fields.get(TEXT), *labels, group) if name is not None]
        records = {name: _records(table, fields, plain) for name, table in columns.items()}
        self.data = _with_values(rules.read_records(example, records, class_names), fields, columns)
        # The class of the data is found by its digest: a config contains only JSON values.
        _tables[self.digest] = self

    @cached_property
    def digest(self) -> str:
        """Digest of the examples, the targets, the groups and the names of the classes."""
        spec = self.data.spec
        digest = hashlib.sha256(repr((spec.fields, spec.target, spec.classes)).encode())
        for name, split in self.data.splits.items():
            digest.update(f"{name} {len(split)} {split.targets.dtype} {split.fingerprint(*spec.fields)}".encode())
            digest.update(split.targets.tobytes() + (b"" if split.groups is None else split.groups.tobytes()))
        return digest.hexdigest()[:32]

    @property
    def block(self) -> dict[str, Any]:
        """The ``data`` block of a config that uses this table, as long as the object exists."""
        spec = self.data.spec
        return {"name": IN_MEMORY, "digest": self.digest, "fields": list(spec.fields), "target": spec.target}


_tables: WeakValueDictionary[str, InMemoryTable] = WeakValueDictionary()
"""Tables of this process by digest."""


class InMemory(Dataset):
    """Data that a Python program has passed to the run: ``transfer.run(config, data=transfer.table(...))``.

    The program writes this block. The data itself is not stored: ``transfer.resume`` and ``transfer.evaluate`` need the
    same ``data`` again.

    Args:
        digest: Digest of the data.
        fields: Names of the fields of an example (``text``, ``image``).
        target: Kind of the target: ``class``, ``labels`` or ``number``.
    """

    def __init__(self, *, digest: str, fields: tuple[str, ...], target: TargetKind = "class") -> None:
        self._digest = digest
        self._spec = DataSpec(fields, target)

    @property
    def spec(self) -> DataSpec:
        """Fields and target; the classes too if the data is in memory."""
        table = _tables.get(self._digest)
        return self._spec if table is None else table.data.spec

    def load(self) -> Data:
        """Return the data.

        Raises:
            transfer.DataError: This process has no such data.
        """
        if (table := _tables.get(self._digest)) is None:
            raise DataError(
                "the data of this run is not stored: a Python program has passed it to the run",
                fix="pass the same data again in Python: transfer.resume(RUN, data=transfer.table(...)), or "
                "transfer.evaluate(RUN, data=...); to score other data: transfer evaluate RUN --on DATA",
            )
        return table.data


def table(
    data: Any,
    *,
    text: str | None = None,
    image: str | None = None,
    label: str | Sequence[str] = "label",
    target: TableTarget = "class",
    validation: Any = None,
    test: Any = None,
    test_fraction: float = 0.0,
    group: str | None = None,
    separator: str = ",",
    label_names: Sequence[str] = (),
    **fields: str,
) -> InMemoryTable:
    """Return labeled examples in memory as the data of a run: ``transfer.run(config, data=transfer.table(...))``.

    The rules for labels, groups and splits are those of tables in files. Values are not copied: a column that reads
    its values on access (images of Hugging Face, a dataset of torch) is read when an example is needed. A dataset of
    torch must return the same value at each access: random augmentation belongs to the backbone.

    Args:
        data: Data frame of pandas or polars, table of pyarrow, dataset of Hugging Face, dict of columns, list of rows
            as dicts; or a list or ``torch.utils.data.Dataset`` of pairs (value, label), in which ``text`` or ``image``
            and ``label`` are the names of the two.
        text: Name of the column of the text. If no field is named, the column ``text`` or ``image``.
        image: Name of the column of the image: PIL images, uint8 arrays (H, W, C), tensors (C, H, W), paths or bytes
            of files.
        label: Name of the column of the label; several for ``labels`` and ``number``.
        target: ``class``: one class per example. ``labels``: each column contains 0 or 1. ``label_list``: one column
            lists all labels of an example. ``number``: each column contains a number.
        validation: Table of the validation split. None cuts the fraction ``data.validation`` of the config (0.1).
        test: Table of the test split. None uses ``test_fraction``.
        test_fraction: Fraction of ``data`` that becomes the test split; the same in every class.
        group: Name of a column of groups (a patient, an author). Rows of one group are always in the same split.
        separator: Separator of the labels of a ``label_list``. Lists are read as lists.
        label_names: Names of the labels if a ``label_list`` contains a zero or one for each label.
        **fields: Name of the column of each field of other plugins, by field.

    Raises:
        DataError: The data is no table, is empty, lacks a column, or contains a missing or wrong value or label.
        ConfigError: The options are inconsistent.
    """
    named = {name: column for name, column in ((TEXT, text), (IMAGE, image)) if column is not None} | fields
    named = named or {_default_field(data): ""}
    named = {name: column or name for name, column in named.items()}
    given = {"train": data, "validation": validation, "test": test}
    return InMemoryTable(
        {name: split for name, split in given.items() if split is not None},
        named,
        label,
        target=target,
        group=group,
        test_fraction=test_fraction,
        separator=separator,
        label_names=label_names,
    )


def require_table(data: object) -> InMemoryTable:
    """Return data that was passed to a run.

    Raises:
        ConfigError: It was not made by :func:`table`.
    """
    if isinstance(data, InMemoryTable):
        return data
    raise ConfigError(
        f"data is wrong: expected a transfer.table, got {type(data).__name__}",
        fix='name its columns: data=transfer.table(data, text="review", label="stars")',
    )


def _default_field(data: Any) -> str:
    """Return the field of a table without named columns: the column ``text`` or ``image``, or the type of a pair."""
    if _is_pairs(data):
        return TEXT if len(data) and isinstance(_pair(data, 0)[0], str) else IMAGE
    columns = frame_columns(data)
    if len(names := [name for name in (TEXT, IMAGE) if name in columns]) == 1:
        return names[0]
    raise DataError(
        "the column of the examples is not named", available=columns, fix='name it: text="review", for example'
    )


def _is_pairs(data: Any) -> bool:
    """Return whether data is a sequence or a dataset of torch with pairs, rather than a table with named columns."""
    if isinstance(data, Mapping | str | bytes | np.ndarray | Tensor) or hasattr(data, "select_columns"):
        return False
    if hasattr(data, "columns") or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return False
    return not (len(data) and isinstance(data, Sequence) and isinstance(data[0], Mapping))


def _pair(pairs: Any, index: int) -> Sequence[Any]:
    item = pairs[index]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item
    got = f"{len(item)} values" if isinstance(item, tuple | list) else type(item).__name__
    raise DataError(f"an item is wrong: expected a pair (value, label), got {got}", where=f"item {index}")


def _columns(
    given: Any, fields: Mapping[str, str], labels: Sequence[str], split: str
) -> tuple[dict[str, Sequence[Any]], dict[str, Sequence[str]]]:
    """Return the columns of a table or of pairs by name, and the names of classes that its metadata contains."""
    if not _is_pairs(given):
        try:
            columns = frame_columns(given)
        except DataError as error:
            raise DataError.of([replace(problem, where=f"the {split} table") for problem in error.problems]) from error
        features = getattr(given, "features", None) or {}
        classes = {name: getattr(features.get(name), "names", None) for name in labels}
        return columns, {name: names for name, names in classes.items() if names}
    if len(fields) > 1 or len(labels) > 1:
        raise ConfigError("pairs have one value and one label: expected one field and one label column")
    (field,), (label,) = fields.values(), labels
    # Datasets of torchvision have all labels in an attribute: reading a label does not decode its image.
    targets = getattr(given, "targets", None)
    if targets is None or len(targets) != len(given):
        targets = [_pair(given, index)[1] for index in range(len(given))]
    elif len(given):
        _pair(given, 0)
    class_names = getattr(given, "classes", None)
    names = {label: class_names} if class_names else {}
    values = [value for value, _ in given] if isinstance(given, list | tuple) else PairValues(given)
    return {field: values, label: as_positional(targets, "the labels")}, names


def _records(columns: Mapping[str, Sequence[Any]], fields: Mapping[str, str], plain: Sequence[str]) -> Iterator[Record]:
    """Yield the rows with plain values. An example that is no text is its index, or None if it is missing."""
    values: dict[str, Sequence[Any]] = {name: _plain(columns[name]) for name in plain}
    for field, name in fields.items():
        if field != TEXT:
            column: Any = columns[name]
            listed = isinstance(column, list | tuple) or (isinstance(column, np.ndarray) and column.dtype.hasobject)
            values[name] = [
                None if listed and _is_missing(column[index]) else str(index) for index in range(len(column))
            ]
    for row in zip(*values.values(), strict=True):
        yield dict(zip(values, row, strict=True))


def _plain(column: Any) -> Sequence[Any]:
    """Return a column of texts, labels or groups as plain Python values."""
    values = column.tolist() if hasattr(column, "tolist") else list(column)
    return [_plain_value(value) for value in values]


def _plain_value(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        return value.item()
    if isinstance(value, np.ndarray | Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple | set | frozenset) else value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # NaN, by which pandas marks missing values


def _with_values(data: Data, fields: Mapping[str, str], tables: Mapping[str, Mapping[str, Sequence[Any]]]) -> Data:
    """Replace the indices of the examples that are no texts by their values."""
    objects = {field: name for field, name in fields.items() if field != TEXT}
    values = {
        split: {field: ImageValues(table[name]) if field == IMAGE else table[name] for field, name in objects.items()}
        for split, table in tables.items()
    }
    splits = {}
    for name, split in data.splits.items():
        source = name if name in tables else "train"  # a test split that was cut off
        columns = dict(split.fields)
        names = split.names
        for field, column in values[source].items():
            indices = np.array([int(index) for index in split.fields[field]], dtype=np.int64)
            columns[field] = Selection(column, indices)
            paths = tables[source][objects[field]]
            if field == IMAGE and all(isinstance(paths[int(index)], str | os.PathLike) for index in indices[:1]):
                names = [str(paths[int(index)]) for index in indices]
        splits[name] = replace(split, fields=columns, names=names)
    return Data(data.spec, splits)


def _file_content(value: Any) -> bytes | None:
    """Return the bytes of an image file: a path, bytes, or Hugging Face's ``{"bytes": ..., "path": ...}``.

    Raises:
        OSError: The file cannot be read.
    """
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str | os.PathLike):
        path = Path(value).expanduser()
        if not path.is_file():  # a device or pipe may never end
            raise FileNotFoundError(f"there is no such file: {path}")
        return path.read_bytes()
    return value if isinstance(value, bytes) else None


def _array_of(image: Tensor) -> Any:
    """Return a tensor (C, H, W) as an array of uint8 (H, W, C)."""
    pixels = image.detach().cpu()
    if pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError("expected a tensor of uint8, or of floats from 0 to 1: do not normalize the images")
        pixels = (pixels * 255).round().byte()
    return (pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels).numpy()
