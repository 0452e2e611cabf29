"""Encoding of raw values, with errors that name the example."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.errors import DataError, Problem
from transfer.interfaces import Preprocessing

MAX_PROBLEMS = 20
"""Maximum number of examples in an error."""
BLOCK_EXAMPLES = 200_000
"""Number of values that are encoded in one call: seconds of work, which a preprocessing may divide among processes."""


class EncodedBlocks(Sequence[Any]):
    """Encoded values, as one sequence over the results of several calls of :meth:`Preprocessing.encode`.

    Args:
        blocks: Results of the calls, in order. They are not copied.
    """

    def __init__(self, blocks: Sequence[Sequence[Any]]) -> None:
        self.blocks = blocks
        self._ends = list(itertools.accumulate(map(len, blocks)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        """Return one encoded value, or several as a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"value {index} is out of range: there are {len(self)} values")
        index = int(index) % len(self)
        # The first block that ends after the index contains it.
        block = bisect.bisect_right(self._ends, index)
        return self.blocks[block][index - (self._ends[block - 1] if block else 0)]


def encode_all(
    preprocessing: Preprocessing,
    column: Sequence[Any],
    name: Callable[[int], str],
    progress: Callable[[int, int], None] | None = None,
) -> Sequence[Any]:
    """Encode a complete column, block by block.

    Args:
        preprocessing: Preprocessing of the backbone.
        column: Raw values of the split.
        name: Function from an index to the name of the example in errors.
        progress: Function that is called before and after each block with the number of encoded values and that of all
            values. None reports no progress.

    Raises:
        DataError: Values cannot be encoded; the error names their examples.
    """
    count = len(column)
    blocks: list[Sequence[Any]] = []
    for start in range(0, count, BLOCK_EXAMPLES):
        if progress is not None:
            progress(start, count)
        try:
            blocks.append(preprocessing.encode([column[i] for i in range(start, min(start + BLOCK_EXAMPLES, count))]))
        except (ValueError, OSError) as error:
            # Examples of later blocks are named too, so that all of them can be repaired at once.
            raise _encoding_error(preprocessing, column, range(start, count), name, error) from error
    if progress is not None:
        progress(count, count)
    return blocks[0] if len(blocks) == 1 else EncodedBlocks(blocks)


def encoded_lengths(preprocessing: Preprocessing, encoded: Sequence[Any]) -> npt.NDArray[np.int64]:
    """Return the length of each encoded value, int64 (N,)."""
    blocks = encoded.blocks if isinstance(encoded, EncodedBlocks) else [encoded]
    return np.concatenate([np.zeros(0, dtype=np.int64), *map(preprocessing.lengths, blocks)])


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
        raise _encoding_error(preprocessing, column, indices, name, error) from error


def _encoding_error(
    preprocessing: Preprocessing,
    column: Sequence[Any],
    indices: Sequence[int],
    name: Callable[[int], str],
    error: Exception,
) -> DataError:
    """Return the error that names the examples which cannot be encoded.

    The error of several values names neither the value nor the other bad ones: encode one at a time to find all.
    """
    problems = []
    for index in indices:
        try:
            preprocessing.encode([column[index]])
        except (ValueError, OSError) as one:
            problems.append(Problem(f"cannot be read: {one}", name(index), fix="repair or remove it"))
    if not problems:
        return DataError(f"a batch cannot be encoded: {error}")
    if (more := len(problems) - MAX_PROBLEMS) > 0:
        problems[MAX_PROBLEMS:] = [Problem(f"{more:,} more cannot be read")]
    return DataError.of(problems)
