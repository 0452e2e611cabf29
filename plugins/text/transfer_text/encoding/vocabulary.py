"""From texts to word indices: a vocabulary learned from the training texts, or one that a tokenizer file brings."""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models

from transfer import ConfigError, find_file
from transfer_text import cache
from transfer_text.encoding import text_blocks
from transfer_text.encoding.encoded_texts import EncodedTexts
from transfer_text.encoding.parallel import numericalised
from transfer_text.encoding.token_cache import PieceTable
from transfer_text.encoding.token_finder import TokenFinder
from transfer_text.encoding.tokenization import TOKENIZERS, TokenizerName, assemble, name_of, parted_by_blanks
from transfer_text.encoding.vocabulary_builder import Learned, learn
from transfer_text.plugins import names

__all__ = ["MIN_FREQUENCY", "PADDING", "TOKENIZERS", "UNKNOWN", "TokenizerName", "Vocabulary"]

# No tokenizer gives a token with a blank in it, so no text can spell these two.
PADDING_TOKEN = "< padding >"  # noqa: S105
UNKNOWN_TOKEN = "< unknown >"  # noqa: S105
SPECIAL = (PADDING_TOKEN, UNKNOWN_TOKEN)
PADDING = 0
UNKNOWN = 1

MIN_FREQUENCY = 1

FORMAT = 1
WORTH_KEEPING_WORDS = 50_000
"""Whether fewer words can be spelled is found out every time."""


