"""The named tokenizers, built with the ``tokenizers`` library: normalization and splitting into tokens."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

TokenizerName = Literal["glove", "multilingual", "basic_english", "whitespace"]
TOKENIZERS: tuple[TokenizerName, ...] = get_args(TokenizerName)
AUTO = "auto"
"""Name in a config for the tokenizer that :func:`tokenizer_for` chooses by the training texts."""

UNSPACED = (
    "\u0e01-\u0e5b\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u1aaf"  # Thai, Lao, Burmese, Khmer, Tai
    "\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff"  # kana, bopomofo
    "\u2e80-\u2fd5\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "\ua9e0-\ua9fe\uaa60-\uaadf\uff66-\uff9f"  # Burmese and Tai extensions, half-width kana
)
"""Characters of scripts without blanks between words: the content of a character class in any regex engine."""
_UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
MIN_UNSPACED_FRACTION = 0.01
"""Fraction of the characters from which texts count as written without blanks: more than a quotation now and then."""
MAX_TEXTS_EXAMINED = 2_000

WEB_TEXT: frozenset[TokenizerName] = frozenset({"glove", "multilingual"})
"""Tokenizers that clean up web text; on ASCII text they are equal."""
TAGS = "br|p|i|b|u|em|strong|hr|div|span|ul|ol|li"


def assemble(name: TokenizerName, model: models.Model) -> Tokenizer:
    """Return the tokenizer of a name with a model."""
    tokenizer = Tokenizer(model)
    if name in WEB_TEXT:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Lowercase(), *_replacing(_WEB_TEXT)]
        )
        pattern = Regex(GLOVE_TOKEN if name == "glove" else MULTILINGUAL_TOKEN)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    elif name == "basic_english":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *_replacing(_BASIC_ENGLISH)])
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:  # for tokenized text: split at whitespace only
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def tokenizer_for(texts: Sequence[str]) -> TokenizerName:
    """Return the tokenizer for texts: ``multilingual`` for scripts without blanks between words, otherwise ``glove``.

    With ``glove``, a sentence in such a script would be a single word that no other text contains.
    """
    characters = unspaced = 0
    for index in range(0, len(texts), max(1, len(texts) // MAX_TEXTS_EXAMINED)):
        text = texts[index]
        characters += len(text)
        if not text.isascii():
            unspaced += len(_UNSPACED_CHARACTER.findall(text))
    return "multilingual" if unspaced > MIN_UNSPACED_FRACTION * characters else "glove"


def with_safe_whitespace(name: TokenizerName, text: str) -> bytes:
    """Return a text as UTF-8 in which every piece between ASCII whitespace can be tokenized independently.

    Tokens of these tokenizers contain no whitespace and do not depend on characters beyond it. The only exception is
    whitespace inside a tag, which is removed here.

    Raises:
        ValueError: The text contains a lone surrogate, which is not a character.
    """
    content = text.encode()
    if name != "whitespace" and b"<" in content:
        if name in WEB_TEXT:
            content = content.replace(b"<br />", b"<br/>")  # almost all tags; `replace` is much faster than the pattern
        content = _BLANK_IN_TAG.sub(rb"<\1\2>", content) if name in WEB_TEXT else _BREAK.sub(b" ", content)
    return content


# Whitespace characters of Unicode, in UTF-8.
_BLANK = rb"(?:\s|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
_BLANK_IN_TAG = re.compile(rb"<(/?(?:" + TAGS.encode() + rb"))" + _BLANK + rb"+(/?)>", re.IGNORECASE)
_BREAK = re.compile(rb"<br />", re.IGNORECASE)


def name_of(settings: Mapping[str, Any]) -> TokenizerName | None:
    """Return the name of a tokenizer of :func:`assemble` from its JSON; None for any other tokenizer."""
    return next((name for name in TOKENIZERS if all(settings.get(k) == v for k, v in _settings(name).items())), None)


@functools.cache
def _settings(name: TokenizerName) -> dict[str, Any]:
    tokenizer = assemble(name, models.WordLevel({"?": 0}, unk_token="?"))  # noqa: S106
    settings: dict[str, Any] = json.loads(tokenizer.to_str())
    return {part: settings[part] for part in ("normalizer", "pre_tokenizer")}


# The conventions of the Stanford tokenizer, which was applied to GloVe's training text, after lower-casing. The first
# alternative that matches is used.
GLOVE_TOKEN = "|".join(
    (
        r"n't\b",
        r"'(?:s|re|ve|ll|d|m|em)\b",
        r"\p{L}+?(?=n't\b)",  # do n't, ca n't
        r"(?:mr|mrs|ms|dr|st|jr|sr|prof|gen|lt|sgt|capt|gov|sen|rep|rev|inc|corp|co|ltd|bros|vs)\.(?!\.)",
        r"(?:jan|feb|aug|sept|oct|nov|dec)\.(?!\.)",
        r"(?:\p{L}\.){2,}",  # u.s.
        r"\p{N}+(?:[.,:]\p{N}+)+",  # 1,000 and 3.5
        # Hyphens and the apostrophe of o'brien are part of a word; the apostrophe of a clitic is not.
        r"[\p{L}\p{M}\p{N}_]+(?:(?:-|'(?!(?:s|re|ve|ll|d|m)\b))[\p{L}\p{M}\p{N}_]+)*",
        r"\.{2,}",
        r"-{2,}",
        r"\S",
    )
)
# Each character with its vowel signs and tone marks is a token, and other words end before such a character.
MULTILINGUAL_TOKEN = rf"[{UNSPACED}]\p{{M}}*|" + GLOVE_TOKEN.replace(r"\p{L}", rf"[\p{{L}}&&[^{UNSPACED}]]").replace(
    r"\b", rf"(?:\b|(?=[{UNSPACED}]))"
)
GLOVE_TOKEN_IN_ASCII = (
    r"[a-zA-Z]++(?![.'\w-])|"  # a word that no other rule changes: the most frequent case first
    + GLOVE_TOKEN.replace(r"[\p{L}\p{M}\p{N}_]", "[a-zA-Z0-9_]")
    .replace(r"\p{L}", "[a-zA-Z]")
    .replace(r"\p{N}", "[0-9]")
)
"""The same pattern for ASCII text in Python's ``re`` module, which has no Unicode property classes."""


