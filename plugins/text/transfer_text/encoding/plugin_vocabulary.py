"""Vocabulary of a tokenizer plugin, and the choice of the vocabulary class for a config."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Library, models

from transfer import DataError, FileSchema, PluginError, install_hint
from transfer_text.encoding.vocabulary import MIN_FREQUENCY, SPECIAL, UNKNOWN, UNKNOWN_TOKEN, Vocabulary
from transfer_text.interfaces import Tokenizer
from transfer_text.plugins import is_plugin, make_tokenizer, requirement


def vocabulary_class(tokenizer: str) -> type[Vocabulary]:
    """Return the vocabulary class of a tokenizer, given by its name in a config."""
    return PluginVocabulary if is_plugin("tokenizer", tokenizer) else Vocabulary


def read_vocabulary(text: str, extra: int = 0) -> Vocabulary:
    """Return the vocabulary that its ``to_json`` wrote, with so many extra words at its end.

    Raises:
        transfer.PluginError: The package of the tokenizer is not installed.
    """
    return (PluginVocabulary if re.match(r'\s*\{\s*"plugin"', text) else Vocabulary).from_json(text, extra)


class _SavedTokenizer(FileSchema):
    tokenizer: str
    requirement: str


class _SavedVocabulary(FileSchema):
    plugin: _SavedTokenizer
    words: list[str]


class PluginVocabulary(Vocabulary):
    """Words and their indices, with a tokenizer plugin; serialized as one JSON string with the name of the plugin.

    Args:
        written: Name of the tokenizer in a config, with its argument.
        requirement: Pip requirement of the tokenizer's package.
        tokenizer: The tokenizer.
        words: Words in the order of their indices, without the special tokens.
        counts, lengths, extra: Counts, lengths and number of additional words; see :class:`Vocabulary`.
    """

    def __init__(
        self,
        written: str,
        requirement: str,
        tokenizer: Tokenizer,
        words: Iterable[str],
        counts: npt.NDArray[np.int64] | None = None,
        lengths: npt.NDArray[np.int64] | None = None,
        extra: int = 0,
    ) -> None:
        indices = {token: index for index, token in enumerate((*SPECIAL, *words))}
        super().__init__(Library(models.WordLevel(indices, unk_token=UNKNOWN_TOKEN)), counts, lengths, extra)
        self.written = written
        self.requirement = requirement
        self._plugin = tokenizer

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        tokenizer: str = "glove",
        *,
        min_frequency: int = MIN_FREQUENCY,
        max_size: int | None = None,
    ) -> PluginVocabulary:
        """Build the vocabulary of the training texts with the tokenizer.

        Raises:
            transfer.PluginError: The tokenizer cannot be loaded or violates its contract.
            transfer.DataError: No word is left.
        """
        made = make_tokenizer(tokenizer)
        counted: Counter[str] = Counter()
        lengths = []

        def tokenized() -> Iterator[Sequence[str]]:
            for text in texts:
                tokens = made.tokenize(text)
                counted.update(tokens)
                lengths.append(len(tokens))
                yield tokens

        reading = tokenized()
        words = list(made.vocabulary(reading, min_frequency=min_frequency, max_size=max_size))
        deque(reading, maxlen=0)  # a fixed vocabulary has not read the texts; their tokens are counted here
        # The tokenizer is code of another package: a duplicate would shift the indices of all words after it.
        if len(set(words)) < len(words) or not set(SPECIAL).isdisjoint(words):
            raise PluginError(
                f"the vocabulary of tokenizer {tokenizer!r} contains a duplicate word or one of {SPECIAL}",
                fix=f"report it to the authors of {requirement('tokenizer', tokenizer)}",
            )
        if not words:
            raise DataError(
                f"no word occurs {min_frequency} times or more in the {len(texts)} training texts",
                fix="set min_frequency: 1, or check that the texts are not empty",
            )
        of_words = [counted[word] for word in words]
        counts = np.array([0, counted.total() - sum(of_words), *of_words], dtype=np.int64)
        package = requirement("tokenizer", tokenizer)
        return cls(tokenizer, package, made, words, counts, np.array(lengths, dtype=np.int64))

    @classmethod
    def nominal(cls, tokenizer: str = "glove") -> PluginVocabulary:
        """Return a placeholder vocabulary of one word, to build a model without data.

        Raises:
            transfer.PluginError: The tokenizer cannot be loaded.
        """
        vocabulary = cls(tokenizer, requirement("tokenizer", tokenizer), make_tokenizer(tokenizer), ["the"])
        vocabulary.placeholder_note = "learned from the training texts"
        return vocabulary

    @classmethod
    def from_json(cls, text: str, extra: int = 0) -> PluginVocabulary:
        """Return the vocabulary that :meth:`to_json` wrote.

        Raises:
            transfer.PluginError: The tokenizer cannot be loaded here; the message says what to install.
        """
        content = _SavedVocabulary.model_validate_json(text)
        written, package = content.plugin.tokenizer, content.plugin.requirement
        try:
            return cls(written, package, make_tokenizer(written), content.words, extra=extra)
        except PluginError as error:
            fix = install_hint(package, "register it first, as where it was trained")
            raise PluginError.of([replace(problem, fix=fix) for problem in error.problems]) from error

    def cache_state(self) -> Any:
        """Return everything that determines the encoded texts; the tokenizer counts by its code and attributes."""
        return {**super().cache_state(), "tokenizer": self._plugin}

    def to_json(self) -> str:
        """Return the vocabulary and the name of the tokenizer as one JSON string."""
        plugin = {"tokenizer": self.written, "requirement": self.requirement}
        return json.dumps({"plugin": plugin, "words": self.tokens[len(SPECIAL) :]}, ensure_ascii=False)

    def extended(self, words: Sequence[str]) -> PluginVocabulary:
        """Return this vocabulary with extra words after its own: those that texts can spell."""
        present = self.tokens[len(SPECIAL) :]
        taken = {*SPECIAL, *present}
        more = [w for w in dict.fromkeys(words) if w not in taken and list(self.tokenize(w)) == [w]]
        counts = None if self.counts is None else np.pad(self.counts, (0, len(more)))
        source = (self.written, self.requirement, self._plugin)
        return PluginVocabulary(*source, [*present, *more], counts, self.lengths, self.extra + len(more))

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of one text."""
        return list(self._plugin.tokenize(text))

    def _encode_block(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        ids_of_texts = [[self._words.get(token, UNKNOWN) for token in self._plugin.tokenize(text)] for text in texts]
        flat = np.array([index for indices in ids_of_texts for index in indices], dtype=np.int32)
        return flat, np.array([len(indices) for indices in ids_of_texts], dtype=np.int64)

    @cached_property
    def _words(self) -> Mapping[str, int]:
        """Index of each word, without special tokens: a text that contains their spelling does not mean them."""
        return {word: index for index, word in enumerate(self.tokens) if index >= len(SPECIAL)}

    def __getstate__(self) -> dict[str, Any]:
        source = (self.written, self.requirement, self._plugin, self.tokens[len(SPECIAL) :])
        return {"arguments": (*source, self.counts, self.lengths, self.extra)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PluginVocabulary.__init__(self, *state["arguments"])
