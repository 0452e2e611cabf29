"""Encoding of raw values, with errors that name the example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transfer.errors import DataError, Problem
from transfer.interfaces import Preprocessing

MAX_PROBLEMS = 20
"""Maximum number of examples in an error."""


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
        DataError: Values cannot be encoded; the error names their examples.
    """
    try:
        return preprocessing.encode([column[i] for i in indices]) if len(indices) else []
    except (ValueError, OSError) as error:
        # The error of a batch names neither the value nor the other bad ones: encode one at a time to find all.
        problems = []
        for index in indices:
            try:
                preprocessing.encode([column[index]])
            except (ValueError, OSError) as one:
                problems.append(Problem(f"cannot be read: {one}", name(index), fix="repair or remove it"))
        if not problems:
            raise DataError(f"a batch cannot be encoded: {error}") from error
        if (more := len(problems) - MAX_PROBLEMS) > 0:
            problems[MAX_PROBLEMS:] = [Problem(f"{more:,} more cannot be read")]
        raise DataError.of(problems) from error
