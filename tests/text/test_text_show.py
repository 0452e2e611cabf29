"""Texts as the model sees them."""

from __future__ import annotations

import pytest

from transfer_text.encoding.encoded_texts import Truncation
from transfer_text.encoding.preprocessing import TextPreprocessing
from transfer_text.encoding.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(["a b c d e f"])


def shown(text: str, max_length: int | None = None, truncation: Truncation = "head") -> list[str]:
    preprocessing = TextPreprocessing(VOCABULARY, max_length, truncation)
    inputs = preprocessing.model_inputs(preprocessing.encode([text, "a"]))
    return preprocessing.render_batch(inputs, [text, "a"], ["true: x\nsaid: y", "z"], {"heading": [0, 1]}).splitlines()


def test_unknown_words_are_marked_without_padding() -> None:
    lines = shown("a zebra b")
    assert lines[:6] == ["heading", "", "true: x | said: y", "    a <unk> b", "", "z"]
    assert lines[6] == "    a"
    assert lines[-1] == "3 tokens at most; 33% of the batch is padding"


@pytest.mark.parametrize(
    ("truncation", "seen"),
    [("head", "a b c [3 tokens cut]"), ("tail", "[3 tokens cut] d e f"), ("both", "a b [3 tokens cut] f")],
)
def test_what_is_cut_is_marked_where_it_was(truncation: Truncation, seen: str) -> None:
    assert shown("a b c d e f", 3, truncation)[3] == f"    {seen}"
