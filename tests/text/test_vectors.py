from __future__ import annotations

import gzip
import os
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from transfer import DataError, WeightsError
from transfer_text.vectors import vector_files, word_vectors as vectors
from transfer_text.vectors.word_vectors import coverage, read_vectors, width_of, words_of

LINES = "the 0.1 0.2 0.3\nfilm 1 -2 3e-1\n. . . 7.0 8.0 9.0\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRANSFER_DATA", str(tmp_path))
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "vectors").mkdir()
    return tmp_path


def plain(folder: Path, content: str = LINES) -> str:
    (folder / "own.txt").write_text(content, encoding="utf-8")
    return str(folder / "own.txt")


def test_rows_follow_words_with_zeros_for_missing(folder: Path) -> None:
    read = read_vectors(plain(folder), ["film", "nowhere", "the"])
    assert read.found.tolist() == [True, False, True]
    np.testing.assert_allclose(read.matrix, [[1, -2, 0.3], [0, 0, 0], [0.1, 0.2, 0.3]], rtol=1e-6)
    assert read.matrix.dtype == np.float32


def test_a_word_may_hold_spaces(folder: Path) -> None:
    assert read_vectors(plain(folder), [". . ."]).matrix.tolist() == [[7, 8, 9]]


def test_exact_spelling_takes_precedence(folder: Path) -> None:
    source = plain(folder, "mr 1 1\nThe 2 2\nthe 3 3\n. 4 4\nTHE 5 5\n")
    read = read_vectors(source, ["mr.", "the", "THE", "The", "...", "tHe", "!"])
    assert read.matrix[:, 0].tolist() == [1, 3, 5, 2, 4, 3, 0]
    assert read.found.tolist() == [True] * 6 + [False]


def test_first_of_duplicate_lines_is_used(folder: Path) -> None:
    assert read_vectors(plain(folder, "a 1 1\na 2 2\n"), ["a"]).matrix.tolist() == [[1, 1]]


@pytest.mark.parametrize("header", ["", "2 3\n", "2 3 \n"])
def test_a_header_line_is_skipped(folder: Path, header: str) -> None:
    source = plain(folder, header + "the 0.1 0.2 0.3 \n2 1 2 3\n\n")
    assert width_of(source) == 3
    assert read_vectors(source, ["2"]).matrix.tolist() == [[1, 2, 3]]


def test_every_packing_gives_the_same_vectors(folder: Path) -> None:
    plain(folder)
    with gzip.open(folder / "own.txt.gz", "wt", encoding="utf-8") as file:
        file.write(LINES)
    with zipfile.ZipFile(folder / "one.zip", "w") as archive:
        archive.writestr("inner.txt", LINES)
    with zipfile.ZipFile(folder / "two.zip", "w") as archive:
        archive.writestr("a/inner.txt", LINES)
        archive.writestr("other.txt", "the 9 9\n")
    for source in ("own.txt", "own.txt.gz", "one.zip", "one.zip:inner.txt", "two.zip:a/inner.txt"):
        assert width_of(str(folder / source)) == 3
        assert read_vectors(str(folder / source), ["film", "x"]).found.tolist() == [True, False]


def test_an_archive_of_several_files_asks_which(folder: Path) -> None:
    with zipfile.ZipFile(folder / "two.zip", "w") as archive:
        archive.writestr("a.txt", LINES)
        archive.writestr("b.txt", LINES)
    with pytest.raises(WeightsError) as caught:
        width_of(str(folder / "two.zip"))
    assert caught.value.problems[0].available == ("a.txt", "b.txt")
    with pytest.raises(WeightsError, match=r"does not contain 'c\.txt'"):
        width_of(str(folder / "two.zip:c.txt"))


@pytest.mark.parametrize("place", ["glove.6B.50d.txt", "vectors/glove.6B.50d.txt", "vectors/glove.6B.50d.txt.gz"])
def test_known_name_in_data_folder(folder: Path, place: str) -> None:
    line = "film" + " 0.5" * 50 + "\n"
    with (gzip.open if place.endswith(".gz") else open)(folder / place, "wt", encoding="utf-8") as file:
        file.write(line)
    assert read_vectors("glove.6B.50d", ["film"]).matrix.tolist() == [[0.5] * 50]


@pytest.mark.parametrize("place", ["glove.6B.zip", "vectors/glove.6B.zip", "glove.6B.50d.zip"])
def test_a_known_name_is_found_inside_the_archive(folder: Path, place: str) -> None:
    with zipfile.ZipFile(folder / place, "w") as archive:
        archive.writestr("glove.6B.50d.txt", "film" + " 0.5" * 50 + "\n")
    assert read_vectors("glove.6B.50d", ["film"]).matrix.tolist() == [[0.5] * 50]


