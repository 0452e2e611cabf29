from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from transfer import DataError
from transfer_text.preprocessing import TextPreprocessing
from transfer_text.vocabulary import Vocabulary


@pytest.fixture
def preprocessing() -> TextPreprocessing:
    return TextPreprocessing(Vocabulary.build(["a b c d", "a b c", "a b", "a"]), max_length=3)


def test_encoding_cuts_to_the_longest_length(preprocessing: TextPreprocessing) -> None:
    encoded = preprocessing.encode(["a b c d", "b x"])
    assert [ids.tolist() for ids in encoded] == [[2, 3, 4], [3, 1]]
    assert [preprocessing.length(ids) for ids in encoded] == [3, 2]


def test_a_batch_is_padded_to_its_longest_text(preprocessing: TextPreprocessing) -> None:
    batch = preprocessing.collate(preprocessing.encode(["a", "a b", "c"]))
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[2, 0], [2, 3], [4, 0]]


@pytest.mark.parametrize("text", ["", "  \n", "<br /> <br />"])
def test_a_text_without_a_word_is_refused(preprocessing: TextPreprocessing, text: str) -> None:
    with pytest.raises(ValueError, match="there is no"):
        preprocessing.encode(["a", text])


def test_read_takes_a_text_or_the_path_of_one(preprocessing: TextPreprocessing, tmp_path: Path) -> None:
    (tmp_path / "review.txt").write_text("\ufeffA fine film.", encoding="utf-8")
    assert preprocessing.read(str(tmp_path / "review.txt")) == "A fine film."
    assert preprocessing.read("A fine film.") == "A fine film."
    assert preprocessing.read("word " * 10_000) == "word " * 10_000


def test_read_names_a_file_that_is_no_text(preprocessing: TextPreprocessing, tmp_path: Path) -> None:
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError) as caught:
        preprocessing.read(str(tmp_path / "picture.jpg"))
    assert caught.value.problems[0].where == str(tmp_path / "picture.jpg")


def test_the_description_tells_vocabularies_apart(preprocessing: TextPreprocessing) -> None:
    other = TextPreprocessing(Vocabulary.build(["a b c e"]), max_length=3)
    assert preprocessing.describe()["vocabulary_size"] == other.describe()["vocabulary_size"] == 6
    assert preprocessing.describe() != other.describe()


def test_a_loader_process_can_have_a_copy(preprocessing: TextPreprocessing) -> None:
    copy = pickle.loads(pickle.dumps(preprocessing))
    assert copy.describe() == preprocessing.describe()
