"""Encoding of raw values, naming the example at fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transfer.errors import DataError
from transfer.interfaces import Preprocessing


def encode(
    preprocessing: Preprocessing, column: Sequence[Any], indices: Sequence[int], name: Callable[[int], str]
) -> Sequence[Any]:
    """Encode some values of a column; if that fails, find out which one it is.

    Args:
        preprocessing: The backbone's.
        column: Raw values.
        indices: Which of them, in order.
        name: What a value is called in messages, by index.

    Raises:
        DataError: Names the value that cannot be encoded.
    """
    try:
        return preprocessing.encode([column[i] for i in indices]) if len(indices) else []
    except (ValueError, OSError) as error:
        for index in indices:
            try:
                preprocessing.encode([column[index]])
            except (ValueError, OSError) as one:
                raise DataError(f"cannot be read: {one}", where=name(index), fix="mend or remove it") from one
        raise DataError(f"a batch cannot be encoded: {error}") from error
