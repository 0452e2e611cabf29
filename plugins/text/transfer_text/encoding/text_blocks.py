"""Many texts: worked on in blocks, known by their digest, and kept on disk once numericalised where that pays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

BLOCK_TEXTS = 1024
"""Texts that are worked on at a time: what is written piece by piece takes no memory beyond that."""
WORTH_KEEPING_CHARACTERS = 4_000_000
"""Shorter collections of texts are numericalised in a moment, and not kept on disk."""


def blocks(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts, some at a time."""
    for start in range(0, len(texts), BLOCK_TEXTS):
        yield list(texts[start : start + BLOCK_TEXTS])


def worth_keeping(texts: Sequence[str]) -> bool:
    """Say whether what is found out about these texts is worth a place on disk."""
    seen = 0
    for block in blocks(texts):
        seen += sum(map(len, block))
        if seen >= WORTH_KEEPING_CHARACTERS:
            return True
    return False


def digest_of(texts: Sequence[str]) -> str:
    """Return the digest of some texts in their order."""
    digest = hashlib.sha256(np.fromiter(map(len, texts), dtype="<i8", count=len(texts)).tobytes())
    for block in blocks(texts):
        digest.update("".join(block).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
