"""Encode texts piece by piece: a piece that was seen before costs one table look-up.

This is the pre-tokenization cache that tokenizer libraries keep per word, vectorized over a block of texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

MAX_PIECES = 1_000_000  # about 200 MB; the table is emptied when it grows beyond this
SLOT_BITS = 20
"""The hash table of short pieces has 2 ** SLOT_BITS slots: 20 MB."""

_IS_BLANK = np.zeros(256, dtype=np.bool_)
_IS_BLANK[list(b" \t\n\r\x0b\x0c")] = True  # the whitespace of bytes.split()
_WORD_BYTES = 8
_BLANKS = np.uint64(int.from_bytes(b" " * _WORD_BYTES, "little"))
_FIRST_BYTES = np.array([(1 << 8 * count) - 1 for count in range(_WORD_BYTES + 1)], dtype=np.uint64)
_MULTIPLIERS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd constants with well-mixed bits

Key = TypeVar("Key", str, bytes)
Tokenize = Callable[[Sequence[str]], tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]


class PieceTable:
    """Distinct pieces (whitespace-separated words) of the texts seen so far, with the indices of their tokens.

    Texts contain few distinct pieces, so almost all of a tokenizer's work is repeated work.

    Args:
        split: Function that returns a text as UTF-8 bytes in which every whitespace-separated piece can be tokenized
            independently: the concatenated tokens of the pieces are the tokens of the text.
        tokenize: Function that returns the concatenated token indices of some pieces, int32, and the number of tokens
            of each piece, int64.
    """

    def __init__(self, split: Callable[[str], bytes], tokenize: Tokenize) -> None:
        self._split = split
        self._tokenize = tokenize
        self._pieces = _Pieces()
        self._offsets: npt.NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        self._indices: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return the concatenated token indices of texts, int32 (T,), and the length of each text, int64 (N,).

        Raises:
            ValueError: A text contains a lone surrogate.
        """
        if len(self._pieces) > MAX_PIECES:
            self._pieces = _Pieces()
            self._offsets, self._indices = self._offsets[:1], self._indices[:0]
        pieces, ends = self._pieces.ids([self._split(text) for text in texts])
        self._tokenize_new_pieces()
        starts = self._offsets[pieces]
        sizes = self._offsets[pieces + 1] - starts
        before = np.concatenate([[0], np.cumsum(sizes)])  # number of tokens before each piece
        # Position of each token in the table: the start of its piece, plus its position within the piece.
        positions = np.repeat(starts - before[:-1], sizes) + np.arange(before[-1])
        return self._indices[positions], np.diff(before[ends])

    def map(self, new: npt.NDArray[np.int32]) -> None:
        """Replace each stored token index ``i`` by ``new[i]``."""
        self._indices = new[self._indices]

    def set_tokenizer(self, tokenize: Tokenize) -> None:
        """Use another function for the pieces that are not in the table yet."""
        self._tokenize = tokenize

    def _tokenize_new_pieces(self) -> None:
        tokenized = len(self._offsets) - 1
        if tokenized == len(self._pieces):
            return
        indices, sizes = self._tokenize(self._pieces.after(tokenized))
        self._offsets = np.concatenate([self._offsets, np.cumsum(sizes) + self._offsets[-1]])
        self._indices = np.concatenate([self._indices, indices])


class _Pieces:
    """Ids of pieces in first-seen order.

    Pieces of up to 16 bytes are looked up in one vectorized step. Two 64-bit words contain such a piece completely, and
    a multiplicative hash of the two words is its slot in an open table of 2 ** SLOT_BITS entries. The slot stores both
    words, so that a hash collision is detected. Longer pieces, new pieces, and pieces whose slot is occupied by another
    piece are looked up in a dictionary.
    """

    def __init__(self) -> None:
        self._ids = FirstSeenIndex[bytes]()
        slots = 1 << SLOT_BITS
        self._first: npt.NDArray[np.uint64] = np.zeros(slots, dtype=np.uint64)  # 0: an empty slot
        self._second: npt.NDArray[np.uint64] = np.zeros(slots, dtype=np.uint64)
        self._slot_ids: npt.NDArray[np.int64] = np.zeros(slots, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def after(self, count: int) -> list[str]:
        """Return all pieces except the first ``count``."""
        newest = itertools.islice(reversed(self._ids), len(self._ids) - count)
        return [piece.decode() for piece in newest][::-1]

    def ids(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the id of each piece, int64 (P,), and the offset of each text's first piece, int64 (N + 1,)."""
        content = b" ".join(texts)
        starts, ends = _bounds(content)
        first, second = _words(content, starts, ends - starts)
        slots = ((first * _MULTIPLIERS[0] ^ second * _MULTIPLIERS[1]) >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
        ids = self._slot_ids[slots]
        hit = (self._first[slots] == first) & (self._second[slots] == second) & (ends - starts <= 2 * _WORD_BYTES)
        rest = np.flatnonzero(~hit)
        # FirstSeenIndex assigns the next id to a piece that it has not seen.
        find = self._ids.__getitem__
        ids[rest] = [
            find(content[start:end]) for start, end in zip(starts[rest].tolist(), ends[rest].tolist(), strict=True)
        ]
        rest = rest[(ends - starts)[rest] <= 2 * _WORD_BYTES]
        rest = rest[self._first[slots[rest]] == 0]  # pieces whose slot is free
        # Two new pieces may share a free slot: only the first one is stored in it.
        _, first_of_slot = np.unique(slots[rest], return_index=True)
        rest = rest[first_of_slot]
        filled = slots[rest]
        self._first[filled], self._second[filled], self._slot_ids[filled] = first[rest], second[rest], ids[rest]
        lengths = np.array([0, *map(len, texts)], dtype=np.int64)
        # Texts are joined by one blank, so text i starts at the sum of the lengths before it, plus i.
        return ids, np.searchsorted(starts, np.cumsum(lengths) + np.arange(len(lengths)))


class FirstSeenIndex(dict[Key, int]):
    """Mapping that assigns each new key the next integer."""

    def __missing__(self, key: Key) -> int:
        index = self[key] = len(self)
        return index


def _bounds(content: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the start and the end of each run of non-whitespace bytes."""
    blank = np.ones(len(content) + 2, dtype=np.bool_)  # one blank before and one after the content
    blank[1:-1] = _IS_BLANK[np.frombuffer(content, dtype=np.uint8)]
    edges = np.flatnonzero(blank[1:] != blank[:-1])
    return edges[::2], edges[1::2]


def _words(
    content: bytes, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return the first and the second eight bytes of each piece as integers, unique among pieces of up to 16 bytes.

    Each byte is XORed with a blank, which no piece contains, and bytes after the end of a piece are 0. The integers
    thus encode the length as well.
    """
    padded = content + b" " * (2 * _WORD_BYTES)
    count = len(content) + _WORD_BYTES + 1
    at = np.ndarray(
        (count,), dtype="<u8", buffer=padded, strides=(1,)
    )  # overlapping view: the eight bytes that start at each position
    first = (at[starts] ^ _BLANKS) & _FIRST_BYTES[np.minimum(lengths, _WORD_BYTES)]
    second = (at[starts + _WORD_BYTES] ^ _BLANKS) & _FIRST_BYTES[np.clip(lengths - _WORD_BYTES, 0, _WORD_BYTES)]
    return first, second
