"""Encoded texts: one flat array of token indices, and the offset of each text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

Truncation = Literal["head", "tail", "both"]
INDICES, OFFSETS = "indices.bin", "offsets.npy"


class EncodedTexts(Sequence[npt.NDArray[np.int32]]):
    """The token indices of each text, int32 (T,), as a slice of one flat array.

    A million texts are two arrays instead of a million objects, and the flat array may be memory-mapped from a file.

    Args:
        indices: Concatenated token indices of all texts, int32 (sum of T,).
        offsets: Start of each text in ``indices``, and the end of the last one, int64 (N + 1,).
        max_length: Maximum number of tokens returned per text. None returns all tokens.
        truncation: Tokens that remain of a longer text: the first (``head``), the last (``tail``), or half of them from
            each end (``both``).
    """

    def __init__(
        self,
        indices: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        max_length: int | None = None,
        truncation: Truncation = "head",
    ) -> None:
        self.indices = indices
        self.offsets = offsets
        self.max_length = max_length
        self.truncation: Truncation = truncation

    @classmethod
    def of(cls, blocks: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]) -> Self:
        """Return encoded texts from blocks of concatenated token indices and the length of each text."""
        encoded = list(blocks)
        indices = np.concatenate([np.zeros(0, dtype=np.int32), *(indices for indices, _ in encoded)])
        return cls(indices, _offsets([lengths for _, lengths in encoded]))

    @staticmethod
    def write(folder: Path, blocks: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]) -> None:
        """Write encoded texts to a folder, block by block."""
        lengths = []
        with (folder / INDICES).open("wb") as file:
            for indices, block_lengths in blocks:
                indices.astype("<i4", copy=False).tofile(file)
                lengths.append(block_lengths)
        np.save(folder / OFFSETS, _offsets(lengths))

    @classmethod
    def read(cls, folder: Path, count: int) -> Self | None:
        """Memory-map ``count`` texts that :meth:`write` wrote. Return None if the files are damaged."""
        try:
            offsets: npt.NDArray[np.int64] = np.load(folder / OFFSETS, allow_pickle=False)
            file = folder / INDICES
            # A file of another size would be mapped beyond its end, which kills the process on access.
            if len(offsets) != count + 1 or file.stat().st_size != 4 * offsets[-1]:
                return None
            if not offsets[-1]:
                return cls(np.zeros(0, dtype=np.int32), offsets)
            # Copy on write, because torch warns about read-only arrays.
            return cls(np.asarray(np.memmap(file, dtype="<i4", mode="c")), offsets)
        except (OSError, ValueError, EOFError, IndexError):
            return None

    def truncated(self, max_length: int | None, truncation: Truncation = "head") -> EncodedTexts:
        """Return the same texts with another maximum length, without a copy."""
        return EncodedTexts(self.indices, self.offsets, max_length, truncation)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens returned per text, int64 (N,)."""
        lengths = np.diff(self.offsets)
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return the indices of one text, int32 (T,), or those of several as a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} is out of range: there are {len(self)} texts")
        index = int(index) % len(self)
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        limit = self.max_length
        if limit is None or end - start <= limit or self.truncation == "head":
            return self.indices[start : end if limit is None else min(end, start + limit)]
        if self.truncation == "tail":
            return self.indices[end - limit : end]
        head = (limit + 1) // 2
        return np.concatenate([self.indices[start : start + head], self.indices[end - (limit - head) : end]])


def truncation_loss(lengths: npt.NDArray[np.int64], max_length: int | None) -> dict[str, Any]:
    """Return the effect of truncation on texts, as JSON values.

    Args:
        lengths: Number of tokens of each text before truncation, int64 (N,).
        max_length: Maximum number of tokens per text. None means no truncation.

    Returns:
        ``max_length``, ``texts_cut`` (the fraction of truncated texts) and ``tokens_cut`` (the fraction of dropped
        tokens).
    """
    beyond = np.maximum(lengths - max_length, 0) if max_length is not None else np.zeros_like(lengths)
    return {
        "max_length": max_length,
        "texts_cut": round(float(np.count_nonzero(beyond) / max(len(lengths), 1)), 4),
        "tokens_cut": round(float(beyond.sum() / max(lengths.sum(), 1)), 4),
    }


def _offsets(lengths: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *lengths]))
