"""Find the tokens of many short pieces of text at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tokenizers import models

from transfer_text.tokenization import GLOVE_TOKEN_IN_ASCII, TokenizerName, assemble

TOGETHER = 512
"""Pieces that are normalized in one call."""
SEPARATOR = "\x1f"
"""A control character that no rule of the tokenizers mentions and that is no blank."""


class TokenFinder:
    """Finds the tokens of pieces of text as a named tokenizer does, three times faster than piece by piece.

    A call of the tokenizers library costs more than a short piece, so many are normalized joined; and the tokens of
    what is ASCII, nearly all of it, are found by Python's own regular expressions, by the same pattern.

    Args:
        name: Of the tokenizer.
    """

    def __init__(self, name: TokenizerName) -> None:
        tokenizer = assemble(name, models.WordLevel({"?": 0}, unk_token="?"))  # noqa: S106
        self._normalizer = tokenizer.normalizer
        self._pre_tokenizer = tokenizer.pre_tokenizer
        self._find_ascii = re.compile(GLOVE_TOKEN_IN_ASCII if name == "glove" else r"\S+", re.ASCII).findall

    def tokens(self, pieces: Sequence[str]) -> Iterator[list[str]]:
        """Yield the tokens of each piece."""
        for begin in range(0, len(pieces), TOGETHER):
            for piece in self._normalized(pieces[begin : begin + TOGETHER]):
                if piece.isascii():
                    yield self._find_ascii(piece)
                else:
                    yield [token for token, _ in self._pre_tokenizer.pre_tokenize_str(piece)]

    def _normalized(self, pieces: Sequence[str]) -> Sequence[str]:
        if self._normalizer is None:
            return pieces
        joined: list[str] = self._normalizer.normalize_str(SEPARATOR.join(pieces)).split(SEPARATOR)
        if len(joined) == len(pieces):
            return joined
        return [self._normalizer.normalize_str(piece) for piece in pieces]  # a piece holds the separator
