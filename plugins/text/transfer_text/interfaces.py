"""The contracts of what another package may bring to texts: tokenizers, word vectors, a preprocessing into tokens.

A package registers a subclass of the first two by an entry point in the group ``transfer.tokenizers`` or
``transfer.vectors``, a notebook by ``@transfer.register("tokenizer", NAME)`` or ``@transfer.register("vectors",
NAME)``. A config then says ``tokenizer: NAME`` or ``tokenizer: NAME/ARGUMENT``, and the same of ``vectors``.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from transfer import ConfigError, DataError, Occlusion, Preprocessing

# What a reader would take for one: tags, entities, words with what hyphens and apostrophes join, runs of marks.
_MARKUP = r"</?\w+\s*/?>|&#?\w+;"
_PIECE = re.compile(
    rf"{_MARKUP}|['\u2019](?:s|re|ve|ll|d|m)\b|\w+(?:[-'\u2019]\w+)*|(?:(?!{_MARKUP})[^\w\s])+", re.IGNORECASE
)
_PATH = re.compile(r"(?:~|\.{1,2})?/\S*/\S+|(?:~|\.{1,2})/\S+|\S+\.txt")
"""What can only be meant as the path of a file."""


class TokenPreprocessing(Preprocessing):
    """What every preprocessing of texts into tokens does with raw ones: read them, and take out words to explain.

    A subclass defines how texts are encoded and collated. Encoded texts are one-dimensional.
    """

    encode_once: ClassVar[bool] = True

    @abstractmethod
    def tokenize(self, text: str) -> Sequence[str]:
        """Return the tokens of one text, in words."""

    def length(self, encoded: Any) -> int:
        """Return the number of tokens."""
        return len(encoded)

    def read(self, source: str) -> str:
        """Return the content of the file at ``source``, or ``source`` itself where that is no path.

        Raises:
            transfer.DataError: There is no such file, or it cannot be read.
        """
        if not os.path.isfile(source):  # unlike Path.is_file, this takes a text that is too long for a path
            if os.sep in source and source.strip("./") and os.path.isdir(source):
                raise DataError(
                    "this is a folder", where=source, fix="give its texts: a pattern such as 'FOLDER/*.txt'"
                )
            if _PATH.fullmatch(source):
                raise DataError("there is no such text file", where=source, fix="check the path, or give a text")
            return source
        try:
            return Path(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the text cannot be read: {error}", where=source, fix="give a text file in UTF-8"
            ) from error

    def read_bytes(self, content: bytes) -> str:
        """Return the text that is so encoded in UTF-8."""
        return content.decode("utf-8-sig")

    def occlusions(self, value: str) -> Iterator[Occlusion]:
        """Yield the text's words and runs of marks, each with what stands up to the next, and the text without it."""
        found = list(_PIECE.finditer(value))
        begins = [0, *(match.start() for match in found[1:]), len(value)]
        tokens = [len(self.tokenize(match.group())) for match in found]
        for place, match in enumerate(found):
            # A blank in its place keeps its neighbours apart.
            rest = f"{value[: match.start()]} {value[match.end() :]}" if sum(tokens) > tokens[place] else None
            yield Occlusion(value[begins[place] : begins[place + 1]], rest)

    def example(self) -> str:
        """Return a short text."""
        return "An example of a text that is longer than any kernel is wide."


class _Source:
    """What a config names, with what it says behind the name.

    Args:
        argument: What stands behind the slash; empty where nothing does.
    """

    def __init__(self, argument: str = "") -> None:
        if argument:
            raise ConfigError(f"{type(self).__name__} takes no argument, and {argument!r} is one", fix="leave it out")


class Tokenizer(_Source, ABC):
    """Cut texts into tokens.

    A trained model holds the vocabulary, and of the tokenizer its name and its package's version: the package must be
    installed wherever the model predicts. Objects are small and picklable: loader processes get a copy.
    """

    @abstractmethod
    def tokenize(self, text: str) -> Sequence[str]:
        """Return the tokens of one text, which depend on nothing but the text and the argument."""

    def vocabulary(self, texts: Iterable[Sequence[str]], *, min_frequency: int, max_size: int | None) -> Sequence[str]:
        """Return the words to know, in the order of their indices; by default by frequency, then alphabetically.

        Args:
            texts: The tokens of each text of the training split, to be read once.
            min_frequency: Words that occur less often are unknown.
            max_size: The most words to return; None is all.
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
        matrix: float32 (V, D), a row for each word; zeros where the source lacks the word.
        found: bool (V,).
    """

    matrix: npt.NDArray[np.float32]
    found: npt.NDArray[np.bool_]


class Vectors(_Source, ABC):
    """A source of word vectors. Its constructor reads nothing but its argument."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D, the width of a vector: known without reading them all, and without downloading any."""

    @abstractmethod
    def read(self, words: Sequence[str]) -> WordVectors:
        """Find (or download) the vectors, and return those of these very words; other spellings are asked for too.

        Raises:
            transfer.WeightsError: They are missing or broken; the message says which file to put where.
        """

    def words(self) -> Sequence[str]:
        """Return all words that it has vectors of; by default none, as of one that makes a vector for any word."""
        return ()
