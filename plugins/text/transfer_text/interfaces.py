"""The contracts of what another package may bring to backbones over words: tokenizers and word vectors.

A package registers a subclass by an entry point in the group ``transfer.tokenizers`` or ``transfer.vectors``, a
notebook by ``@transfer.register("tokenizer", NAME)`` or ``@transfer.register("vectors", NAME)``. A config then says
``tokenizer: NAME`` or ``tokenizer: NAME/ARGUMENT``, and the same of ``vectors``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transfer import ConfigError


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
