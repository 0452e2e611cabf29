"""From a text to the word indices that a backbone takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer_text.encoding.encoded_texts import EncodedTexts, Truncation
from transfer_text.encoding.vocabulary import PADDING, UNKNOWN, Vocabulary
from transfer_text.interfaces import TokenPreprocessing

UNKNOWN_MARK = "<unk>"


class TextPreprocessing(TokenPreprocessing):
    """Tokenize, numericalise, cut to a length; pad to the longest of the batch.

    Args:
        vocabulary: The words and their indices, with the tokenizer.
        max_length: The most tokens of a text that are kept; None keeps all.
        truncation: Which tokens of a longer text are kept: the first (``head``), the last (``tail``), or half from
            each end (``both``), as Sun et al. 2019 compare them (https://arxiv.org/abs/1905.05583).
    """

    def __init__(self, vocabulary: Vocabulary, max_length: int | None, truncation: Truncation = "head") -> None:
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.truncation: Truncation = truncation

    def encode(self, values: Sequence[str]) -> EncodedTexts:
        """Return the word indices of each text, int32 (T,), as a sequence over one flat array.

        Raises:
            ValueError: A text is empty, blank, or nothing but markup.
        """
        encoded = self.vocabulary.encode(values).truncated(self.max_length, self.truncation)
        empty = np.flatnonzero(encoded.lengths == 0)
        if len(empty):
            text = values[int(empty[0])]
            what = f"no word in {text[:60]!r}" if text.strip() else "no text: it is empty or blank"
            raise ValueError(f"there is {what}")
        return encoded

    def collate(self, encoded: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """Return the word indices of a batch, int64 (B, T), with index 0 after the end of the shorter texts."""
        batch = np.full((len(encoded), max(map(len, encoded))), PADDING, dtype=np.int64)
        for row, indices in zip(batch, encoded, strict=True):
            row[: len(indices)] = indices
        return torch.from_numpy(batch)

    def lengths(self, encoded: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each text; those of :meth:`encode` are known without reading any."""
        return encoded.lengths if isinstance(encoded, EncodedTexts) else super().lengths(encoded)

    def render_batch(
        self, inputs: Tensor, values: Sequence[str], captions: Sequence[str], groups: Mapping[str, Sequence[int]]
    ) -> str:
        """Write the tokens of a batch, int64 (B, T), with unknown words and what is cut off marked."""
        lengths = self.vocabulary.encode(values).lengths
        shown = [self._words(row, int(length)) for row, length in zip(inputs, lengths, strict=True)]
        lines = []
        for heading, places in groups.items():
            lines += [heading, ""]
            for place in places:
                lines += [" | ".join(captions[place].split("\n")), f"    {shown[place]}", ""]
        padding = float((inputs == PADDING).float().mean())
        lines.append(f"{inputs.shape[1]} tokens at most; {padding:.0%} of the batch is padding")
        return "\n".join(lines) + "\n"

    def _words(self, indices: Tensor, length: int) -> str:
        words = [UNKNOWN_MARK if i == UNKNOWN else self.vocabulary.tokens[i] for i in indices.tolist() if i != PADDING]
        if cut := length - len(words):
            place = {"head": len(words), "tail": 0, "both": (len(words) + 1) // 2}[self.truncation]
            words.insert(place, f"[{cut} tokens cut]")
        return " ".join(words)

    def tokenize(self, text: str) -> list[str]:
        """Return the words and marks of one text."""
        return self.vocabulary.tokenize(text)

    def describe(self) -> Mapping[str, Any]:
        """Return the size and digest of the vocabulary, the longest length and what is cut."""
        vocabulary = {
            "vocabulary_size": len(self.vocabulary),
            "further_words": self.vocabulary.extra,
            "vocabulary_sha256": self.vocabulary.digest,
        }
        cut = {"max_length": self.max_length, "truncation": self.truncation}
        return (
            {"vocabulary": self.vocabulary.placeholder_note} if self.vocabulary.placeholder_note else vocabulary
        ) | cut
