from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transfer import DataError
from transfer_text import cache
from transfer_text.encoding import text_blocks as corpus, vocabulary
from transfer_text.encoding.encoded_texts import Truncation, truncation_loss
from transfer_text.encoding.preprocessing import TextPreprocessing, bucket_length, padded
from transfer_text.encoding.token_cache import PieceTable
from transfer_text.encoding.vocabulary import Vocabulary

TEXTS = ["a b c d", "a b c", "a b", "a"]


@pytest.fixture
def preprocessing() -> TextPreprocessing:
    return TextPreprocessing(Vocabulary.build(TEXTS), max_length=3)


def lists(encoded: Any) -> list[list[int]]:
    return [ids.tolist() for ids in encoded]


def test_encoding_cuts_to_the_longest_length(preprocessing: TextPreprocessing) -> None:
    encoded = preprocessing.encode(["a b c d", "b x"])
    assert lists(encoded) == [[2, 3, 4], [3, 1]]
    assert [preprocessing.length(ids) for ids in encoded] == [3, 2]


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [("head", [[2, 3, 4], [2, 3]]), ("tail", [[4, 5, 6], [2, 3]]), ("both", [[2, 3, 6], [2, 3]])],
)
def test_truncation_by_side(truncation: Truncation, kept: list[list[int]]) -> None:
    words = Vocabulary.build(["a b c d e"])
    assert lists(TextPreprocessing(words, 3, truncation).encode(["a b c d e", "a b"])) == kept
    whole = TextPreprocessing(words, None, truncation).encode(["a b c d e"])
    assert lists(whole) == [[2, 3, 4, 5, 6]]
    assert TextPreprocessing(words, 3, truncation).describe()["truncation"] == truncation


def test_encoded_texts_are_slices_of_one_array(preprocessing: TextPreprocessing) -> None:
    encoded = preprocessing.encode(TEXTS)
    assert len(encoded) == 4
    assert lists(encoded[1:3]) == lists(encoded)[1:3]
    assert encoded[-1].tolist() == encoded[np.int64(3)].tolist() == [2]
    assert encoded.lengths.tolist() == [3, 3, 2, 1]
    assert all(ids.base is encoded.indices for ids in encoded)
    with pytest.raises(IndexError):
        encoded[4]
    assert torch.from_numpy(encoded[0]).dtype == torch.int32
    assert lists(pickle.loads(pickle.dumps(encoded))) == lists(encoded)
    assert list(preprocessing.encode([])) == []


def test_truncation_loss_is_reported() -> None:
    lengths = np.array([2, 4, 10])
    assert truncation_loss(lengths, 4) == {"max_length": 4, "texts_cut": 0.3333, "tokens_cut": 0.375}
    assert truncation_loss(lengths, None) == {"max_length": None, "texts_cut": 0.0, "tokens_cut": 0.0}
    assert truncation_loss(lengths[:0], 4)["tokens_cut"] == 0


