"""Tokenizers and vectors that other packages bring."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Install

import transfer
from transfer import ConfigError, DataError, PluginError, WeightsError
from transfer.registry import entry_points as registry
from transfer_text.encoding.plugin_vocabulary import PluginVocabulary, read_vocabulary, vocabulary_class
from transfer_text.encoding.vocabulary import PADDING, UNKNOWN, Vocabulary
from transfer_text.interfaces import Tokenizer, Vectors, WordVectors
from transfer_text.models.textcnn import TextCNN
from transfer_text.vectors.word_vectors import read_vectors, width_of, words_of

TEXTS = ["a fine film", "a film", "no film"]


class Characters(Tokenizer):
    """Runs of so many characters, blanks included."""

    def __init__(self, argument: str = "3") -> None:
        self.size = int(argument)

    def tokenize(self, text: str) -> list[str]:
        return [text[i : i + self.size] for i in range(max(1, len(text) - self.size + 1))]


class Fixed(Tokenizer):
    """Words as blanks part them, of a vocabulary that was fixed beforehand."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def vocabulary(self, texts: Iterable[Sequence[str]], *, min_frequency: int, max_size: int | None) -> list[str]:
        return ["zebra", "film", "fine"]


class Hashed(Vectors):
    """Random vectors by CRC-32 of the word, of lower-case words alone."""

    def __init__(self, argument: str = "4") -> None:
        self._width = int(argument)

    @property
    def width(self) -> int:
        return self._width

    def read(self, words: Sequence[str]) -> WordVectors:
        rows = [np.random.default_rng(zlib.crc32(word.encode())).normal(size=self.width) for word in words]
        matrix = np.array(rows, dtype=np.float32).reshape(-1, self.width)
        found = np.array([word.islower() for word in words], dtype=np.bool_)
        return WordVectors(matrix, found)


@pytest.fixture(autouse=True)
def _registered() -> None:
    transfer.register("tokenizer", "characters")(Characters)
    transfer.register("tokenizer", "fixed")(Fixed)
    transfer.register("vectors", "hashed")(Hashed)


# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_plugin_tokenizer_builds_vocabulary() -> None:
    vocabulary = PluginVocabulary.build(TEXTS, "characters/4")
    assert vocabulary.tokens[:6] == ("< padding >", "< unknown >", " fil", "film", "a fi", " fin")
    assert vocabulary.counts is not None
    assert vocabulary.counts[:4].tolist() == [0, 0, 3, 3]
    assert vocabulary.lengths is not None
    assert vocabulary.lengths.tolist() == [8, 3, 4]
    encoded = vocabulary.encode(["film", "films"])
    assert [ids.tolist() for ids in encoded] == [[3], [3, UNKNOWN]]
    assert encoded[0].dtype == np.int32


def test_rare_words_are_unknown_and_counted_so() -> None:
    vocabulary = PluginVocabulary.build(TEXTS, "characters/4", min_frequency=2, max_size=2)
    assert vocabulary.tokens[2:] == (" fil", "film")
    assert vocabulary.counts is not None
    assert vocabulary.counts.tolist() == [0, 15 - 6, 3, 3]
    with pytest.raises(DataError, match="no word occurs 9 times"):
        PluginVocabulary.build(TEXTS, "characters/4", min_frequency=9)


def test_a_tokenizer_may_bring_its_vocabulary() -> None:
    vocabulary = PluginVocabulary.build(TEXTS, "fixed")
    assert vocabulary.tokens[2:] == ("zebra", "film", "fine")
    assert vocabulary.counts is not None
    assert vocabulary.counts.tolist() == [0, 3, 0, 3, 1]


def test_duplicate_word_of_plugin_is_refused() -> None:
    class Twice(Fixed):
        def vocabulary(self, texts: Any, **options: Any) -> list[str]:
            return ["film", "film"]

    transfer.register("tokenizer", "twice")(Twice)
    with pytest.raises(PluginError, match="contains a duplicate word"):
        PluginVocabulary.build(TEXTS, "twice")


def test_special_token_in_text_is_not_padding() -> None:
    transfer.register("tokenizer", "lines")(type("Lines", (Fixed,), {"tokenize": lambda self, text: [text]}))
    assert PluginVocabulary.build(TEXTS, "lines").encode(["< padding >"])[0].tolist() != [PADDING]


def test_json_and_pickle_bring_back_the_same_vocabulary() -> None:
    vocabulary = PluginVocabulary.build(TEXTS, "characters/2")
    for again in (read_vocabulary(vocabulary.to_json()), pickle.loads(pickle.dumps(vocabulary))):
        assert isinstance(again, PluginVocabulary)
        assert again.to_json() == vocabulary.to_json()
        assert again.digest == vocabulary.digest
        assert [ids.tolist() for ids in again.encode(TEXTS)] == [ids.tolist() for ids in vocabulary.encode(TEXTS)]
    assert type(read_vocabulary(Vocabulary.build(TEXTS).to_json())) is Vocabulary


def test_spellable_vector_words_are_appended() -> None:
    vocabulary = PluginVocabulary.build(TEXTS, "fixed").extended(["film", "superb", "two words"])
    assert vocabulary.tokens[2:] == ("zebra", "film", "fine", "superb")
    assert vocabulary.counts is not None
    assert vocabulary.counts.tolist() == [0, 3, 0, 3, 1, 0]
    assert vocabulary.extra == 1
    assert read_vocabulary(vocabulary.to_json(), 1).extra == pickle.loads(pickle.dumps(vocabulary)).extra == 1


