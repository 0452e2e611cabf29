"""Encoding of raw values, with errors that name the example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transfer.errors import DataError
from transfer.interfaces import Preprocessing


def encode(
    preprocessing: Preprocessing, column: Sequence[Any], indices: Sequence[int], name: Callable[[int], str]
) -> Sequence[Any]:
    """Encode some values of a column.

    Args:
        preprocessing: Preprocessing of the backbone.
        column: Raw values of the split.
        indices: Indices of the values to encode, in order.
        name: Function from an index to the name of the example in errors.

    Raises:
        DataError: A value cannot be encoded; the error names its example.
    """
    try:
        return preprocessing.encode([column[i] for i in indices]) if len(indices) else []
    except (ValueError, OSError) as error:
        # The error of a batch does not name the value: encode one at a time to find it.
        for index in indices:
            try:
                preprocessing.encode([column[index]])
            except (ValueError, OSError) as one:
                raise DataError(f"cannot be read: {one}", where=name(index), fix="repair or remove it") from one
        raise DataError(f"a batch cannot be encoded: {error}") from error
