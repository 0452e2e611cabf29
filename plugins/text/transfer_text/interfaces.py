"""Contracts for plugins of the text plugin: tokenizers, word vectors, and preprocessing into tokens.

A package registers a subclass of :class:`Tokenizer` or :class:`Vectors` by an entry point in the group
``transfer.tokenizers`` or ``transfer.vectors``; a notebook uses ``@transfer.register("tokenizer", NAME)`` or
``@transfer.register("vectors", NAME)``. A config then sets ``tokenizer: NAME`` or ``tokenizer: NAME/ARGUMENT``, and
``vectors`` likewise.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from transfer import ConfigError, DataError, Occlusion, Preprocessing
from transfer_text.encoding.encoded_texts import EncodedTexts as EncodedTexts  # for plugins
from transfer_text.encoding.tokenization import UNSPACED

PAIR_SEPARATOR = " [SEP] "
"""Separator between the texts of several columns in one example: visible, so that it can be typed for a prediction."""

# Units of an explanation: tags, entities, characters of scripts without blanks between words, words with their hyphens
# and apostrophes, runs of punctuation.
_MARKUP = r"</?\w+\s*/?>|&#?\w+;"
_UNSPACED = rf"[{UNSPACED}](?:(?!\w)[{UNSPACED}])*"  # `\w` does not match vowel signs, which follow their character
_WORD = rf"[^\W{UNSPACED}]+"
_PIECE = re.compile(
    rf"{_MARKUP}|['\u2019](?:s|re|ve|ll|d|m)\b|{_UNSPACED}|{_WORD}(?:[-'\u2019]{_WORD})*"
    rf"|(?:(?!{_MARKUP})[^\w\s{UNSPACED}])+",
    re.IGNORECASE,
)
_PATH = re.compile(r"(?:~|\.{1,2})?/\S*/\S+|(?:~|\.{1,2})/\S+|\S+\.txt")
"""Strings that can only be paths of files."""
MAX_TEXTS_SAMPLED = 1_000
"""Number of texts of a split whose unknown tokens are counted."""
MAX_UNKNOWN_FRACTION = 0.5
"""Fraction of unknown tokens up to which there is no warning."""


class TokenPreprocessing(Preprocessing):
    """Base class of preprocessing of texts into tokens: reading raw texts, and leaving out words for explanations.

    A subclass defines :meth:`encode` and :meth:`collate`. Encoded texts are one-dimensional; :class:`EncodedTexts`
    stores millions of them in two arrays.
    """

    encode_once: ClassVar[bool] = True

    @abstractmethod
    def tokenize(self, text: str) -> Sequence[str]:
        """Return the tokens of one text as strings."""

    def count_unknown(self, texts: Sequence[str]) -> tuple[int, int]:
        """Return the numbers of unknown tokens and of all tokens in texts; by default, no token is unknown."""
        return 0, 0

    def warning(self, values: Sequence[str]) -> str | None:
        """Return a warning if most tokens of a sample of texts are unknown, otherwise None."""
        step = -(-len(values) // MAX_TEXTS_SAMPLED) or 1
        unknown, total = self.count_unknown([values[index] for index in range(0, len(values), step)])
        if unknown <= MAX_UNKNOWN_FRACTION * total:
            return None
        return (
            f"{unknown / total:.0%} of the tokens of these texts are unknown ({unknown:,} of {total:,}), and all "
            "unknown tokens are the same to the model; add training texts, or choose another tokenizer, such as "
            "multilingual for languages that are written without blanks between words"
        )

    def length(self, encoded: Any) -> int:
        """Return the number of tokens."""
        return len(encoded)

    def read(self, source: str) -> str:
        """Return the content of the file at ``source``, or ``source`` itself if it is not a path.

        Raises:
            transfer.DataError: The file does not exist or cannot be read.
        """
        if not os.path.isfile(source):  # unlike Path.is_file, this accepts a text that is too long for a path
            if os.sep in source and source.strip("./") and os.path.isdir(source):
                raise DataError(
                    "this is a folder: expected a text or a file", where=source, fix="use a pattern: 'FOLDER/*.txt'"
                )
            if _PATH.fullmatch(source):
                raise DataError("the text file does not exist", where=source, fix="check the path, or give a text")
            return source
        try:
            return Path(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the text cannot be read: {error}", where=source, fix="use a text file in UTF-8"
            ) from error

    def read_bytes(self, content: bytes) -> str:
        """Decode a text from UTF-8."""
        return content.decode("utf-8-sig")

    def read_value(self, source: Any) -> str:
        """Return the string itself, or the content of the file at a ``pathlib.Path``."""
        value = super().read_value(source)
        if not isinstance(value, str):
            raise ValueError(f"expected a text, got {type(value).__name__}")
        return value

    def occlusions(self, value: str) -> Iterator[Occlusion]:
        """Yield each word and run of punctuation, with the characters up to the next one, and the text without it."""
        matches = list(_PIECE.finditer(value))
        starts = [0, *(match.start() for match in matches[1:]), len(value)]
        tokens = [len(self.tokenize(match.group())) for match in matches]
        for index, match in enumerate(matches):
            # A blank replaces the word, so that its neighbors do not join.
            rest = f"{value[: match.start()]} {value[match.end() :]}" if sum(tokens) > tokens[index] else None
            yield Occlusion(value[starts[index] : starts[index + 1]], rest)

    def render_batch(
        self, inputs: Any, values: Sequence[str], captions: Sequence[str], groups: Mapping[str, Sequence[int]]
    ) -> str:
        """Return the tokens of each text of a batch, under the heading of its group."""
        return render_tokens([self.tokenize(value) for value in values], captions, groups)

    def example(self) -> str:
        """Return a short text."""
        return "An example of a text that is longer than any kernel is wide."


def render_tokens(tokens: Sequence[Sequence[str]], captions: Sequence[str], groups: Mapping[str, Sequence[int]]) -> str:
    """Return the tokens of each text of a batch as lines, each below its caption and under the heading of its group."""
    lines = []
    for heading, indices in groups.items():
        lines += [heading, ""]
        for index in indices:
            lines += [" | ".join(captions[index].split("\n")), f"    {' '.join(tokens[index])}", ""]
    return "\n".join(lines)


class _NamedSource:
    """A plugin that a config names, with an optional argument: ``NAME/ARGUMENT``.

    Args:
        argument: Text after the slash; empty if there is none.
    """

    def __init__(self, argument: str = "") -> None:
        if argument:
            raise ConfigError(f"{type(self).__name__} takes no argument, got {argument!r}", fix="remove it")


class Tokenizer(_NamedSource, ABC):
    """A tokenizer of texts.

    A trained model contains the vocabulary, the name of the tokenizer and the version of its package. The package must
    be installed to predict with the model. Objects are small and picklable: loader processes get a copy.
    """

    @abstractmethod
    def tokenize(self, text: str) -> Sequence[str]:
        """Return the tokens of one text. They depend only on the text and the argument."""

    def vocabulary(self, texts: Iterable[Sequence[str]], *, min_frequency: int, max_size: int | None) -> Sequence[str]:
        """Return the words of the vocabulary in the order of their indices.

        By default words are ordered by frequency, then alphabetically.

        Args:
            texts: Tokens of each text of the training split; iterate over them once.
            min_frequency: Minimum number of occurrences of a word.
            max_size: Maximum number of words. None returns all.
        """
        counts: Counter[str] = Counter()
        for tokens in texts:
            counts.update(tokens)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return [word for word in ranked if counts[word] >= min_frequency][:max_size]


@dataclass(frozen=True)
class WordVectors:
    """The vectors of some words.

    Args:
        matrix: Vectors, float32 (V, D), one row per word; zeros for words without a vector.
        found: Whether each word has a vector, bool (V,).
    """

    matrix: npt.NDArray[np.float32]
    found: npt.NDArray[np.bool_]


class Vectors(_NamedSource, ABC):
    """A source of word vectors. The constructor reads only its argument."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of a vector, D; available without reading all vectors and without a download."""

    @abstractmethod
    def read(self, words: Sequence[str]) -> WordVectors:
        """Find (or download) the vectors and return those of exactly these words.

        The caller requests other spellings itself.

        Raises:
            transfer.WeightsError: The vectors are missing or damaged; the message states the expected path.
        """

    def words(self) -> Sequence[str]:
        """Return all words that have a vector; by default none, as for a source that computes vectors of any word."""
        return ()
