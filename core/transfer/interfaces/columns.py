"""Columns of examples, read by position, with digests of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence, Set as AbstractSet
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor


def as_positional(column: Any, what: str) -> Sequence[Any]:
    """Return a column whose item ``i`` is its value at position ``i``.

    ``series[i]`` of a pandas Series looks up the label ``i``, which after shuffling or filtering is another row. Types
    whose index is known to be a position are returned unchanged, without reading a value.

    Args:
        column: A sequence, an array, or an object with ``to_numpy()`` or ``tolist()``.
        what: Name of the column for the error (``field 'text'``).

    Raises:
        ValueError: The column cannot be read by position (a dict, a set, a generator).
    """
    if isinstance(column, Sequence | np.ndarray | Tensor):
        return column  # type: ignore[return-value]  # arrays and tensors are read like sequences
    if callable(convert := getattr(column, "to_numpy", None)):  # pandas, polars, pyarrow, xarray
        return convert()  # type: ignore[no-any-return]
    # Array libraries (h5py, jax) index by position, and converting may read a file that does not fit into memory.
    if not hasattr(column, "__array__") and callable(convert := getattr(column, "tolist", None)):
        return convert()  # type: ignore[no-any-return]
    readable = hasattr(column, "__getitem__") and hasattr(column, "__len__")
    if not readable or isinstance(column, Mapping | AbstractSet):
        raise ValueError(f"{what} is of the wrong type: expected a sequence, got {type(column).__name__}")
    return column  # type: ignore[no-any-return]


class Selection(Sequence[Any]):
    """Some items of a sequence, selected without reading them.

    Args:
        column: Sequence to select from.
        indices: Positions of the selected items, in order.
    """

    def __init__(self, column: Sequence[Any], indices: npt.NDArray[np.int64]) -> None:
        # Nested selections are flattened: an item is one lookup away, however often a split was cut.
        if isinstance(column, Selection):
            indices = column._indices[indices]
            column = column._column
        self._column: Sequence[Any] = column
        self._indices: npt.NDArray[np.int64] = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._column[int(i)] for i in self._indices[index]]
        return self._column[int(self._indices[index])]


class Columns(Sequence[Any]):
    """Several columns as one sequence of tuples, zipped without reading them.

    Args:
        columns: Columns of equal length.
    """

    def __init__(self, columns: Sequence[Sequence[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: Any) -> Any:
        values = tuple(column[index] for column in self.columns)
        return list(zip(*values, strict=True)) if isinstance(index, slice) else values

    def fingerprint(self) -> str:
        """Return a digest of the values of all columns."""
        return " ".join(map(fingerprint, self.columns))


def fingerprint(column: Sequence[Any]) -> str:
    """Return a digest of the values of a column, or the column's own ``fingerprint()`` if it has one."""
    digest = hashlib.sha256()
    # A selection is identified by its complete column and the indices: no selected value is read.
    if isinstance(column, Selection):
        digest.update(fingerprint(column._column).encode() + np.ascontiguousarray(column._indices).tobytes())
    elif callable(own_fingerprint := getattr(column, "fingerprint", None)):
        return str(own_fingerprint())
    else:
        for value in column:
            content = content_bytes(value)
            # The length separates the values: otherwise ("ab", "c") and ("a", "bc") would have one digest.
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def content_keys(column: Sequence[Any]) -> Sequence[Hashable] | None:
    """Return a key of each value that is equal for equal values, or None if that would mean to read or draw them.

    Texts are compared without surrounding whitespace. A column may define a method ``content_keys()``.
    """
    if isinstance(column, Selection):
        keys = content_keys(column._column)
        return None if keys is None else [keys[index] for index in column._indices.tolist()]
    if isinstance(column, Columns):
        columns = [content_keys(part) for part in column.columns]
        present = [keys for keys in columns if keys is not None]
        return list(zip(*present, strict=True)) if len(present) == len(columns) else None
    if callable(own_keys := getattr(column, "content_keys", None)):
        return own_keys()  # type: ignore[no-any-return]
    if not isinstance(column, list | tuple | np.ndarray | Tensor):
        return None  # a column of another type may read a file per value
    # Python caches the hash of a text, and a text without surrounding whitespace is not copied.
    return [
        value.strip() if isinstance(value, str) else hashlib.sha256(content_bytes(value)).digest() for value in column
    ]


def content_bytes(value: Any) -> bytes:
    """Return bytes that differ for values that differ: texts, arrays, images, lists."""
    if isinstance(value, str):
        return value.encode()
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return repr(value).encode()
    if array.dtype.hasobject:
        # The bytes of an object array are memory addresses, which differ between processes.
        return repr(value).encode()
    return repr((array.dtype, array.shape)).encode() + array.tobytes()