def test_file_name_in_data_folder(folder: Path) -> None:
    (folder / "vectors" / "own.3d.txt").write_text(LINES)
    assert width_of("own.3d") == width_of("own.3d.txt") == width_of("vectors/own.3d.txt") == 3


def test_width_of_known_name_needs_no_file() -> None:
    assert [width_of(name) for name in ("glove.6B.200d", "glove.42B.300d", "glove.840B.300d")] == [200, 300, 300]


def test_missing_known_name_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(url: str, name: str) -> Path:
        asked.append((url, name))
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("glove.6B.50d.txt", "film" + " 0.5" * 50 + "\n")
        return folder / name

    monkeypatch.setattr(vector_files, "download", download)
    assert read_vectors("glove.6B.50d", ["film"]).found.all()
    assert asked == [("https://nlp.stanford.edu/data/glove.6B.zip", "vectors/glove.6B.zip")]


def test_failed_download_names_file_and_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, name: str) -> Path:
        raise DataError("no network")

    monkeypatch.setattr(vector_files, "download", download)
    with pytest.raises(WeightsError, match="no network") as caught:
        read_vectors("glove.6B.100d", ["film"])
    assert f"glove.6B.zip into {folder / 'vectors'}" in str(caught.value)


def test_an_unknown_source_lists_what_there_is(folder: Path) -> None:
    (folder / "vectors" / "own.3d.txt").write_text(LINES)
    with pytest.raises(WeightsError, match=r"unknown word vectors 'glove\.6B\.10d'") as caught:
        width_of("glove.6B.10d")
    assert {"glove.6B.100d", "mini", "own.3d.txt"} <= set(caught.value.problems[0].available)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bad 1 2", "contains 2 numbers: expected 3"),
        ("bad 0.1 0.2 0.3 0.4", "contains 4 numbers"),
        ("film 1 x 3", "not a finite number"),
        ("film 1 nan 3", "not a finite number"),
        ("other 1 2 3 x", "not a finite number"),
        ("film 1  3", "not a finite number"),
    ],
)
def test_wrong_line_error_has_file_and_number(folder: Path, line: str, message: str) -> None:
    source = plain(folder, f"the 0.1 0.2 0.3\n{line}\n")
    with pytest.raises(WeightsError, match=message) as caught:
        read_vectors(source, ["film"])
    assert caught.value.problems[0].where == f"{source}:2"


@pytest.mark.parametrize("content", ["", "word\n", "PK\x03 not a vector\n"])
def test_a_file_that_holds_no_vectors_is_refused(folder: Path, content: str) -> None:
    with pytest.raises(WeightsError):
        width_of(plain(folder, content))


def test_a_damaged_archive_is_named(folder: Path) -> None:
    (folder / "cut.zip").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(WeightsError, match="archive of the vectors is damaged"):
        width_of(str(folder / "cut.zip"))
    whole = gzip.compress((LINES * 2000).encode())
    (folder / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="archive of the vectors is damaged"):
        read_vectors(str(folder / "cut.txt.gz"), ["film"])


def test_memory_stays_near_the_rows_that_are_wanted(folder: Path) -> None:
    numbers = " 0.123" * 100
    source = plain(folder, "".join(f"word{i}{numbers}\n" for i in range(20_000)))  # 12 MB
    for _ in range(2):  # parsed, then mapped
        tracemalloc.start()
        read_vectors(source, ["word1", "word19999"])
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 3_500_000


def test_the_packaged_vectors_have_the_width_they_claim() -> None:
    read = read_vectors("mini", ["film", "good", "n't", "zzzz"])
    assert read.matrix.shape[1] == width_of("mini") == 100
    assert read.found.tolist() == [True, True, True, False]


def test_coverage_counts_types_and_tokens() -> None:
    report = coverage(["a", "b", "c"], np.array([True, False, False]), np.array([6, 1, 3]))
    assert report == {"words": 3, "found": 1, "types": 0.3333, "tokens": 0.6, "missing": ["c", "b"]}


def test_coverage_leaves_out_what_training_never_saw() -> None:
    report = coverage(["a", "b", "c"], np.array([True, True, False]), np.array([6, 0, 2]))
    assert report == {"words": 2, "found": 1, "types": 0.5, "tokens": 0.75, "missing": ["c"]}


def test_coverage_without_counts_leaves_tokens_open() -> None:
    assert coverage(["a", "b"], np.array([True, False]), None)["tokens"] is None


