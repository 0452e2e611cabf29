"""Numericalise texts piece by piece: a piece that was met before costs one look-up in a table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

MOST_PIECES = 1_000_000  # about 200 MB; then the table is begun anew


class PieceTable:
    """The pieces met so far and the indices of their tokens.

    Texts hold few distinct pieces (words as blanks part them), so almost all of a tokenizer's work is repeated work.

    Args:
        cut: Cuts a text into pieces whose tokens, in a row, are those of the text.
        tokenize: Gives the indices of the tokens of each of some pieces.
    """

    def __init__(
        self, cut: Callable[[str], list[bytes]], tokenize: Callable[[Sequence[str]], Iterable[Sequence[int]]]
    ) -> None:
        self._cut = cut
        self._tokenize = tokenize
        self._places = _Places()
        self._offsets: npt.NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        self._indices: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)

    def numericalise(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return the indices of all texts in a row, int32, and the number of each text's, int64 (N,).

        Raises:
            ValueError: A text holds half a surrogate pair.
        """
        if len(self._places) > MOST_PIECES:
            self._places = _Places()
            self._offsets, self._indices = self._offsets[:1], self._indices[:0]
        places: list[int] = []
        ends = np.zeros(len(texts) + 1, dtype=np.int64)  # of each text, in pieces
        find = self._places.__getitem__
        try:
            for number, text in enumerate(texts, 1):
                places.extend(map(find, self._cut(text)))
                ends[number] = len(places)
        finally:
            self._learn()
        pieces = np.array(places, dtype=np.int64)
        begins = self._offsets[pieces]
        sizes = self._offsets[pieces + 1] - begins
        reached = np.concatenate([[0], np.cumsum(sizes)])  # tokens before each piece
        # For each token the place in the table: its piece's first, and on from there.
        source = np.repeat(begins - reached[:-1], sizes) + np.arange(reached[-1])
        return self._indices[source], np.diff(reached[ends])

    def map(self, new: npt.NDArray[np.int32]) -> None:
        """Replace each index ``i`` by ``new[i]``."""
        self._indices = new[self._indices]

    def then(self, tokenize: Callable[[Sequence[str]], Iterable[Sequence[int]]]) -> None:
        """Tokenize pieces that were not met yet in another way from now on."""
        self._tokenize = tokenize

    def _learn(self) -> None:
        """Tokenize the pieces that are new."""
        known = len(self._offsets) - 1
        if known == len(self._places):
            return
        newest = itertools.islice(reversed(self._places), len(self._places) - known)
        fresh = [piece.decode() for piece in newest][::-1]
        found = list(self._tokenize(fresh))
        ends = np.cumsum([len(indices) for indices in found], dtype=np.int64) + self._offsets[-1]
        self._offsets = np.concatenate([self._offsets, ends])
        flat = np.array([index for indices in found for index in indices], dtype=np.int32)
        self._indices = np.concatenate([self._indices, flat])


class _Places(dict[bytes, int]):
    """Pieces in the order in which they were first asked for."""

    def __missing__(self, piece: bytes) -> int:
        place = self[piece] = len(self)
        return place
