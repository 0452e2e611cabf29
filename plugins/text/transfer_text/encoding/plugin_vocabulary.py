"""The vocabulary of a tokenizer that another package brings, and which vocabulary it is that a config asks for."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Library
from tokenizers import models

from transfer import DataError, PluginError
from transfer_text.encoding.vocabulary import MIN_FREQUENCY, SPECIAL, UNKNOWN, UNKNOWN_TOKEN, Vocabulary
from transfer_text.interfaces import Tokenizer
from transfer_text.plugins import is_plugin, make_tokenizer, requirement


def vocabulary_class(tokenizer: str) -> type[Vocabulary]:
    """Return the class of vocabulary that goes with a tokenizer, as a config writes it."""
    return PluginVocabulary if is_plugin("tokenizer", tokenizer) else Vocabulary


def read_vocabulary(text: str, further: int = 0) -> Vocabulary:
    """Return the vocabulary that its ``to_json`` wrote, with so many further words at its end.

    Raises:
        transfer.PluginError: Its tokenizer is of a package that is not installed here.
    """
    return (PluginVocabulary if re.match(r'\s*\{\s*"plugin"', text) else Vocabulary).from_json(text, further)


class PluginVocabulary(Vocabulary):
    """Words and their indices, with a tokenizer that a package brings; one JSON string says which, and holds the words.

    Args:
        written: The tokenizer as a config names it.
        requirement: What pip is to install to have it.
        tokenizer: The tokenizer itself.
        words: In the order of the indices, without the special ones.
        counts, lengths, further: As of any vocabulary.
    """

    def __init__(
        self,
        written: str,
        requirement: str,
        tokenizer: Tokenizer,
        words: Iterable[str],
        counts: npt.NDArray[np.int64] | None = None,
        lengths: npt.NDArray[np.int64] | None = None,
        further: int = 0,
    ) -> None:
        indices = {token: index for index, token in enumerate((*SPECIAL, *words))}
        super().__init__(Library(models.WordLevel(indices, unk_token=UNKNOWN_TOKEN)), counts, lengths, further)
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
        """Let the tokenizer learn the vocabulary of the training texts.

        Raises:
            transfer.PluginError: The tokenizer cannot be loaded, or does not keep its contract.
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
        deque(reading, maxlen=0)  # a vocabulary that is fixed has looked at none of them
        if len(set(words)) < len(words) or not set(SPECIAL).isdisjoint(words):
            raise PluginError(
                f"the vocabulary of tokenizer {tokenizer!r} holds a word twice, or one of {SPECIAL}",
                fix=f"report it to whoever wrote {requirement('tokenizer', tokenizer)}",
            )
        if not words:
            raise DataError(
                f"no word occurs {min_frequency} times or more in the {len(texts)} training texts",
                fix="set min_frequency: 1, or check that the texts are not empty",
            )
        known = [counted[word] for word in words]
        counts = np.array([0, counted.total() - sum(known), *known], dtype=np.int64)
        package = requirement("tokenizer", tokenizer)
        return cls(tokenizer, package, made, words, counts, np.array(lengths, dtype=np.int64))

    @classmethod
    def nominal(cls, tokenizer: str = "glove") -> PluginVocabulary:
        """Return a vocabulary of one word, for building a model before there is data.

        Raises:
            transfer.PluginError: The tokenizer cannot be loaded here.
        """
        vocabulary = cls(tokenizer, requirement("tokenizer", tokenizer), make_tokenizer(tokenizer), ["the"])
        vocabulary.to_come = "learned from the training texts"
        return vocabulary

    @classmethod
    def from_json(cls, text: str, further: int = 0) -> PluginVocabulary:
        """Return the vocabulary that :meth:`to_json` wrote.

        Raises:
            transfer.PluginError: The tokenizer cannot be loaded here; the message says what to install.
        """
        content = json.loads(text)
        written, package = content["plugin"]["tokenizer"], content["plugin"]["requirement"]
        try:
            return cls(written, package, make_tokenizer(written), content["words"], further=further)
        except PluginError as error:
            fix = f"pip install {shlex.quote(package)}" if package else "register it first, as where it was trained"
            raise PluginError.of([replace(problem, fix=fix) for problem in error.problems]) from error

    def cache_state(self) -> Any:
        """Return everything that determines the encoded texts; the tokenizer counts by its code and attributes."""
        return {**super().cache_state(), "tokenizer": self._plugin}

    def to_json(self) -> str:
        """Return all of it but the tokenizer's code as one JSON string."""
        plugin = {"tokenizer": self.written, "requirement": self.requirement}
        return json.dumps({"plugin": plugin, "words": self.tokens[len(SPECIAL) :]}, ensure_ascii=False)

    def extended(self, words: Sequence[str]) -> PluginVocabulary:
        """Return this vocabulary with further words after its own: those that texts can spell."""
        own = self.tokens[len(SPECIAL) :]
        known = {*SPECIAL, *own}
        more = [w for w in dict.fromkeys(words) if w not in known and list(self.tokenize(w)) == [w]]
        counts = None if self.counts is None else np.pad(self.counts, (0, len(more)))
        source = (self.written, self.requirement, self._plugin)
        return PluginVocabulary(*source, [*own, *more], counts, self.lengths, self.further + len(more))

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of one text."""
        return list(self._plugin.tokenize(text))

    def _numericalise(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        found = [[self._words.get(token, UNKNOWN) for token in self._plugin.tokenize(text)] for text in texts]
        flat = np.array([index for indices in found for index in indices], dtype=np.int32)
        return flat, np.array([len(indices) for indices in found], dtype=np.int64)

    @cached_property
    def _words(self) -> Mapping[str, int]:
        """The index of each word; a text that spells a special token does not mean it."""
        return {word: index for index, word in enumerate(self.tokens) if index >= len(SPECIAL)}

    def __getstate__(self) -> dict[str, Any]:
        source = (self.written, self.requirement, self._plugin, self.tokens[len(SPECIAL) :])
        return {"arguments": (*source, self.counts, self.lengths, self.further)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PluginVocabulary.__init__(self, *state["arguments"])
