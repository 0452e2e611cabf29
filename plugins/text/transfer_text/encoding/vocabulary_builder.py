"""Learn a vocabulary: find the tokens of the training texts, count them, rank and cut them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from transfer import DataError
from transfer_text.encoding.parallel import Numbering, numericalised
from transfer_text.encoding.token_cache import PieceTable
from transfer_text.encoding.tokenization import TokenizerName


@dataclass(frozen=True)
class Learned:
    """What some texts teach.

    Args:
        words: The tokens to keep, by frequency, then alphabetically.
        occurrences: Of each of them, int64.
        rest: Of all others together.
        lengths: The number of tokens of each text, int64 (N,).
        ranks: Where each token that was met, in the order of their numbers, stands in ``words``, int32; -1: nowhere.
        table: The pieces of the texts, with the numbers of their tokens.
    """

    words: list[str]
    occurrences: npt.NDArray[np.int64]
    rest: int
    lengths: npt.NDArray[np.int64]
    ranks: npt.NDArray[np.int32]
    table: PieceTable


def learn(
    texts: Sequence[str], name: TokenizerName, min_frequency: int, max_size: int | None, numbers: IO[bytes] | None
) -> Learned:
    """Read the texts once.

    Args:
        texts: The training texts.
        name: Of the tokenizer.
        min_frequency: Words that occur less often are not kept.
        max_size: The most words to keep.
        numbers: Takes the number of each token of the texts, int32, of whose ranks the texts' indices are made.

    Raises:
        transfer.DataError: No word is left.
    """
    numbering = Numbering(name)
    occurrences = np.zeros(0, dtype=np.int64)
    lengths = []
    for found, sizes in numericalised(texts, name, numbering.table.numericalise, numbering.look_up):
        if numbers is not None:
            found.astype("<i4", copy=False).tofile(numbers)
        lengths.append(sizes)
        counted = np.bincount(found, minlength=len(numbering.met))
        counted[: len(occurrences)] += occurrences
        occurrences = counted
    tokens = list(numbering.met)
    alphabetical = np.array(sorted(range(len(tokens)), key=tokens.__getitem__), dtype=np.int64)
    ranked = alphabetical[np.argsort(-occurrences[alphabetical], kind="stable")]
    kept = ranked[occurrences[ranked] >= min_frequency][:max_size]
    if not len(kept):
        raise DataError(
            f"no word occurs {min_frequency} times or more in the {len(texts)} training texts",
            fix="set min_frequency: 1, or check that the texts are not empty",
        )
    ranks = np.full(len(tokens), -1, dtype=np.int32)
    ranks[kept] = np.arange(len(kept))
    known = occurrences[kept]
    rest = int(occurrences.sum() - known.sum())
    return Learned([tokens[number] for number in kept], known, rest, np.concatenate(lengths), ranks, numbering.table)
