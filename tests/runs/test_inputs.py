"""Inputs of predictions: values, paths, patterns, folders, lines and rows of tables."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfer import DataError, Preprocessing
from transfer.runs.inputs import Input, argument_inputs, line_inputs, value_inputs
from transfer_text.encoding.preprocessing import TextPreprocessing
from transfer_text.encoding.vocabulary import Vocabulary
from transfer_vision.preprocessing import ImagePreprocessing

TEXTS = TextPreprocessing(Vocabulary.build(["a great film"], min_frequency=1), max_length=None)
IMAGES = ImagePreprocessing(image_size=8, augmentation="none")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def names(inputs: Iterable[Input]) -> list[str]:
    return [one.name for one in inputs]


def values(inputs: Iterable[Input]) -> list[object]:
    return [one.read() for one in inputs]


def reason(one: Input) -> str:
    with pytest.raises(DataError) as caught:
        one.read()
    return caught.value.problems[0].message


def images(*paths: str) -> None:
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)


@pytest.mark.parametrize("text", ["great", "***", "Report.txt", "/etc/os-release", "a?[b]", ".", "-", ""])
def test_item_of_a_list_and_line_are_texts(text: str) -> None:
    Path("great").write_text("the content of the file", encoding="utf-8")
    assert values(value_inputs([text], TEXTS)) == [text]
    assert values(line_inputs([f"{text}\n"], TEXTS)) == [text]


def test_path_object_is_a_file_and_a_folder_its_files() -> None:
    Path("letters/old").mkdir(parents=True)
    for path in ("letters/b", "letters/old/a.txt", "letters/.hidden"):
        Path(path).write_text(path, encoding="utf-8")
    assert values(value_inputs([Path("letters/b"), Path("letters")], TEXTS)) == [
        "letters/b",
        "letters/b",
        "letters/old/a.txt",
    ]
    assert reason(next(value_inputs([Path("great")], TEXTS))) == "there is no such file"


def test_one_value_instead_of_a_list_is_one_input() -> None:
    images("a.png")
    pixels = np.zeros((9, 9, 3), np.uint8)
    assert names(value_inputs("a great film", TEXTS)) == ["a great film"]
    assert values(value_inputs(Path("a.png").read_bytes(), IMAGES))[0].size == (9, 9)  # type: ignore[attr-defined]
    assert [one.read() is pixels for one in value_inputs(pixels, IMAGES)] == [True]
    assert len(list(value_inputs(np.zeros((2, 9, 9, 3), np.uint8), IMAGES))) == 2


@pytest.mark.parametrize("value", [None, 5, Image.new("RGB", (9, 9)), float("nan")])
def test_value_that_is_no_text_is_refused(value: object) -> None:
    (one,) = value_inputs([value], TEXTS)
    with pytest.raises(ValueError, match="expected a text, got"):
        one.read()


def test_blank_lines_keep_their_position_and_wrong_bytes_are_named() -> None:
    inputs = list(line_inputs(["a\r\n", "\n", "b\udcff\n"], TEXTS))
    assert [(one.name, one.is_blank, dict(one.location)) for one in inputs] == [
        ("a", False, {"line": 1}),
        ("", True, {"line": 2}),
        ("b\\xff", False, {"line": 3}),
    ]
    assert reason(inputs[2]) == "the line is not UTF-8"


def test_lines_for_an_image_model_are_paths() -> None:
    images("a[1].png")
    assert values(line_inputs(["a[1].png\n"], IMAGES))[0].size == (9, 9)  # type: ignore[attr-defined]


def test_argument_is_a_path_then_a_pattern_then_a_text() -> None:
    for path in ("b.txt", "a.txt", "c.csv", "sub[1]/x.txt", "sub1/y.txt"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(path, encoding="utf-8")
    assert names(argument_inputs("*.txt", TEXTS)) == ["a.txt", "b.txt"]
    assert names(argument_inputs(f"{os.getcwd()}/*.txt", TEXTS))[0] == f"{os.getcwd()}/a.txt"
    assert names(argument_inputs("sub[1]/x.txt", TEXTS)) == ["sub[1]/x.txt"]
    assert names(argument_inputs("sub[1]/*.txt", TEXTS)) == ["sub[1]/x.txt"]
    assert names(argument_inputs("sub?/*.txt", TEXTS)) == ["sub1/y.txt"]
    for text in ("is this good?", "*.jpg", "", "word " * 10_000):
        assert values(argument_inputs(text, TEXTS)) == [text]


def test_folder_of_images_is_read_recursively() -> None:
    images("imgs/b.png", "imgs/a/c.JPG", "imgs/.cache/d.png")
    Path("imgs/notes.md").write_text("no image", encoding="utf-8")
    os.symlink("..", "imgs/a/loop")
    assert names(argument_inputs("imgs", IMAGES)) == ["imgs/b.png", "imgs/a/c.JPG"]


def test_folder_without_images_and_device_are_refused() -> None:
    Path("empty").mkdir()
    os.mkfifo("pipe")
    assert "contains no file to predict: expected .jpg" in reason(next(argument_inputs("empty", IMAGES)))
    assert reason(next(argument_inputs("pipe", TEXTS))) == "it is no regular file"


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("test.csv", b'\xef\xbb\xbfid,text\n1,"a film,\nfine"\n2,great\n\n3,\n', [2, 4, 6]),
        ("test.tsv", b"id\ttext\n1\ta film,\\nfine\n2\tgreat\n3\t\n".replace(b"\\n", b" "), [2, 3, 4]),
        ("test.csv", b"id;text\n1;a film\n2;great\n3\n", [2, 3, 4]),
        ("test.csv.gz", gzip.compress(b"text\na film\ngreat\n \n"), [2, 3, 4]),
        ("test.jsonl", b'{"text": "a film"}\n\n{"id": 2, "text": "great"}\n{"text": null}\n', [1, 3, 4]),
    ],
)
def test_table_gives_an_input_for_each_row(name: str, content: bytes, lines: list[int]) -> None:
    Path(name).write_bytes(content)
    inputs = list(argument_inputs(name, TEXTS, "text"))
    assert [dict(one.location) for one in inputs] == [{"file": name, "line": line} for line in lines]
    assert [one.is_blank for one in inputs] == [False, False, True]
    assert inputs[1].read() == "great"


def test_table_without_column_names_the_option_and_the_columns() -> None:
    Path("test.csv").write_text("id,text\n1,a\n", encoding="utf-8")
    for preprocessing in (TEXTS, IMAGES):
        message = reason(next(argument_inputs("test.csv", preprocessing)))
        assert message == "this is a table: name the column with the inputs by --column (id, text)"
    assert reason(next(argument_inputs("test.csv", TEXTS, "txt"))) == (
        "the table has no column 'txt': expected one of id, text"
    )


@pytest.mark.parametrize(("name", "content"), [("t.csv", b'text\n"open'), ("t.jsonl", b"[1]\n"), ("t.csv", b"\xff\n")])
def test_damaged_table_is_named(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    assert "the table cannot be read" in reason(next(argument_inputs(name, TEXTS, "text")))


def test_table_of_images_has_paths_beside_it() -> None:
    images("photos/a.png")
    Path("photos/list.csv").write_text("photo\na.png\nphotos/a.png\n", encoding="utf-8")
    assert [value.size for value in values(argument_inputs("photos/list.csv", IMAGES, "photo"))] == [(9, 9)] * 2  # type: ignore[attr-defined]


def test_preprocessing_with_only_read_gets_every_string() -> None:
    class Numbers(Preprocessing):
        def encode(self, values):  # type: ignore[no-untyped-def]
            return values

        def read(self, source: str) -> list[str]:
            return source.split(",")

    assert values(value_inputs(["1,2"], Numbers())) == [["1", "2"]]
