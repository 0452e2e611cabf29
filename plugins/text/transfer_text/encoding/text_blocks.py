"""Collections of texts: processing in blocks, digests, and whether caching them on disk pays off."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

BLOCK_TEXTS = 1024
"""Texts that are processed at a time; memory use is bounded by one block."""
MIN_CACHED_CHARACTERS = 4_000_000
"""Shorter collections of texts are not cached on disk: encoding them takes less than a second."""


def blocks(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts in blocks of up to ``BLOCK_TEXTS``."""
    for start in range(0, len(texts), BLOCK_TEXTS):
        yield list(texts[start : start + BLOCK_TEXTS])


def worth_caching(texts: Sequence[str]) -> bool:
    """Return whether the encoded texts are worth caching on disk."""
    characters = 0
    for block in blocks(texts):
        characters += sum(map(len, block))
        if characters >= MIN_CACHED_CHARACTERS:
            return True
    return False


def digest_of(texts: Sequence[str]) -> str:
    """Return the SHA-256 digest of texts and their order."""
    digest = hashlib.sha256(np.fromiter(map(len, texts), dtype="<i8", count=len(texts)).tobytes())
    for block in blocks(texts):
        digest.update("".join(block).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