class Vocabulary:
    """Words and their indices, with the tokenizer that finds the words; one JSON string says it all.

    Index 0 is padding and 1 any unknown word. A learned vocabulary goes on with its words by frequency, then
    alphabetically; that of a tokenizer file with the file's own tokens in their order: index ``id + 2``.

    Args:
        tokenizer: A learned one, whose first two tokens are the special ones, or any other.
        counts: How often the training texts hold each token, int64 (V,); None where that is not known.
        lengths: The number of tokens of each training text, int64 (N,); None where that is not known.
        further: How many of its words, the last ones, are not from the training texts (see :meth:`extended`).
    """

    to_come: str = ""
    """What is to be learned, where this stands in for it (:meth:`nominal`)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        counts: npt.NDArray[np.int64] | None = None,
        lengths: npt.NDArray[np.int64] | None = None,
        further: int = 0,
    ) -> None:
        places = [tokenizer.token_to_id(token) for token in SPECIAL]
        if places not in ([PADDING, UNKNOWN], [None, None]):
            raise ValueError(f"a learned vocabulary begins with {PADDING_TOKEN!r} and {UNKNOWN_TOKEN!r}")
        tokenizer.no_truncation()  # a tokenizer file may say so, but the backbone's options do
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._shift = 0 if places[0] == PADDING else len(SPECIAL)
        self._table: PieceTable | None = None
        self.counts = counts
        self.lengths = lengths
        self.further = further

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        tokenizer: str = "glove",
        *,
        min_frequency: int = MIN_FREQUENCY,
        max_size: int | None = None,
    ) -> Vocabulary:
        """Learn the vocabulary of some texts; the same texts are learned from once and remembered on disk.

        Args:
            texts: The texts of the training split, and no others.
            tokenizer: One of :data:`TOKENIZERS`, or the path of a ``tokenizer.json``, which brings its vocabulary.
            min_frequency: Words that occur less often are unknown.
            max_size: The most words to keep, besides padding and the unknown word.

        Raises:
            transfer.ConfigError: There is no such tokenizer, or its vocabulary is fixed and was to be cut.
            transfer.DataError: No word is left.
        """
        name = _name(tokenizer)
        if name is None:
            if min_frequency != MIN_FREQUENCY or max_size is not None:
                raise ConfigError(
                    f"{tokenizer} brings its own vocabulary, which min_frequency and max_size cannot cut",
                    fix="leave them out, or choose a tokenizer by its name",
                )
            vocabulary = cls(_read(tokenizer))
            encoded = vocabulary.encode(texts)
            vocabulary.lengths = encoded.lengths
            vocabulary.counts = np.bincount(encoded.indices, minlength=len(vocabulary))
            return vocabulary
        if not text_blocks.worth_keeping(texts):
            return cls._of(learn(texts, name, min_frequency, max_size, None), name)
        made: list[Vocabulary] = []
        texts_digest = text_blocks.digest_of(texts)

        def write(folder: Path) -> None:
            with (folder / "numbers").open("wb") as numbers:
                learned = learn(texts, name, min_frequency, max_size, numbers)
            vocabulary = cls._of(learned, name)
            made.append(vocabulary)
            vocabulary._keep(folder / "numbers", learned, texts_digest)
            (folder / "vocabulary.json").write_text(vocabulary.to_json(), encoding="utf-8")
            np.savez(folder / "counts.npz", counts=vocabulary.counts, lengths=learned.lengths)  # type: ignore[arg-type]

        settings = [FORMAT, learned_by(name), min_frequency, max_size]
        folder = cache.entry("vocabulary", cache.digest(settings, texts_digest), write)
        if made:
            return made[0]
        if folder is not None:
            try:
                text = (folder / "vocabulary.json").read_text(encoding="utf-8")
                with (folder / "counts.npz").open("rb") as file:
                    arrays = np.load(file, allow_pickle=False)
                    return cls(Tokenizer.from_str(text), arrays["counts"], arrays["lengths"])
            except Exception:  # whatever is wrong with an entry (the library raises this very class), it is made again
                cache.drop(folder)
        return cls._of(learn(texts, name, min_frequency, max_size, None), name)

    @classmethod
    def _of(cls, learned: Learned, name: TokenizerName) -> Vocabulary:
        tokens = {token: index for index, token in enumerate((*SPECIAL, *learned.words))}
        counts = np.concatenate([[0, learned.rest], learned.occurrences]).astype(np.int64)
        tokenizer = assemble(name, models.WordLevel(tokens, unk_token=UNKNOWN_TOKEN))
        vocabulary = cls(tokenizer, counts, learned.lengths)
        # Other splits hold much the same pieces, whose tokens are known by now.
        vocabulary._table = learned.table
        vocabulary._table.map(_indices(learned.ranks))
        vocabulary._table.then(vocabulary._indices_of)
        return vocabulary

    def _keep(self, numbers: Path, learned: Learned, texts_digest: str) -> None:
        """Keep the training texts, whose tokens were numbered as they were met, for :meth:`encode`."""
        indices = _indices(learned.ranks)

        def parts() -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
            with numbers.open("rb") as file:
                for first in range(0, len(learned.lengths), text_blocks.BLOCK_TEXTS):
                    sizes = learned.lengths[first : first + text_blocks.BLOCK_TEXTS]
                    yield indices[np.fromfile(file, dtype="<i4", count=int(sizes.sum()))], sizes

        cache.entry("encoded", self._key(texts_digest), lambda folder: EncodedTexts.write(folder, parts()))
        numbers.unlink()

    @classmethod
    def nominal(cls, tokenizer: str = "glove") -> Vocabulary:
        """Return a vocabulary for building a model before there is data: of one word, or that of a tokenizer file.

        Raises:
            transfer.ConfigError: There is no such tokenizer.
        """
        name = _name(tokenizer)
        if name is None:
            return cls(_read(tokenizer))
        tokens = {PADDING_TOKEN: PADDING, UNKNOWN_TOKEN: UNKNOWN, "the": 2}
        vocabulary = cls(assemble(name, models.WordLevel(tokens, unk_token=UNKNOWN_TOKEN)))
        vocabulary.to_come = "learned from the training texts"
        return vocabulary

    @classmethod
    def from_json(cls, text: str, further: int = 0) -> Vocabulary:
        """Return the vocabulary that :meth:`to_json` wrote; counts, lengths and ``further`` are not part of it."""
        return cls(Tokenizer.from_str(text), further=further)

    def to_json(self) -> str:
        """Return all of it as one JSON string, which the ``tokenizers`` library also reads."""
        return str(self._tokenizer.to_str())

    def extended(self, words: Sequence[str]) -> Vocabulary:
        """Return this vocabulary with further words after its own, with counts of 0: those that texts can spell.

        Words that training never saw, but word vectors know, keep their vectors in prediction.

        Raises:
            transfer.ConfigError: A tokenizer file brings the vocabulary, which is fixed.
        """
        if self._name is None:
            raise ConfigError(
                "the tokenizer file brings its own vocabulary, to which no words can be added",
                fix="leave vectors_vocabulary out, or choose a tokenizer by its name",
            )
        own = dict(zip(self.tokens, range(len(self)), strict=True))
        possible = [word for word in dict.fromkeys(words) if word not in own and "\n" not in word]
        spelled = self._spelled(possible)
        for word, is_spelled in zip(possible, spelled, strict=True):
            if is_spelled:
                own[word] = len(own)
        tokenizer = assemble(self._name, models.WordLevel(own, unk_token=UNKNOWN_TOKEN))
        counts = None if self.counts is None else np.pad(self.counts, (0, len(own) - len(self)))
        extended = Vocabulary(tokenizer, counts, self.lengths, self.further + len(own) - len(self))
        if self._table is not None and self.counts is not None and not self.counts[UNKNOWN]:
            # The training texts hold none of the further words: what their pieces hold is known.
            extended._table, self._table = self._table, None
            extended._table.then(extended._indices_of)
        return extended

    def _spelled(self, words: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return which words the tokenizer gives back as one token, bool (N,)."""
        made: list[npt.NDArray[np.bool_]] = []

        def spell() -> npt.NDArray[np.bool_]:
            assert self._name is not None
            tokens, sizes = TokenFinder(self._name).find(words)
            firsts = np.cumsum(sizes) - sizes
            same = (size == 1 and tokens[first] == word for word, first, size in zip(words, firsts, sizes, strict=True))
            return np.fromiter(same, dtype=np.bool_, count=len(words))

        def write(folder: Path) -> None:
            made.append(spell())
            np.save(folder / "spelled.npy", made[0])

        if len(words) < WORTH_KEEPING_WORDS:
            return spell()
        assert self._name is not None
        folder = cache.entry(
            "spelled", cache.digest(FORMAT, learned_by(self._name), text_blocks.digest_of(words)), write
        )
        if made:
            return made[0]
        if folder is not None:
            try:
                kept: npt.NDArray[np.bool_] = np.load(folder / "spelled.npy", allow_pickle=False)
                if kept.shape == (len(words),):
                    return kept
            except (OSError, ValueError, EOFError):
                pass
            cache.drop(folder)
        return spell()

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        """Every token in the order of the indices, the two special ones first."""
        indices: Mapping[str, int] = self._tokenizer.get_vocab()
        tokens = [""] * (max(indices.values(), default=-1) + 1)  # the ids of a tokenizer file may have gaps
        for token, index in indices.items():
            tokens[index] = token
        return tuple(tokens) if not self._shift else (*SPECIAL, *tokens)

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of :meth:`to_json`, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of one text as the tokenizer finds them, known or not."""
        if self._shift:
            return list(self._tokenizer.encode(text, add_special_tokens=False).tokens)
        normalize, pre_tokenize = self._rules
        return [token for token, _ in pre_tokenize(normalize(text))]

    @functools.cached_property
    def _rules(self) -> tuple[Callable[[str], str], Callable[[str], list[tuple[str, tuple[int, int]]]]]:
        normalizer = self._tokenizer.normalizer  # each of these makes a new object
        return str if normalizer is None else normalizer.normalize_str, self._tokenizer.pre_tokenizer.pre_tokenize_str

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Tokenize and numericalise some texts; many texts are worked on once and then read from disk.

        Args:
            texts: The texts; an empty one gives an empty array.

        Returns:
            For each text the indices of its tokens, int32 (T,).

        Raises:
            ValueError: A text holds half a surrogate pair.
        """

        def parts() -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
            if self._name is None:
                return map(self._numericalise, text_blocks.blocks(texts))
            return numericalised(texts, self._name, self._numericalise, self._look_up)

        if not text_blocks.worth_keeping(texts):
            return EncodedTexts.of(parts())
        key = self._key(text_blocks.digest_of(texts))
        for _ in range(2):  # an entry that is damaged is made again
            folder = cache.entry("encoded", key, lambda folder: EncodedTexts.write(folder, parts()))
            if folder is None:
                break
            if (encoded := EncodedTexts.read(folder, len(texts))) is not None:
                return encoded
            cache.drop(folder)
        return EncodedTexts.of(parts())

    def _key(self, texts_digest: str) -> str:
        return cache.digest(FORMAT, self.digest, texts_digest)

    def _numericalise(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return the indices of all texts in a row, and the number of each text's."""
        if self._name is not None:
            if self._table is None:
                self._table = PieceTable(functools.partial(parted_by_blanks, self._name), self._indices_of)
            return self._table.numericalise(texts)
        _allow_parallelism()
        encode_batch = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)  # tokenizers >= 0.20
        for text in texts:
            text.encode()  # the library would panic, not say that this is no text
        found = [encoding.ids for encoding in encode_batch(texts, add_special_tokens=False)]
        flat = np.array([index for ids in found for index in ids], dtype=np.int32) + np.int32(self._shift)
        return flat, np.array([len(ids) for ids in found], dtype=np.int64)

    def _indices_of(self, pieces: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        assert self._name is not None
        tokens, counts = TokenFinder(self._name).find(pieces)
        return self._look_up(tokens), counts

    def _look_up(self, tokens: Sequence[str]) -> npt.NDArray[np.int32]:
        unknown = itertools.repeat(UNKNOWN)
        return np.fromiter(map(self._index.get, tokens, unknown), dtype=np.int32, count=len(tokens))

    @functools.cached_property
    def _index(self) -> Mapping[str, int]:
        index: Mapping[str, int] = self._tokenizer.get_vocab()
        return index

    @functools.cached_property
    def _name(self) -> TokenizerName | None:
        """Which of the named tokenizers this is, if any."""
        return None if self._shift else name_of(json.loads(self.to_json()))

    def cache_state(self) -> Any:
        """Return everything that determines the encoded texts, for the key of the feature cache."""
        return {"digest": self.digest, "further": self.further}

    def __getstate__(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("counts", "lengths", "further")}
        return {"json": self.to_json(), **plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Vocabulary.__init__(self, Tokenizer.from_str(state.pop("json")), **state)


def _name(tokenizer: str) -> TokenizerName | None:
    """Return the name of a tokenizer; None where it is the path of a file."""
    for name in TOKENIZERS:
        if tokenizer == name:
            return name
    if tokenizer.endswith(".json"):
        return None
    known = (*TOKENIZERS, *names("tokenizer"))
    close = difflib.get_close_matches(tokenizer, known, n=1)
    raise ConfigError(
        f"there is no tokenizer {tokenizer!r}",
        available=(*known, "PATH/tokenizer.json"),
        fix=f"did you mean {close[0]!r}?" if close else "give one of these names, or the path of a tokenizer.json",
    )


def _read(written: str) -> Tokenizer:
    path = Path(written).expanduser()
    if not path.is_file():
        path = find_file(written) or path
    fix = "give a tokenizer.json as the tokenizers library writes it"
    if not path.is_file():
        raise ConfigError("there is no such tokenizer file", where=str(path), available=TOKENIZERS, fix=fix)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises this very class
        raise ConfigError(f"the tokenizer cannot be read: {error}", where=str(path), fix=fix) from error


def learned_by(name: TokenizerName) -> str:
    """Return what decides the tokens that a named tokenizer finds: its JSON."""
    return str(assemble(name, models.WordLevel({UNKNOWN_TOKEN: 0}, unk_token=UNKNOWN_TOKEN)).to_str())


def _indices(ranks: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return the index of each token that was met in training."""
    return np.where(ranks < 0, np.int32(UNKNOWN), ranks + np.int32(len(SPECIAL)))


def _allow_parallelism() -> None:
    """Keep the tokenizers library from printing a warning in every process forked later.

    It warns unless the variable is set, and its thread pool would hang in a forked process.
    """
    if "TOKENIZERS_PARALLELISM" not in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))
