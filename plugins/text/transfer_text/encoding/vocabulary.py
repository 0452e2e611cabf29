"""Vocabularies: built from the training texts, or read from a tokenizer file."""

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
from transfer_text.encoding.parallel import encode_in_parallel
from transfer_text.encoding.token_cache import PieceTable
from transfer_text.encoding.token_finder import TokenFinder
from transfer_text.encoding.tokenization import (
    AUTO,
    TOKENIZERS,
    TokenizerName,
    assemble,
    name_of,
    tokenizer_for,
    with_safe_whitespace,
)
from transfer_text.encoding.vocabulary_builder import VocabularyCounts, count_words
from transfer_text.plugins import names

__all__ = ["MIN_FREQUENCY", "PADDING", "TOKENIZERS", "UNKNOWN", "TokenizerName", "Vocabulary"]

# No tokenizer returns a token with a blank, so these two cannot occur in a text.
PADDING_TOKEN = "< padding >"  # noqa: S105
UNKNOWN_TOKEN = "< unknown >"  # noqa: S105
SPECIAL = (PADDING_TOKEN, UNKNOWN_TOKEN)
PADDING = 0
UNKNOWN = 1

MIN_FREQUENCY = 1

FORMAT = 1
MIN_CACHED_WORDS = 50_000
"""The check whether words are single tokens is cached on disk from this number of words on."""


