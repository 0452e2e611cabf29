"""Columns of examples, read by position, with digests of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class Selection(Sequence[Any]):
    """Some items of a sequence, without reading any."""

    def __init__(self, column: Sequence[Any], indices: npt.NDArray[np.int64]) -> None:
        if isinstance(column, Selection):  # a selection of a selection is one selection
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
    """Several columns as one of tuples, without reading any.

    Args:
        columns: Of the same length each.
    """

    def __init__(self, columns: Sequence[Sequence[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: Any) -> Any:
        values = tuple(column[index] for column in self.columns)
        return list(zip(*values, strict=True)) if isinstance(index, slice) else values

    def fingerprint(self) -> str:
        """Return what identifies the values of all columns."""
        return " ".join(map(fingerprint, self.columns))


def fingerprint(column: Sequence[Any]) -> str:
    """Return a digest of the values of a column."""
    digest = hashlib.sha256()
    if isinstance(column, Selection):
        digest.update(fingerprint(column._column).encode() + np.ascontiguousarray(column._indices).tobytes())
    elif callable(known := getattr(column, "fingerprint", None)):
        return str(known())
    else:
        for value in column:
            content = _content(value)
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _content(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return repr(value).encode()
    # The bytes of an array of objects are addresses, which the next process has others of.
    return (
        repr(value).encode() if array.dtype.hasobject else repr((array.dtype, array.shape)).encode() + array.tobytes()
    )
