"""Find the tokens of many short pieces of text at once."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import models

from transfer_text.encoding.tokenization import GLOVE_TOKEN_IN_ASCII, TokenizerName, assemble, normalized_ascii

TOGETHER = 48
"""Pieces that the library normalizes in one call: its time for each grows with the length of the whole."""
END = "\n"
"""Stands between pieces, none of which holds it."""


class TokenFinder:
    """Finds the tokens of pieces of text as a named tokenizer does, ten times faster than piece by piece.

    What is ASCII, nearly all of it, is normalized and cut by Python, by the same patterns, in one go. A call of the
    tokenizers library costs more than a short piece's work, so the others are normalized joined.

    Args:
        name: Of the tokenizer.
    """

    def __init__(self, name: TokenizerName) -> None:
        tokenizer = assemble(name, models.WordLevel({"?": 0}, unk_token="?"))  # noqa: S106
        self._normalizer = tokenizer.normalizer
        self._pre_tokenizer = tokenizer.pre_tokenizer
        self._normalize_ascii = functools.partial(normalized_ascii, name)
        token = GLOVE_TOKEN_IN_ASCII if name == "glove" else r"\S+"
        self._find_ascii = re.compile(f"{END}|{token}", re.ASCII).findall

    def find(self, pieces: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Return the tokens of all pieces in a row, and the number of each piece's, int64 (N,).

        Args:
            pieces: None holds a new line.
        """
        if not pieces:
            return [], np.zeros(0, dtype=np.int64)
        found = self._find_ascii(_apart([p if p.isascii() else "" for p in pieces], self._normalize_ascii))
        ends = np.flatnonzero(np.fromiter(map(END.__eq__, found), dtype=np.bool_, count=len(found)))
        counts = np.diff(ends, prepend=-1, append=len(found)) - 1
        tokens = [token for token in found if token != END]
        places = [place for place, piece in enumerate(pieces) if not piece.isascii()]
        firsts = (np.cumsum(counts) - counts)[places].tolist()
        mended: list[str] = []
        done = 0
        for place, first, own in zip(places, firsts, self._find_any([pieces[p] for p in places]), strict=True):
            mended += tokens[done:first]
            mended += own
            counts[place] = len(own)
            done = first
        return mended + tokens[done:], counts

    def _find_any(self, pieces: Sequence[str]) -> list[list[str]]:
        found = []
        for begin in range(0, len(pieces), TOGETHER):
            for piece in _apart(pieces[begin : begin + TOGETHER], self._normalize).split(END):
                if piece.isascii():
                    found.append(self._find_ascii(piece))
                else:
                    found.append([token for token, _ in self._pre_tokenizer.pre_tokenize_str(piece)])
        return found

    def _normalize(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))


def _apart(pieces: Sequence[str], normalize: Callable[[str], str]) -> str:
    """Normalize some pieces and return them with an END between any two."""
    joined = normalize(END.join(pieces))
    if joined.count(END) == len(pieces) - 1:
        return joined
    return END.join(map(normalize, pieces))  # what looks like a tag reached over an end, and took that away