def test_every_word_of_a_source_is_listed_once(folder: Path) -> None:
    (folder / "own.txt").write_bytes(b"the 1 2\nfilm 1 2\n\xff 1 2\nthe 3 4\n")
    assert words_of(str(folder / "own.txt")) == ["the", "film"]


# -------------------------------------------------------------------------------------------------------------- formats


def binary(words: list[str], matrix: np.ndarray, end: bytes = b"\n") -> bytes:
    rows = (word.encode() + b" " + row.astype("<f4").tobytes() + end for word, row in zip(words, matrix, strict=True))
    return f"{len(words)} {matrix.shape[1]}\n".encode() + b"".join(rows)


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("packed", [False, True])
def test_word2vecs_binary_format_is_read(folder: Path, end: bytes, packed: bool) -> None:
    words = [f"w{i}" for i in range(1500)]
    matrix = np.random.default_rng(0).normal(size=(1500, 7)).astype(np.float32)
    content = binary(words, matrix, end)
    path = folder / ("own.bin.gz" if packed else "own.bin")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert width_of(str(path)) == 7
    read = read_vectors(str(path), ["w1499", "none", "w0"])
    assert read.found.tolist() == [True, False, True]
    np.testing.assert_array_equal(read.matrix[[0, 2]], matrix[[1499, 0]])
    assert words_of(str(path)) == words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (binary(["a", "b"], np.ones((2, 3)))[:-6], "damaged at vector 2: expected 2 vectors"),
        (b"2 3\n" + b"x" * 40_000, "damaged at vector 1: expected 2 vectors"),
        (binary(["a", "b"], np.array([[1.0, 2], [np.nan, 1]])), "vector 2, of 'b', contains"),
        (b"the 0.1 0.2\n", "expected count and width"),
        ((793_712_314).to_bytes(4, "little") + b"\x0c\0\0\0", "a fastText model"),
    ],
)
def test_a_wrong_binary_file_is_explained(folder: Path, content: bytes, message: str) -> None:
    (folder / "own.bin").write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_vectors(str(folder / "own.bin"), ["a"])
    assert caught.value.problems[0].where == str(folder / "own.bin")
    assert caught.value.problems[0].fix


def test_truncated_fasttext_file_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "wiki.vec").write_text("1000 2\nthe 1 2 \n, 3 4 \n")
    assert read_vectors(str(folder / "wiki.vec"), [","]).matrix.tolist() == [[3, 4]]
    assert "contains 2 vectors, expected 1000" in caplog.text


# --------------------------------------------------------------------------------------------------------- parsed, once


def no_more_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the file is parsed again")

    monkeypatch.setattr(vectors, "read_blocks", fail)


def test_a_file_is_parsed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = plain(folder)
    first = read_vectors(source, ["film", "x", ". . ."])
    no_more_parsing(monkeypatch)
    second = read_vectors(source, ["film", "x", ". . ."])
    np.testing.assert_array_equal(second.matrix, first.matrix)
    np.testing.assert_array_equal(second.found, first.found)
    assert words_of(source) == ["the", "film", ". . ."]


def test_what_is_kept_is_a_safetensors_file(folder: Path) -> None:
    read_vectors(plain(folder), ["film"])
    (kept,) = folder.glob("cache/text/vectors-*/vectors.safetensors")
    tensors = load_file(kept)
    np.testing.assert_allclose(tensors["matrix"][1], [1, -2, 0.3], rtol=1e-6)
    assert tensors["words"].tobytes().decode().split("\n") == ["the", "film", ". . .", ""]


def test_a_file_that_changed_is_parsed_again(folder: Path) -> None:
    source = plain(folder)
    read_vectors(source, ["film"])
    plain(folder, LINES.replace("film 1", "film 4"))
    os.utime(source, (time.time() + 5, time.time() + 5))
    assert read_vectors(source, ["film"]).matrix[0, 0] == 4


def test_what_is_damaged_is_made_again(folder: Path) -> None:
    source = plain(folder)
    read_vectors(source, ["film"])
    (kept,) = folder.glob("cache/text/vectors-*/vectors.safetensors")
    for content in (kept.read_bytes()[:-3], b"nonsense"):
        kept.write_bytes(content)
        assert read_vectors(source, ["film"]).found.all()


def test_file_is_parsed_again_without_cache(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cache").write_text("a file where the folder should be")
    assert read_vectors(plain(folder), ["film"]).found.all()
    assert "nothing is cached" in caplog.text


def test_a_broken_file_leaves_nothing_in_the_cache(folder: Path) -> None:
    with pytest.raises(WeightsError):
        read_vectors(plain(folder, "the 1 2\nfilm 1\n"), ["the"])
    assert list((folder / "cache" / "text").iterdir()) == []
