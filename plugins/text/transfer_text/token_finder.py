"""Find the tokens of many short pieces of text at once."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import models

from transfer_text.tokenization import GLOVE_TOKEN_IN_ASCII, TokenizerName, assemble

TOGETHER = 48
"""Pieces that are worked on in one call: few enough that most such groups are ASCII alone."""
END = "\n"
"""Stands between pieces, none of which holds it."""


class TokenFinder:
    """Finds the tokens of pieces of text as a named tokenizer does, five times faster than piece by piece.

    A call of the tokenizers library costs more than a short piece's work, so pieces are normalized joined; and the
    tokens of what is ASCII, nearly all of it, are found by Python's regular expressions, by the same pattern.

    Args:
        name: Of the tokenizer.
    """

    def __init__(self, name: TokenizerName) -> None:
        tokenizer = assemble(name, models.WordLevel({"?": 0}, unk_token="?"))  # noqa: S106
        self._normalizer = tokenizer.normalizer
        self._pre_tokenizer = tokenizer.pre_tokenizer
        token = GLOVE_TOKEN_IN_ASCII if name == "glove" else r"\S+"
        self._find_ascii = re.compile(f"{END}|{token}", re.ASCII).findall

    def find(self, pieces: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Return the tokens of all pieces in a row, and the number of each piece's, int64 (N,).

        Args:
            pieces: None holds a new line.
        """
        found: list[str] = []  # with an END after the tokens of each piece
        for begin in range(0, len(pieces), TOGETHER):
            some = pieces[begin : begin + TOGETHER]
            joined = self._normalize(END.join(some))
            if joined.isascii() and joined.count(END) == len(some) - 1:
                found += self._find_ascii(joined)
                found.append(END)
                continue
            # Only what looks like a tag may reach over the end of a piece, and then takes that away.
            apart = joined.split(END) if joined.count(END) == len(some) - 1 else map(self._normalize, some)
            for piece in apart:
                found += self._find_ascii(piece) if piece.isascii() else self._find_any(piece)
                found.append(END)
        is_end = np.fromiter(map(END.__eq__, found), dtype=np.bool_, count=len(found))
        return [token for token in found if token != END], np.diff(np.flatnonzero(is_end), prepend=-1) - 1

    def _normalize(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def _find_any(self, piece: str) -> list[str]:
        return [token for token, _ in self._pre_tokenizer.pre_tokenize_str(piece)]
