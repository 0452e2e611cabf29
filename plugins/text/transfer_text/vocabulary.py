"""From texts to word indices: tokenizers by name, and a vocabulary learned from the training texts."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from transfer import DataError

TokenizerName = Literal["glove", "basic_english", "whitespace"]
TOKENIZERS: tuple[TokenizerName, ...] = get_args(TokenizerName)

# No tokenizer gives a token with a blank in it, so no text can spell these two.
PADDING_TOKEN = "< padding >"  # noqa: S105
UNKNOWN_TOKEN = "< unknown >"  # noqa: S105
PADDING = 0
UNKNOWN = 1

MIN_FREQUENCY = 1

# An encoding with its offsets takes a hundred times the memory of its indices, so they live a chunk at a time.
CHUNK_TEXTS = 1024


class Vocabulary:
    """Words and their indices, with the tokenizer that finds the words; one JSON string says it all.

    Index 0 is padding, 1 any unknown word; the words follow by frequency, then alphabetically.

    Args:
        tokenizer: A word-level tokenizer with its normalizer and pre-tokenizer.
        counts: How often the training texts hold each token, int64 (V,); None where that is not known.
    """

    def __init__(self, tokenizer: Tokenizer, counts: npt.NDArray[np.int64] | None = None) -> None:
        if tokenizer.token_to_id(PADDING_TOKEN) != PADDING or tokenizer.token_to_id(UNKNOWN_TOKEN) != UNKNOWN:
            raise ValueError(f"a vocabulary begins with {PADDING_TOKEN!r} and {UNKNOWN_TOKEN!r}")
        self._tokenizer = tokenizer
        self.counts = counts

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        tokenizer: TokenizerName = "glove",
        *,
        min_frequency: int = MIN_FREQUENCY,
        max_size: int | None = None,
    ) -> Vocabulary:
        """Learn the vocabulary of some texts.

        Args:
            texts: The texts of the training split, and no others.
            tokenizer: One of :data:`TOKENIZERS`.
            min_frequency: Words that occur less often are unknown.
            max_size: The most words to keep, besides padding and the unknown word.

        Raises:
            transfer.DataError: No word is left.
        """
        counter = _assemble(tokenizer, models.WordLevel({UNKNOWN_TOKEN: 0}, unk_token=UNKNOWN_TOKEN))
        trainer = trainers.WordLevelTrainer(min_frequency=0, special_tokens=[], show_progress=False)
        _allow_parallelism()
        counter.train_from_iterator(_chunks(texts), trainer)
        # The trainer counts in parallel but keeps the counts to itself, except when pickled.
        occurrences: Mapping[str, int] = json.loads(trainer.__getstate__())["WordLevelTrainer"]["words"]
        frequent = [word for word, count in occurrences.items() if count >= min_frequency]
        words = sorted(frequent, key=lambda word: (-occurrences[word], word))[:max_size]
        if not words:
            raise DataError(
                f"no word occurs {min_frequency} times or more in the {len(texts)} training texts",
                fix="set min_frequency: 1, or check that the texts are not empty",
            )
        unknown = sum(occurrences.values()) - sum(occurrences[word] for word in words)
        tokens = {token: index for index, token in enumerate((PADDING_TOKEN, UNKNOWN_TOKEN, *words))}
        counts = np.array([0, unknown, *(occurrences[word] for word in words)], dtype=np.int64)
        return cls(_assemble(tokenizer, models.WordLevel(tokens, unk_token=UNKNOWN_TOKEN)), counts)

    @classmethod
    def nominal(cls, tokenizer: TokenizerName = "glove") -> Vocabulary:
        """Return a vocabulary of one word, for building a model before there is data."""
        tokens = {PADDING_TOKEN: PADDING, UNKNOWN_TOKEN: UNKNOWN, "the": 2}
        return cls(_assemble(tokenizer, models.WordLevel(tokens, unk_token=UNKNOWN_TOKEN)))

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Return the vocabulary that :meth:`to_json` wrote; the counts are not part of it."""
        return cls(Tokenizer.from_str(text))

    def to_json(self) -> str:
        """Return all of it as one JSON string, which the ``tokenizers`` library also reads."""
        return str(self._tokenizer.to_str())

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        """Every token in the order of the indices, the two special ones first."""
        indices: Mapping[str, int] = self._tokenizer.get_vocab()
        return tuple(sorted(indices, key=indices.__getitem__))

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of :meth:`to_json`, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of one text as the tokenizer finds them, known or not."""
        normalizer = self._tokenizer.normalizer
        normalized = text if normalizer is None else normalizer.normalize_str(text)
        return [token for token, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[npt.NDArray[np.int32]]:
        """Tokenize and numericalise some texts, in parallel.

        Args:
            texts: The texts; an empty one gives an empty array.
            max_length: Tokens after so many are dropped.

        Returns:
            For each text the indices of its tokens, int32 (T,).
        """
        _allow_parallelism()
        encode_batch = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)  # tokenizers >= 0.20
        return [
            np.array(encoding.ids[:max_length], dtype=np.int32)
            for chunk in _chunks(texts)
            for encoding in encode_batch(chunk, add_special_tokens=False)
        ]


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), CHUNK_TEXTS):
        yield list(texts[start : start + CHUNK_TEXTS])


def _allow_parallelism() -> None:
    """Keep the tokenizers library from printing a warning in every process forked later.

    It warns unless the variable is set, and its thread pool would hang in a forked process.
    """
    if "TOKENIZERS_PARALLELISM" not in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


# --------------------------------------------------------------------------------------------------------- tokenizers


def _assemble(name: TokenizerName, model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if name == "glove":
        tokenizer.normalizer = _web_text()
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_GLOVE_TOKEN), behavior="removed", invert=True)
    elif name == "basic_english":
        tokenizer.normalizer = _basic_english()
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif name == "whitespace":  # for text that is tokenized already: nothing but blanks counts
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        raise ValueError(f"there is no tokenizer called {name!r}; there are {', '.join(TOKENIZERS)}")
    return tokenizer


# The conventions of the Stanford tokenizer, which GloVe's own text went through, after lower-casing. The first
# alternative that matches counts.
_GLOVE_TOKEN = "|".join(
    (
        r"n't\b",
        r"'(?:s|re|ve|ll|d|m|em)\b",
        r"\p{L}+?(?=n't\b)",  # do n't, ca n't
        r"(?:mr|mrs|ms|dr|st|jr|sr|prof|gen|lt|sgt|capt|gov|sen|rep|rev|inc|corp|co|ltd|bros|vs)\.(?!\.)",
        r"(?:jan|feb|aug|sept|oct|nov|dec)\.(?!\.)",
        r"(?:\p{L}\.){2,}",  # u.s.
        r"\p{N}+(?:[.,:]\p{N}+)+",  # 1,000 and 3.5
        # Hyphens and the apostrophe of o'brien stay within a word; that of a clitic does not.
        r"[\p{L}\p{M}\p{N}_]+(?:(?:-|'(?!(?:s|re|ve|ll|d|m)\b))[\p{L}\p{M}\p{N}_]+)*",
        r"\.{2,}",
        r"-{2,}",
        r"\S",
    )
)


def _web_text() -> normalizers.Normalizer:
    """Lower-case and undo what the web does to text: tags, entities, typographic marks and their Windows codes.

    Of the entities the common ones become their characters; any other becomes a blank.
    """
    return normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"</?(?:br|p|i|b|u|em|strong|hr|div|span|ul|ol|li)\s*/?>"), " "),
            normalizers.Replace("&amp;", "&"),
            normalizers.Replace("&lt;", "<"),
            normalizers.Replace("&gt;", ">"),
            normalizers.Replace(Regex("[\u2018\u2019\u0091\u0092\u00b4`]|&(?:#0?39|#821[67]|apos|[lr]squo);"), "'"),
            normalizers.Replace(
                Regex("[\u201c\u201d\u201e\u0093\u0094\u00ab\u00bb]|''|&(?:#34|#822[01]|quot|[lr]dquo);"), '"'
            ),
            normalizers.Replace(Regex(r"\.{3,}|[\u2026\u0085]|&(?:#8230|hellip);"), "..."),
            normalizers.Replace(Regex(r"-{2,}|[\u2014\u0097]|&(?:#8212|mdash);"), "--"),
            normalizers.Replace(Regex("[\u2013\u0096]|&(?:#8211|ndash);"), "-"),
            normalizers.Replace(Regex(r"&(?:#\d{2,6}|#x[0-9a-f]{2,5}|[a-z]{2,8}\d?);"), " "),
        ]
    )


def _basic_english() -> normalizers.Normalizer:
    """Follow torchtext's ``basic_english`` to the letter, which leaves entities as they are."""
    return normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace("'", " ' "),
            normalizers.Replace('"', ""),
            normalizers.Replace(".", " . "),
            normalizers.Replace("<br />", " "),
            normalizers.Replace(",", " , "),
            normalizers.Replace("(", " ( "),
            normalizers.Replace(")", " ) "),
            normalizers.Replace("!", " ! "),
            normalizers.Replace("?", " ? "),
            normalizers.Replace(Regex("[;:]"), " "),
        ]
    )
