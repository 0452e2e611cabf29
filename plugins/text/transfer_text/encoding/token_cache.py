"""Numericalise texts piece by piece: a piece that was met before costs one look-up in a table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

MAX_PIECES = 1_000_000  # about 200 MB; then the table is begun anew
SLOT_BITS = 20
"""Of the numbers of the slots of a table of short pieces: 20 MB."""

_IS_BLANK = np.zeros(256, dtype=np.bool_)
_IS_BLANK[list(b" \t\n\r\x0b\x0c")] = True  # as bytes.split() has them
_WORD_BYTES = 8
_BLANKS = np.uint64(int.from_bytes(b" " * _WORD_BYTES, "little"))
_FIRST_BYTES = np.array([(1 << 8 * count) - 1 for count in range(_WORD_BYTES + 1)], dtype=np.uint64)
_MULTIPLIERS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd, without a pattern

Key = TypeVar("Key", str, bytes)
Tokenize = Callable[[Sequence[str]], tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]


class PieceTable:
    """The pieces met so far and the indices of their tokens.

    Texts hold few distinct pieces (words as blanks part them), so almost all of a tokenizer's work is repeated work.

    Args:
        part: Gives a text in UTF-8 with ASCII blanks between pieces whose tokens, in a row, are those of the text.
        tokenize: Gives the indices of the tokens of some pieces in a row, int32, and the number of each piece's.
    """

    def __init__(self, part: Callable[[str], bytes], tokenize: Tokenize) -> None:
        self._part = part
        self._tokenize = tokenize
        self._pieces = _Pieces()
        self._offsets: npt.NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        self._indices: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)

    def numericalise(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return the indices of all texts in a row, int32, and the number of each text's, int64 (N,).

        Raises:
            ValueError: A text holds half a surrogate pair.
        """
        if len(self._pieces) > MAX_PIECES:
            self._pieces = _Pieces()
            self._offsets, self._indices = self._offsets[:1], self._indices[:0]
        pieces, ends = self._pieces.numbers([self._part(text) for text in texts])
        self._learn()
        begins = self._offsets[pieces]
        sizes = self._offsets[pieces + 1] - begins
        reached = np.concatenate([[0], np.cumsum(sizes)])  # tokens before each piece
        # For each token the place in the table: its piece's first, and on from there.
        source = np.repeat(begins - reached[:-1], sizes) + np.arange(reached[-1])
        return self._indices[source], np.diff(reached[ends])

    def map(self, new: npt.NDArray[np.int32]) -> None:
        """Replace each index ``i`` by ``new[i]``."""
        self._indices = new[self._indices]

    def then(self, tokenize: Tokenize) -> None:
        """Tokenize pieces that were not met yet in another way from now on."""
        self._tokenize = tokenize

    def _learn(self) -> None:
        """Tokenize the pieces that are new."""
        known = len(self._offsets) - 1
        if known == len(self._pieces):
            return
        indices, sizes = self._tokenize(self._pieces.since(known))
        self._offsets = np.concatenate([self._offsets, np.cumsum(sizes) + self._offsets[-1]])
        self._indices = np.concatenate([self._indices, indices])


class _Pieces:
    """Numbers pieces in the order in which they are first met.

    Pieces of up to 16 bytes are looked up all at once: two machine words hold one whole and name its slot in a table.
    Longer pieces, new ones, and those whose slot another piece has taken go through a dictionary.
    """

    def __init__(self) -> None:
        self._numbers = InOrder[bytes]()
        slots = 1 << SLOT_BITS
        self._first: npt.NDArray[np.uint64] = np.zeros(slots, dtype=np.uint64)  # no piece has zero here
        self._second: npt.NDArray[np.uint64] = np.zeros(slots, dtype=np.uint64)
        self._number: npt.NDArray[np.int64] = np.zeros(slots, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def since(self, count: int) -> list[str]:
        """Return all pieces but the first so many."""
        newest = itertools.islice(reversed(self._numbers), len(self._numbers) - count)
        return [piece.decode() for piece in newest][::-1]

    def numbers(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the number of each piece of some texts, int64, and where each text's begin and the last one's end."""
        content = b" ".join(texts)
        begins, ends = _bounds(content)
        first, second = _words(content, begins, ends - begins)
        slots = ((first * _MULTIPLIERS[0] ^ second * _MULTIPLIERS[1]) >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
        numbers = self._number[slots]
        known = (self._first[slots] == first) & (self._second[slots] == second) & (ends - begins <= 2 * _WORD_BYTES)
        rest = np.flatnonzero(~known)
        find = self._numbers.__getitem__
        numbers[rest] = [
            find(content[begin:end]) for begin, end in zip(begins[rest].tolist(), ends[rest].tolist(), strict=True)
        ]
        rest = rest[(ends - begins)[rest] <= 2 * _WORD_BYTES]
        rest = rest[self._first[slots[rest]] == 0]  # whose slot is free
        _, one_each = np.unique(slots[rest], return_index=True)
        rest = rest[one_each]
        taken = slots[rest]
        self._first[taken], self._second[taken], self._number[taken] = first[rest], second[rest], numbers[rest]
        lengths = np.array([0, *map(len, texts)], dtype=np.int64)
        return numbers, np.searchsorted(begins, np.cumsum(lengths) + np.arange(len(lengths)))


class InOrder(dict[Key, int]):
    """Numbers keys in the order in which they are first asked for."""

    def __missing__(self, key: Key) -> int:
        number = self[key] = len(self)
        return number


def _bounds(content: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where each run of bytes that are no blanks begins, and where it ends."""
    blank = np.ones(len(content) + 2, dtype=np.bool_)  # one before and one after
    blank[1:-1] = _IS_BLANK[np.frombuffer(content, dtype=np.uint8)]
    edges = np.flatnonzero(blank[1:] != blank[:-1])
    return edges[::2], edges[1::2]


def _words(
    content: bytes, begins: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return the first eight bytes of each piece and the next eight, as numbers that no other piece of up to 16 has.

    Bytes are less a blank's, which no piece holds, and 0 after the end: so the numbers tell the length too.
    """
    padded = content + b" " * (2 * _WORD_BYTES)
    count = len(content) + _WORD_BYTES + 1
    at = np.ndarray((count,), dtype="<u8", buffer=padded, strides=(1,))  # the eight bytes from each place on
    first = (at[begins] ^ _BLANKS) & _FIRST_BYTES[np.minimum(lengths, _WORD_BYTES)]
    second = (at[begins + _WORD_BYTES] ^ _BLANKS) & _FIRST_BYTES[np.clip(lengths - _WORD_BYTES, 0, _WORD_BYTES)]
    return first, second