def test_names_and_paths_of_ours_are_no_plugins() -> None:
    assert vocabulary_class("glove") is Vocabulary
    assert vocabulary_class("./characters/tokenizer.json") is Vocabulary
    assert vocabulary_class("characters/5") is PluginVocabulary
    with pytest.raises(ConfigError, match="unknown tokenizer 'charakters'") as caught:
        Vocabulary.nominal("charakters")
    assert "characters" in caught.value.problems[0].available
    assert caught.value.problems[0].fix == "did you mean 'characters'?"


def test_an_argument_that_is_not_taken_is_refused() -> None:
    with pytest.raises(ConfigError, match="Fixed takes no argument"):
        TextCNN(tokenizer="fixed/5")


def test_a_class_of_another_kind_is_refused() -> None:
    with pytest.raises(PluginError, match=r"no subclass of transfer_text\.interfaces\.Tokenizer"):
        transfer.register("tokenizer", "wrong")(Hashed)


# ------------------------------------------------------------------------------------------------------------- vectors


def test_plugin_vectors_are_looked_up_by_spelling() -> None:
    assert width_of("hashed") == 4
    vectors = read_vectors("hashed/6", ["film", "Film", "(film)", "12"])
    assert vectors.matrix.shape == (4, 6)
    assert vectors.found.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(vectors.matrix[1], vectors.matrix[0])
    np.testing.assert_array_equal(vectors.matrix[2], Hashed("6").read(["(film)"]).matrix[0])
    assert not vectors.matrix[3].any()
    assert read_vectors("hashed/6", []).matrix.shape == (0, 6)
    with pytest.raises(WeightsError, match="'hashed' lists no words"):
        words_of("hashed")


def test_plugin_vectors_of_wrong_shape_are_refused() -> None:
    class Wide(Hashed):
        @property
        def width(self) -> int:
            return 9

        def read(self, words: Sequence[str]) -> WordVectors:
            return Hashed("4").read(words)

    transfer.register("vectors", "wide")(Wide)
    with pytest.raises(PluginError, match=r"vectors 'wide' returned a matrix of float32 \(1, 4\)"):
        read_vectors("wide", ["film"])


def test_unknown_vectors_list_the_plugins_too() -> None:
    with pytest.raises(WeightsError) as caught:
        width_of("no-such-vectors")
    assert "hashed/..." in caught.value.problems[0].available


# -------------------------------------------------------------------------------------------------------- from a config


CONFIG: dict[str, Any] = {
    "data": {"name": "mini_reviews", "limit": 40},
    "backbone": {"name": "textcnn", "tokenizer": "characters/3", "vectors": "hashed/8", "filters": 4},
    "train": {"batch_size": 32, "phases": [{"epochs": 1}]},
}


def test_run_with_plugin_tokenizer_and_vectors(tmp_path: Path) -> None:
    run = transfer.run(CONFIG, output=tmp_path)
    assert run.summary["pretrained"]["vectors"] == "hashed/8"
    assert run.summary["pretrained"]["found"] > 500
    described = json.loads((run.folder / "model" / "vocabulary.json").read_text(encoding="utf-8"))
    assert described["plugin"] == {"tokenizer": "characters/3", "requirement": ""}
    (answer,) = transfer.predict(run.folder, ["worth every minute"])
    assert answer["label"] in ("positive", "negative")
    del registry._registered["vectors", "hashed"]  # prediction needs no vectors
    assert list(transfer.predict(run.folder, ["worth every minute"])) == [answer]
    del registry._registered["tokenizer", "characters"]
    with pytest.raises(PluginError, match="unknown tokenizer 'characters'") as caught:
        list(transfer.predict(run.folder, ["worth every minute"]))
    assert caught.value.problems[0].fix == "register it first, as where it was trained"


PACKAGE = """
from transfer_text.interfaces import Tokenizer

class Halves(Tokenizer):
    def tokenize(self, text):
        return [text[: len(text) // 2], text[len(text) // 2 :]]
"""


def test_error_without_package_states_what_to_install(install: Install) -> None:
    entry = {"transfer.tokenizers": ["halves = halves_plugin:Halves [deep]"]}
    install("half-words", "1.5", entry, requires=["numpy>1; extra == 'deep'"], halves_plugin=PACKAGE)
    backbone = TextCNN.from_data(TEXTS, tokenizer="halves", filters=2, dimensions=4)
    assert backbone.preprocessing.encode(["a film"])[0].tolist() != [UNKNOWN, UNKNOWN]
    assets = backbone.assets()
    again = TextCNN.from_assets(assets, tokenizer="halves", filters=2, dimensions=4)
    assert again.vocabulary.to_json() == backbone.vocabulary.to_json()
    gone = {name: text.replace('"halves"', '"thirds"') for name, text in assets.items()}
    with pytest.raises(PluginError, match="unknown tokenizer 'thirds'") as caught:
        TextCNN.from_assets(gone, tokenizer="halves", filters=2, dimensions=4)
    assert caught.value.problems[0].fix == "pip install 'half-words[deep]==1.5'"