class Vocabulary:
    """Words, their indices and the tokenizer; serialized as one JSON string.

    Index 0 is padding, and index 1 is the unknown word. The words of a built vocabulary follow by frequency, then
    alphabetically. The tokens of a tokenizer file follow in their order: index ``id + 2``.

    Args:
        tokenizer: Tokenizer of the ``tokenizers`` library. If its first two tokens are the special tokens, its ids are
            the indices.
        counts: Number of occurrences of each token in the training texts, int64 (V,). None if unknown.
        lengths: Number of tokens of each training text, int64 (N,). None if unknown.
        extra: How many of its words, the last ones, are not from the training texts (see :meth:`extended`).
    """

    placeholder_note: str = ""
    """Description of the vocabulary if this one is a placeholder (:meth:`nominal`); empty otherwise."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        counts: npt.NDArray[np.int64] | None = None,
        lengths: npt.NDArray[np.int64] | None = None,
        extra: int = 0,
    ) -> None:
        special_ids = [tokenizer.token_to_id(token) for token in SPECIAL]
        if special_ids not in ([PADDING, UNKNOWN], [None, None]):
            raise ValueError(f"a vocabulary starts with {PADDING_TOKEN!r} and {UNKNOWN_TOKEN!r}")
        tokenizer.no_truncation()  # a tokenizer file may set it, but the options of the backbone decide
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._shift = 0 if special_ids[0] == PADDING else len(SPECIAL)
        self._table: PieceTable | None = None
        self.counts = counts
        self.lengths = lengths
        self.extra = extra

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        tokenizer: str = "glove",
        *,
        min_frequency: int = MIN_FREQUENCY,
        max_size: int | None = None,
    ) -> Vocabulary:
        """Build the vocabulary of texts; the result is cached on disk.

        Args:
            texts: Texts of the training split only.
            tokenizer: One of :data:`TOKENIZERS`, ``auto`` (the one that :func:`tokenizer_for` chooses), or the path of
                a ``tokenizer.json`` with its own vocabulary.
            min_frequency: Minimum number of occurrences of a word; rarer words are unknown.
            max_size: Maximum number of words, without padding and the unknown word.

        Raises:
            transfer.ConfigError: The tokenizer does not exist, or its vocabulary is fixed and cannot be limited.
            transfer.DataError: No word is left.
        """
        name = tokenizer_for(texts) if tokenizer == AUTO else _name(tokenizer)
        if name is None:
            # Options without an effect are errors, so that nobody trusts them.
            if min_frequency != MIN_FREQUENCY or max_size is not None:
                raise ConfigError(
                    f"{tokenizer} has a fixed vocabulary: min_frequency and max_size do not apply",
                    fix="remove them, or choose a named tokenizer",
                )
            vocabulary = cls(_read(tokenizer))
            encoded = vocabulary.encode(texts)
            vocabulary.lengths = encoded.lengths
            vocabulary.counts = np.bincount(encoded.indices, minlength=len(vocabulary))
            return vocabulary
        if not text_blocks.worth_caching(texts):
            return cls._of(count_words(texts, name, min_frequency, max_size, None), name)
        made: list[Vocabulary] = []
        # Computed once: it is part of the keys of the vocabulary and of the encoded texts.
        texts_digest = text_blocks.digest_of(texts)

        def write(folder: Path) -> None:
            with (folder / "numbers").open("wb") as numbers:
                counted = count_words(texts, name, min_frequency, max_size, numbers)
            vocabulary = cls._of(counted, name)
            made.append(vocabulary)
            vocabulary._keep(folder / "numbers", counted, texts_digest)
            (folder / "vocabulary.json").write_text(vocabulary.to_json(), encoding="utf-8")
            np.savez(folder / "counts.npz", counts=vocabulary.counts, lengths=counted.lengths)  # type: ignore[arg-type]

        settings = [FORMAT, tokenizer_config(name), min_frequency, max_size]
        folder = cache.entry("vocabulary", cache.digest(settings, texts_digest), write)
        if made:
            return made[0]
        if folder is not None:
            try:
                text = (folder / "vocabulary.json").read_text(encoding="utf-8")
                with (folder / "counts.npz").open("rb") as file:
                    arrays = np.load(file, allow_pickle=False)
                    return cls(Tokenizer.from_str(text), arrays["counts"], arrays["lengths"])
            except Exception:  # the library raises this base class for any damage; the entry is replaced
                cache.drop(folder)
        return cls._of(count_words(texts, name, min_frequency, max_size, None), name)

    @classmethod
    def _of(cls, counted: VocabularyCounts, name: TokenizerName) -> Vocabulary:
        tokens = {token: index for index, token in enumerate((*SPECIAL, *counted.words))}
        counts = np.concatenate([[0, counted.rest], counted.occurrences]).astype(np.int64)
        tokenizer = assemble(name, models.WordLevel(tokens, unk_token=UNKNOWN_TOKEN))
        vocabulary = cls(tokenizer, counts, counted.lengths)
        # Other splits contain mostly the same pieces, which are already in this table.
        vocabulary._table = counted.table
        vocabulary._table.map(_indices(counted.ranks))
        vocabulary._table.set_tokenizer(vocabulary._indices_of)
        return vocabulary

    def _keep(self, numbers: Path, counted: VocabularyCounts, texts_digest: str) -> None:
        """Cache the encoded training texts for :meth:`encode`, from the local ids that were written while counting."""
        indices = _indices(counted.ranks)

        def blocks() -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
            with numbers.open("rb") as file:
                for start in range(0, len(counted.lengths), text_blocks.BLOCK_TEXTS):
                    sizes = counted.lengths[start : start + text_blocks.BLOCK_TEXTS]
                    yield indices[np.fromfile(file, dtype="<i4", count=int(sizes.sum()))], sizes

        cache.entry("encoded", self._key(texts_digest), lambda folder: EncodedTexts.write(folder, blocks()))
        numbers.unlink()

    @classmethod
    def nominal(cls, tokenizer: str = "glove") -> Vocabulary:
        """Return a placeholder vocabulary to build a model without data: one word, or that of a tokenizer file.

        Raises:
            transfer.ConfigError: The tokenizer does not exist.
        """
        name = "glove" if tokenizer == AUTO else _name(tokenizer)
        if name is None:
            return cls(_read(tokenizer))
        tokens = {PADDING_TOKEN: PADDING, UNKNOWN_TOKEN: UNKNOWN, "the": 2}
        vocabulary = cls(assemble(name, models.WordLevel(tokens, unk_token=UNKNOWN_TOKEN)))
        vocabulary.placeholder_note = "learned from the training texts"
        return vocabulary

    @classmethod
    def from_json(cls, text: str, extra: int = 0) -> Vocabulary:
        """Return the vocabulary that :meth:`to_json` wrote; counts, lengths and ``extra`` are not part of it."""
        return cls(Tokenizer.from_str(text), extra=extra)

    def to_json(self) -> str:
        """Return the vocabulary as one JSON string that the ``tokenizers`` library can read."""
        return str(self._tokenizer.to_str())

    def extended(self, words: Sequence[str]) -> Vocabulary:
        """Return this vocabulary with extra words after its own, with counts of 0: those that texts can spell.

        Words that training never saw, but word vectors know, keep their vectors in prediction.

        Raises:
            transfer.ConfigError: The vocabulary of a tokenizer file is fixed.
        """
        if self.tokenizer_name is None:
            raise ConfigError(
                "the vocabulary of a tokenizer file is fixed: no words can be added",
                fix="remove vectors_vocabulary, or choose a named tokenizer",
            )
        own = dict(zip(self.tokens, range(len(self)), strict=True))
        possible = [word for word in dict.fromkeys(words) if word not in own and "\n" not in word]
        spelled = self._spelled(possible)
        for word, is_spelled in zip(possible, spelled, strict=True):
            if is_spelled:
                own[word] = len(own)
        tokenizer = assemble(self.tokenizer_name, models.WordLevel(own, unk_token=UNKNOWN_TOKEN))
        counts = None if self.counts is None else np.pad(self.counts, (0, len(own) - len(self)))
        extended = Vocabulary(tokenizer, counts, self.lengths, self.extra + len(own) - len(self))
        if self._table is not None and self.counts is not None and not self.counts[UNKNOWN]:
            # The training texts contain none of the extra words, so the indices of their pieces stay valid.
            extended._table, self._table = self._table, None
            extended._table.set_tokenizer(extended._indices_of)
        return extended

    def _spelled(self, words: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return whether the tokenizer returns each word as one token, bool (N,)."""
        made: list[npt.NDArray[np.bool_]] = []

        def spell() -> npt.NDArray[np.bool_]:
            assert self.tokenizer_name is not None
            tokens, sizes = TokenFinder(self.tokenizer_name).find(words)
            firsts = np.cumsum(sizes) - sizes
            same = (size == 1 and tokens[first] == word for word, first, size in zip(words, firsts, sizes, strict=True))
            return np.fromiter(same, dtype=np.bool_, count=len(words))

        def write(folder: Path) -> None:
            made.append(spell())
            np.save(folder / "spelled.npy", made[0])

        if len(words) < MIN_CACHED_WORDS:
            return spell()
        assert self.tokenizer_name is not None
        folder = cache.entry(
            "spelled", cache.digest(FORMAT, tokenizer_config(self.tokenizer_name), text_blocks.digest_of(words)), write
        )
        if made:
            return made[0]
        if folder is not None:
            try:
                spelled: npt.NDArray[np.bool_] = np.load(folder / "spelled.npy", allow_pickle=False)
                if spelled.shape == (len(words),):
                    return spelled
            except (OSError, ValueError, EOFError):
                pass
            cache.drop(folder)
        return spell()

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        """Tokens in the order of their indices, the two special tokens first."""
        indices: Mapping[str, int] = self._tokenizer.get_vocab()
        tokens = [""] * (max(indices.values(), default=-1) + 1)  # ids of a tokenizer file may have gaps
        for token, index in indices.items():
            tokens[index] = token
        return tuple(tokens) if not self._shift else (*SPECIAL, *tokens)

    @functools.cached_property
    def unknown(self) -> int:
        """Index of unknown words: :data:`UNKNOWN`, or that of a tokenizer file's own unknown token."""
        token = getattr(self._tokenizer.model, "unk_token", None)
        index = self._tokenizer.token_to_id(token) if token is not None else None
        return UNKNOWN if index is None else int(index) + self._shift

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 digest of :meth:`to_json`, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of one text, including unknown words."""
        if self._shift:
            return list(self._tokenizer.encode(text, add_special_tokens=False).tokens)
        normalize, pre_tokenize = self._rules
        return [token for token, _ in pre_tokenize(normalize(text))]

    @functools.cached_property
    def _rules(self) -> tuple[Callable[[str], str], Callable[[str], list[tuple[str, tuple[int, int]]]]]:
        normalizer = self._tokenizer.normalizer  # each access creates a new object
        return str if normalizer is None else normalizer.normalize_str, self._tokenizer.pre_tokenizer.pre_tokenize_str

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Return the token indices of texts; large collections are cached on disk.

        Args:
            texts: Texts to encode. An empty text returns an empty array.

        Returns:
            The token indices of each text, int32 (T,).

        Raises:
            ValueError: A text contains a lone surrogate.
        """

        def blocks() -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
            if self.tokenizer_name is None:
                return map(self._encode_block, text_blocks.blocks(texts))
            return encode_in_parallel(texts, self.tokenizer_name, self._encode_block, self._look_up)

        if not text_blocks.worth_caching(texts):
            return EncodedTexts.of(blocks())
        key = self._key(text_blocks.digest_of(texts))
        for _ in range(2):  # a damaged entry is replaced once
            folder = cache.entry("encoded", key, lambda folder: EncodedTexts.write(folder, blocks()))
            if folder is None:
                break
            if (encoded := EncodedTexts.read(folder, len(texts))) is not None:
                return encoded
            cache.drop(folder)
        return EncodedTexts.of(blocks())

    def _key(self, texts_digest: str) -> str:
        return cache.digest(FORMAT, self.digest, texts_digest)

    def _encode_block(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return the concatenated token indices of texts, int32 (T,), and the length of each text, int64 (N,)."""
        if self.tokenizer_name is not None:
            if self._table is None:
                self._table = PieceTable(functools.partial(with_safe_whitespace, self.tokenizer_name), self._indices_of)
            return self._table.encode(texts)
        _allow_parallelism()
        encode_batch = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)  # tokenizers >= 0.20
        for text in texts:
            text.encode()  # raises for a lone surrogate, on which the library panics
        ids_of_texts = [encoding.ids for encoding in encode_batch(texts, add_special_tokens=False)]
        flat = np.array([index for ids in ids_of_texts for index in ids], dtype=np.int32) + np.int32(self._shift)
        return flat, np.array([len(ids) for ids in ids_of_texts], dtype=np.int64)

    def _indices_of(self, pieces: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        assert self.tokenizer_name is not None
        tokens, counts = TokenFinder(self.tokenizer_name).find(pieces)
        return self._look_up(tokens), counts

    def _look_up(self, tokens: Sequence[str]) -> npt.NDArray[np.int32]:
        unknown = itertools.repeat(UNKNOWN)
        return np.fromiter(map(self._index.get, tokens, unknown), dtype=np.int32, count=len(tokens))

    @functools.cached_property
    def _index(self) -> Mapping[str, int]:
        index: Mapping[str, int] = self._tokenizer.get_vocab()
        return index

    @functools.cached_property
    def tokenizer_name(self) -> TokenizerName | None:
        """Name of the tokenizer; None for a tokenizer file."""
        return None if self._shift else name_of(json.loads(self.to_json()))

    def cache_state(self) -> Any:
        """Return everything that determines the encoded texts, for the key of the feature cache."""
        return {"digest": self.digest, "extra": self.extra}

    def __getstate__(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("counts", "lengths", "extra")}
        return {"json": self.to_json(), **plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Vocabulary.__init__(self, Tokenizer.from_str(state.pop("json")), **state)


def _name(tokenizer: str) -> TokenizerName | None:
    """Return the name of a tokenizer, or None for the path of a file."""
    for name in TOKENIZERS:
        if tokenizer == name:
            return name
    if tokenizer.endswith(".json"):
        return None
    available = (AUTO, *TOKENIZERS, *names("tokenizer"))
    close = difflib.get_close_matches(tokenizer, available, n=1)
    raise ConfigError(
        f"unknown tokenizer {tokenizer!r}",
        available=(*available, "PATH/tokenizer.json"),
        fix=f"did you mean {close[0]!r}?" if close else "use one of these names, or the path of a tokenizer.json",
    )


def _read(written: str) -> Tokenizer:
    path = Path(written).expanduser()
    if not path.is_file():
        path = find_file(written) or path
    fix = "use a tokenizer.json of the tokenizers library"
    if not path.is_file():
        raise ConfigError("the tokenizer file does not exist", where=str(path), available=TOKENIZERS, fix=fix)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises this base class
        raise ConfigError(f"the tokenizer cannot be read: {error}", where=str(path), fix=fix) from error


def tokenizer_config(name: TokenizerName) -> str:
    """Return the JSON of a named tokenizer: all settings that determine its tokens."""
    return str(assemble(name, models.WordLevel({UNKNOWN_TOKEN: 0}, unk_token=UNKNOWN_TOKEN)).to_str())


def _indices(ranks: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Map ranks to vocabulary indices; tokens outside the vocabulary become unknown."""
    return np.where(ranks < 0, np.int32(UNKNOWN), ranks + np.int32(len(SPECIAL)))


def _allow_parallelism() -> None:
    """Set the variable without which the tokenizers library prints a warning in every forked process.

    The thread pool of the library would hang in a forked process.
    """
    if "TOKENIZERS_PARALLELISM" not in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))