# Replacements in order. On ASCII text a pattern has the same matches in Python and in the tokenizers library.
Replacements = tuple[tuple[str | re.Pattern[str], str], ...]

# Clean-up of web text: tags, entities, typographic punctuation and its Windows code points. Common entities are
# replaced by their characters, other entities by a blank.
_WEB_TEXT: Replacements = (
    (re.compile(rf"</?(?:{TAGS})\s*/?>", re.ASCII), " "),
    ("&amp;", "&"),
    ("&lt;", "<"),
    ("&gt;", ">"),
    (re.compile("[\u2018\u2019\u0091\u0092\u00b4`]|&(?:#0?39|#821[67]|apos|[lr]squo);"), "'"),
    (
        re.compile("[\u201c\u201d\u201e\u0093\u0094\u00ab\u00bb]|''|&(?:#34|#822[01]|quot|[lr]dquo);"),
        '"',
    ),
    (re.compile(r"\.{3,}|[\u2026\u0085]|&(?:#8230|hellip);"), "..."),
    (re.compile(r"-{2,}|[\u2014\u0097]|&(?:#8212|mdash);"), "--"),
    (re.compile("[\u2013\u0096]|&(?:#8211|ndash);"), "-"),
    (re.compile(r"&(?:#\d{2,6}|#x[0-9a-f]{2,5}|[a-z]{2,8}\d?);", re.ASCII), " "),
)
# Exactly torchtext's ``basic_english``, which does not replace entities.
_BASIC_ENGLISH: Replacements = (
    ("'", " ' "),
    ('"', ""),
    (".", " . "),
    ("<br />", " "),
    (",", " , "),
    ("(", " ( "),
    (")", " ) "),
    ("!", " ! "),
    ("?", " ? "),
    (re.compile("[;:]"), " "),
)


def _replacing(replacements: Replacements) -> list[normalizers.Normalizer]:
    return [
        normalizers.Replace(what if isinstance(what, str) else Regex(what.pattern), by) for what, by in replacements
    ]


def normalized_ascii(name: TokenizerName, text: str) -> str:
    """Normalize an ASCII text like the named tokenizer, twice as fast as the library."""
    if name == "whitespace":
        return text
    text = text.lower()
    for what, by in _WEB_TEXT if name in WEB_TEXT else _BASIC_ENGLISH:
        text = text.replace(what, by) if isinstance(what, str) else what.sub(by, text)
    return text
