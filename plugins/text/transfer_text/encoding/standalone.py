"""Preprocessing of a text with only NumPy and the tokenizers library. Exports contain a copy of this file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer


def prepare(value: str, settings: Mapping[str, Any], folder: Path) -> npt.NDArray[np.int64]:
    """Return the model's input for a text: word indices, int64 (1, T).

    Args:
        value: The text.
        settings: Settings of the preprocessing in ``model.json``.
        folder: Folder of the export, which contains the vocabulary.
    """
    tokenizer = Tokenizer.from_file(str(folder / "vocabulary.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # 0 is padding and 1 the unknown word; the tokens of a tokenizer without these two follow them.
    shift = 0 if tokenizer.token_to_id("< padding >") == 0 else 2
    indices = [token + shift for token in tokenizer.encode(value, add_special_tokens=False).ids]
    limit, truncation = settings["max_length"], settings["truncation"]
    if limit is not None and len(indices) > limit:
        first = {"head": limit, "tail": 0, "both": (limit + 1) // 2}[truncation]
        indices = indices[:first] + indices[len(indices) - (limit - first) :]
    if not indices:
        raise ValueError(f"the text contains no word: {value!r}")
    return np.array([indices], np.int64)