# ---------------------------------------------------------------------------------------------------- kept on disk


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep texts of any length, in a cache of its own."""
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "MIN_CACHED_CHARACTERS", 1)
    monkeypatch.setattr(corpus, "BLOCK_TEXTS", 3)
    return tmp_path / "cache" / "text"


def no_more_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("texts are numericalised again")

    monkeypatch.setattr(PieceTable, "encode", fail)


def test_the_second_start_reads_what_the_first_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Vocabulary.build(TEXTS)
    encoded = lists(first.encode(TEXTS))
    no_more_work(monkeypatch)
    second = Vocabulary.build(TEXTS)
    assert second.to_json() == first.to_json()
    assert first.counts is not None
    assert first.lengths is not None
    np.testing.assert_array_equal(second.counts, first.counts)
    np.testing.assert_array_equal(second.lengths, first.lengths)
    kept = TextPreprocessing(second, 2, "tail").encode(TEXTS)  # cut afterwards: any length shares the entry
    assert lists(kept) == [ids[-2:] for ids in encoded]
    assert kept.indices.flags.writeable  # torch warns of others
    assert sorted(path.name.partition("-")[0] for path in folder.iterdir()) == ["encoded", "vocabulary"]


@pytest.mark.parametrize(
    ("texts", "options"),
    [([*TEXTS[:3], "b"], {}), (TEXTS[::-1], {}), (TEXTS, {"tokenizer": "whitespace"}), (TEXTS, {"max_size": 2})],
)
def test_other_texts_or_settings_are_other_entries(folder: Path, texts: list[str], options: dict[str, Any]) -> None:
    Vocabulary.build(TEXTS).encode(TEXTS)
    before = set(folder.iterdir())
    words = Vocabulary.build(texts, **options)
    fresh = Vocabulary.from_json(words.to_json())
    expected = [fresh.tokenize(text) for text in texts]
    found = [[words.tokens[i] for i in ids] for ids in words.encode(texts)]
    assert [len(tokens) for tokens in found] == [len(tokens) for tokens in expected]
    assert set(folder.iterdir()) - before


def test_spellable_words_are_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MIN_CACHED_WORDS", 1)
    words = Vocabulary.build(TEXTS)
    longer = words.extended(["new", "two words", "other"])
    (kept,) = folder.glob("spelled-*/spelled.npy")
    monkeypatch.setattr(vocabulary, "TokenFinder", None)
    assert words.extended(["new", "two words", "other"]).tokens == longer.tokens == (*words.tokens, "new", "other")
    monkeypatch.undo()
    kept.write_bytes(b"damaged")
    monkeypatch.setenv("TRANSFER_CACHE", str(folder.parent))
    monkeypatch.setattr(vocabulary, "MIN_CACHED_WORDS", 1)
    assert words.extended(["new", "two words", "other"]).tokens == longer.tokens


@pytest.mark.parametrize("file", ["indices.bin", "offsets.npy", "vocabulary.json", "counts.npz"])
def test_a_damaged_entry_is_made_again(folder: Path, file: str) -> None:
    words = Vocabulary.build(TEXTS)
    encoded = lists(words.encode(TEXTS))
    (damaged,) = folder.glob(f"*/{file}")
    damaged.write_bytes(damaged.read_bytes()[:-2])
    again = Vocabulary.build(TEXTS)
    assert again.to_json() == words.to_json()
    assert lists(again.encode(TEXTS)) == encoded


def test_encode_without_writable_cache(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.write_text("a file where the folder should be")
    assert lists(Vocabulary.build(TEXTS).encode(TEXTS))[3] == [2]
    assert "nothing is cached" in caplog.text


def test_what_was_used_longest_ago_is_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT_BYTES", 100)

    def write(name: str) -> Path | None:
        return cache.entry(
            "encoded", cache.digest(name), lambda path: path.joinpath("x").write_bytes(bytes(60)) and None
        )

    first = write("first")
    (folder / "of somebody else").mkdir()
    second = write("second")
    assert first is not None
    assert second is not None
    assert not first.exists()
    assert second.exists()
    assert (folder / "of somebody else").exists()


def test_nothing_half_written_stays(folder: Path) -> None:
    def write(path: Path) -> None:
        path.joinpath("half").write_bytes(b"1")
        raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        cache.entry("encoded", cache.digest(1), write)
    assert list(folder.iterdir()) == []


def test_entry_of_concurrent_run_is_used(folder: Path) -> None:
    def write(path: Path) -> None:
        path.joinpath("x").write_bytes(b"ours")
        other = folder / f"encoded-{cache.digest(1)}"
        shutil.copytree(path, other)
        other.joinpath("x").write_bytes(b"theirs")

    found = cache.entry("encoded", cache.digest(1), write)
    assert found is not None
    assert found.joinpath("x").read_bytes() == b"theirs"
    assert len(list(folder.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_padded_to_its_longest_text(preprocessing: TextPreprocessing) -> None:
    batch = preprocessing.model_inputs(preprocessing.encode(["a", "a b", "c"]))
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[2, 0], [2, 3], [4, 0]]


def test_token_ids_travel_as_int32(preprocessing: TextPreprocessing) -> None:
    assert preprocessing.collate(preprocessing.encode(["a", "a b"])).dtype == torch.int32


def test_gpu_batches_have_few_lengths() -> None:
    lengths = [bucket_length(length) for length in range(1, 513)]
    assert sorted(set(lengths[:64])) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert len(set(lengths)) == 20
    assert all(length <= bucket for length, bucket in enumerate(lengths, 1))
    assert all(bucket < 1.25 * length for length, bucket in enumerate(lengths, 1) if length > 32)
    # Truncated texts are all of the maximum length, which needs no padding.
    assert [bucket_length(length, 500) for length in (449, 500, 501)] == [500, 500, 512]


def test_padding_to_a_bucket_keeps_the_indices() -> None:
    result = padded(torch.tensor([[2, 0], [2, 3]], dtype=torch.int32), 4)
    assert result.dtype == torch.int64
    assert result.tolist() == [[2, 0, 0, 0], [2, 3, 0, 0]]


@pytest.mark.parametrize("text", ["", "  \n", "<br /> <br />"])
def test_a_text_without_a_word_is_refused(preprocessing: TextPreprocessing, text: str) -> None:
    with pytest.raises(ValueError, match=r"contains no word|is empty or blank"):
        preprocessing.encode(["a", text])


def test_read_accepts_text_or_path(preprocessing: TextPreprocessing, tmp_path: Path) -> None:
    (tmp_path / "review.txt").write_text("\ufeffA fine film.", encoding="utf-8")
    assert preprocessing.read(str(tmp_path / "review.txt")) == "A fine film."
    assert preprocessing.read("A fine film.") == "A fine film."
    assert preprocessing.read("word " * 10_000) == "word " * 10_000


def test_read_names_a_file_that_is_no_text(preprocessing: TextPreprocessing, tmp_path: Path) -> None:
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError) as caught:
        preprocessing.read(str(tmp_path / "picture.jpg"))
    assert caught.value.problems[0].where == str(tmp_path / "picture.jpg")


def test_description_differs_between_vocabularies(preprocessing: TextPreprocessing) -> None:
    other = TextPreprocessing(Vocabulary.build(["a b c e"]), max_length=3)
    assert preprocessing.describe()["vocabulary_size"] == other.describe()["vocabulary_size"] == 6
    assert preprocessing.describe() != other.describe()


def test_a_loader_process_can_have_a_copy(preprocessing: TextPreprocessing) -> None:
    copy = pickle.loads(pickle.dumps(preprocessing))
    assert copy.describe() == preprocessing.describe()
