"""Build a vocabulary: count the tokens of the training texts, rank them by frequency and truncate the ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from transfer import DataError
from transfer_text.encoding.parallel import LocalIds, encode_in_parallel
from transfer_text.encoding.token_cache import PieceTable
from transfer_text.encoding.tokenization import TokenizerName


@dataclass(frozen=True)
class VocabularyCounts:
    """The words of a vocabulary and the counts that it was built from.

    Args:
        words: Tokens in the vocabulary, by descending frequency, then alphabetically.
        occurrences: Number of occurrences of each word, int64 (V,).
        rest: Number of occurrences of all tokens that are not in the vocabulary.
        lengths: Number of tokens of each text, int64 (N,).
        ranks: Index in ``words`` of each distinct token by its local id, int32; -1 for tokens not in the vocabulary.
        table: Pieces of the texts with the local ids of their tokens.
    """

    words: list[str]
    occurrences: npt.NDArray[np.int64]
    rest: int
    lengths: npt.NDArray[np.int64]
    ranks: npt.NDArray[np.int32]
    table: PieceTable


def count_words(
    texts: Sequence[str], name: TokenizerName, min_frequency: int, max_size: int | None, ids_file: IO[bytes] | None
) -> VocabularyCounts:
    """Count the tokens of texts in one pass and select the words of a vocabulary.

    Args:
        texts: The training texts.
        name: Name of the tokenizer.
        min_frequency: Minimum number of occurrences of a word.
        max_size: Maximum number of words. None means no limit.
        ids_file: File that receives the local id of each token, int32, for later mapping to vocabulary indices.

    Raises:
        transfer.DataError: No word is left.
    """
    local_ids = LocalIds(name)
    occurrences = np.zeros(0, dtype=np.int64)
    lengths = []
    for ids, sizes in encode_in_parallel(texts, name, local_ids.table.encode, local_ids.look_up):
        if ids_file is not None:
            ids.astype("<i4", copy=False).tofile(ids_file)
        lengths.append(sizes)
        counts = np.bincount(ids, minlength=len(local_ids.tokens))
        counts[: len(occurrences)] += occurrences
        occurrences = counts
    tokens = list(local_ids.tokens)
    alphabetical = np.array(sorted(range(len(tokens)), key=tokens.__getitem__), dtype=np.int64)
    ranked = alphabetical[np.argsort(-occurrences[alphabetical], kind="stable")]
    selected = ranked[occurrences[ranked] >= min_frequency][:max_size]
    if not len(selected):
        raise DataError(
            f"no word occurs {min_frequency} times or more in the {len(texts)} training texts",
            fix="set min_frequency: 1, or check that the texts are not empty",
        )
    ranks = np.full(len(tokens), -1, dtype=np.int32)
    ranks[selected] = np.arange(len(selected))
    frequencies = occurrences[selected]
    rest = int(occurrences.sum() - frequencies.sum())
    words = [tokens[local_id] for local_id in selected]
    return VocabularyCounts(words, frequencies, rest, np.concatenate(lengths), ranks, local_ids.table)
