"""Preprocessing of texts into word indices."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer_text.encoding import standalone
from transfer_text.encoding.encoded_texts import EncodedTexts, Truncation
from transfer_text.encoding.vocabulary import PADDING, Vocabulary
from transfer_text.interfaces import TokenPreprocessing, render_tokens

UNKNOWN_MARK = "<unk>"
MIN_BUCKET = 8
"""Length in tokens to which shorter batches are padded on a GPU."""


def bucket_length(length: int, max_length: int | None = None) -> int:
    """Return the length in tokens to which a batch is padded on a GPU, at most a quarter longer from 32 tokens on.

    There are four lengths per doubling, at most 20 up to 512 tokens. cuDNN measures its kernels for each new shape, and
    CUDA graphs are recorded for each: few shapes must occur again and again.

    Args:
        length: Number of tokens of the longest text of the batch.
        max_length: Maximum number of tokens of a text, which is a bucket of its own. None: there is none.
    """
    step = max(MIN_BUCKET, (1 << (length - 1).bit_length()) // 8)
    bucket = -(-length // step) * step
    return bucket if max_length is None or length > max_length else min(bucket, max_length)


def padded(indices: Tensor, length: int) -> Tensor:
    """Return word indices (B, T) as int64 (B, length), padded with 0."""
    result = indices.new_full((len(indices), length), PADDING, dtype=torch.int64)
    result[:, : indices.shape[1]] = indices
    return result


class TextPreprocessing(TokenPreprocessing):
    """Tokenization, encoding and truncation of texts; batches are padded to their longest text, on a GPU a bit further.

    Args:
        vocabulary: Vocabulary and tokenizer.
        max_length: Maximum number of tokens per text. None keeps all tokens.
        truncation: Tokens that remain of a longer text: the first (``head``), the last (``tail``), or half from each
            end (``both``). Sun et al. 2019 compare them (https://arxiv.org/abs/1905.05583).
    """

    def __init__(self, vocabulary: Vocabulary, max_length: int | None, truncation: Truncation = "head") -> None:
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.truncation: Truncation = truncation

    def encode(self, values: Sequence[str]) -> EncodedTexts:
        """Return the word indices of each text, int32 (T,), as a sequence over one flat array.

        Raises:
            ValueError: A text is empty, blank, or contains only markup.
        """
        # Truncated on access, so that the cached encoding serves every maximum length.
        encoded = self.vocabulary.encode(values).truncated(self.max_length, self.truncation)
        empty = np.flatnonzero(encoded.lengths == 0)
        if len(empty):
            text = values[int(empty[0])]
            raise ValueError(
                f"the text contains no word: {text[:60]!r}" if text.strip() else "the text is empty or blank"
            )
        return encoded

    def collate(self, encoded: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """Return the word indices of a batch, int32 (B, T), padded with 0."""
        # int32: indices are copied to the device in half the bytes, and become int64 there.
        batch = np.full((len(encoded), max(map(len, encoded))), PADDING, dtype=np.int32)
        for row, indices in zip(batch, encoded, strict=True):
            row[: len(indices)] = indices
        return torch.from_numpy(batch)

    def to_device(self, inputs: Tensor, device: torch.device) -> Tensor:
        """Move word indices to a device, where they become int64 (B, T); half the bytes are copied.

        On a CUDA device, T is rounded up to one of a few lengths (:func:`bucket_length`). Padding changes no result.
        """
        indices = inputs.to(device, non_blocking=device.type == "cuda")
        if device.type != "cuda":
            return indices.long()
        return padded(indices, bucket_length(indices.shape[1], self.max_length))

    def lengths(self, encoded: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each text, int64 (N,)."""
        return encoded.lengths if isinstance(encoded, EncodedTexts) else super().lengths(encoded)

    def unknown_fraction(self, encoded: npt.NDArray[np.int32]) -> float:
        """Return the fraction of the words of a text that are outside the vocabulary."""
        return float((encoded == self.vocabulary.unknown).mean())

    def render_batch(
        self, inputs: Tensor, values: Sequence[str], captions: Sequence[str], groups: Mapping[str, Sequence[int]]
    ) -> str:
        """Return the tokens of a batch, int64 (B, T), as text; unknown words and truncations are marked."""
        lengths = self.vocabulary.encode(values).lengths
        shown = [self._words(row, int(length)) for row, length in zip(inputs, lengths, strict=True)]
        padding = float((inputs == PADDING).float().mean())
        summary = f"{inputs.shape[1]} tokens at most; {padding:.0%} of the batch is padding"
        return f"{render_tokens(shown, captions, groups)}\n{summary}\n"

    def _words(self, indices: Tensor, length: int) -> list[str]:
        unknown = self.vocabulary.unknown
        words = [UNKNOWN_MARK if i == unknown else self.vocabulary.tokens[i] for i in indices.tolist() if i != PADDING]
        # The mark is at the position where tokens were dropped.
        if cut := length - len(words):
            position = {"head": len(words), "tail": 0, "both": (len(words) + 1) // 2}[self.truncation]
            words.insert(position, f"[{cut} tokens cut]")
        return words

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of one text."""
        return self.vocabulary.tokenize(text)

    def count_unknown(self, texts: Sequence[str]) -> tuple[int, int]:
        """Return the numbers of words outside the vocabulary and of all words in texts."""
        indices = self.vocabulary.encode(texts).indices
        return int(np.count_nonzero(indices == self.vocabulary.unknown)), len(indices)

    def standalone_code(self) -> str | None:
        """Return code that needs only NumPy and the tokenizers library; None for a tokenizer of another package."""
        return inspect.getsource(standalone) if type(self.vocabulary) is Vocabulary else None

    def describe(self) -> Mapping[str, Any]:
        """Return the size and digest of the vocabulary, the maximum length and the truncation."""
        vocabulary = {
            "vocabulary_size": len(self.vocabulary),
            "further_words": self.vocabulary.extra,
            "vocabulary_sha256": self.vocabulary.digest,
        }
        cut = {"max_length": self.max_length, "truncation": self.truncation}
        return (
            {"vocabulary": self.vocabulary.placeholder_note} if self.vocabulary.placeholder_note else vocabulary
        ) | cut
