"""From a text to the word indices that a backbone takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer import DataError, Preprocessing
from transfer_text.vocabulary import PADDING, Vocabulary


class TextPreprocessing(Preprocessing):
    """Tokenize, numericalise, cut to a length; pad to the longest of the batch.

    Args:
        vocabulary: The words and their indices, with the tokenizer.
        max_length: Tokens after so many are dropped; None keeps all.
    """

    encode_once: ClassVar[bool] = True

    def __init__(self, vocabulary: Vocabulary, max_length: int | None) -> None:
        self.vocabulary = vocabulary
        self.max_length = max_length

    def encode(self, values: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Return the word indices of each text, int32 (T,).

        Raises:
            ValueError: A text is empty, blank, or nothing but markup.
        """
        encoded = self.vocabulary.encode(values, self.max_length)
        for text, indices in zip(values, encoded, strict=True):
            if not len(indices):
                what = f"no word in {text[:60]!r}" if text.strip() else "no text: it is empty or blank"
                raise ValueError(f"there is {what}")
        return encoded

    def collate(self, encoded: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """Return the word indices of a batch, int64 (B, T), with index 0 after the end of the shorter texts."""
        batch = np.full((len(encoded), max(map(len, encoded))), PADDING, dtype=np.int64)
        for row, indices in zip(batch, encoded, strict=True):
            row[: len(indices)] = indices
        return torch.from_numpy(batch)

    def length(self, encoded: npt.NDArray[np.int32]) -> int:
        """Return the number of tokens."""
        return len(encoded)

    def read(self, source: str) -> str:
        """Return the content of the file at ``source``, or ``source`` itself where there is no such file."""
        if not os.path.isfile(source):  # unlike Path.is_file, this takes a text that is too long for a path
            return source
        try:
            return Path(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the text cannot be read: {error}", where=source, fix="give a text file in UTF-8"
            ) from error

    def example(self) -> str:
        """Return a short text."""
        return "An example of a text that is longer than any kernel is wide."

    def describe(self) -> Mapping[str, Any]:
        """Return the size and digest of the vocabulary, and the longest length."""
        return {
            "vocabulary_size": len(self.vocabulary),
            "vocabulary_sha256": self.vocabulary.digest,
            "max_length": self.max_length,
        }
