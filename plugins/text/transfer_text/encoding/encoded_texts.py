"""Numericalised texts: one flat array of indices, and where each text begins in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

Truncation = Literal["head", "tail", "both"]
INDICES, OFFSETS = "indices.bin", "offsets.npy"


class EncodedTexts(Sequence[npt.NDArray[np.int32]]):
    """The indices of each text, int32 (T,), cut from one flat array when they are asked for.

    A million texts are two arrays, not a million objects; the flat one may be a file that is mapped into memory.

    Args:
        indices: Those of all texts in a row, int32 (the sum of T,).
        offsets: Where each text begins, and where the last one ends, int64 (N + 1,).
        max_length: The most indices of a text that are given; None gives all.
        truncation: Which of a longer text stay: the first (``head``), the last (``tail``), or half from each end.
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
    def of(cls, parts: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]) -> Self:
        """Return texts that come in parts: the indices of some texts in a row, and the number of each text's."""
        found = list(parts)
        indices = np.concatenate([np.zeros(0, dtype=np.int32), *(indices for indices, _ in found)])
        return cls(indices, _offsets([sizes for _, sizes in found]))

    @staticmethod
    def write(folder: Path, parts: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]) -> None:
        """Write the same to disk, a part at a time."""
        sizes = []
        with (folder / INDICES).open("wb") as file:
            for indices, of_each in parts:
                indices.astype("<i4", copy=False).tofile(file)
                sizes.append(of_each)
        np.save(folder / OFFSETS, _offsets(sizes))

    @classmethod
    def read(cls, folder: Path, count: int) -> Self | None:
        """Map so many texts that :meth:`write` wrote; None if they are damaged."""
        try:
            offsets: npt.NDArray[np.int64] = np.load(folder / OFFSETS, allow_pickle=False)
            file = folder / INDICES
            if len(offsets) != count + 1 or file.stat().st_size != 4 * offsets[-1]:
                return None
            if not offsets[-1]:
                return cls(np.zeros(0, dtype=np.int32), offsets)
            # Copy on write: torch warns of arrays that cannot be written.
            return cls(np.asarray(np.memmap(file, dtype="<i4", mode="c")), offsets)
        except (OSError, ValueError, EOFError, IndexError):
            return None

    def truncated(self, max_length: int | None, truncation: Truncation = "head") -> EncodedTexts:
        """Return the same texts, cut to another length; nothing is copied."""
        return EncodedTexts(self.indices, self.offsets, max_length, truncation)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of indices given of each text, int64 (N,)."""
        lengths = np.diff(self.offsets)
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return the indices of one text, int32 (T,), or those of several as a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} texts, and no text {index}")
        index = int(index) % len(self)
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        most = self.max_length
        if most is None or end - start <= most or self.truncation == "head":
            return self.indices[start : end if most is None else min(end, start + most)]
        if self.truncation == "tail":
            return self.indices[end - most : end]
        first = (most + 1) // 2
        return np.concatenate([self.indices[start : start + first], self.indices[end - (most - first) : end]])


def truncation_loss(lengths: npt.NDArray[np.int64], max_length: int | None) -> dict[str, Any]:
    """Say how much of some texts their longest length drops: JSON alone.

    Args:
        lengths: Of the whole texts in tokens, int64 (N,).
        max_length: As a backbone has it.

    Returns:
        ``max_length``, ``texts_cut`` (the share of texts that lose something) and ``tokens_cut`` (the share of all
        tokens that is dropped).
    """
    beyond = np.maximum(lengths - max_length, 0) if max_length is not None else np.zeros_like(lengths)
    return {
        "max_length": max_length,
        "texts_cut": round(float(np.count_nonzero(beyond) / max(len(lengths), 1)), 4),
        "tokens_cut": round(float(beyond.sum() / max(lengths.sum(), 1)), 4),
    }


def _offsets(sizes: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *sizes]))
