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
from transfer.runs.inputs import Input, argument_inputs, frame_inputs, line_inputs, value_inputs
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
        ("test.tsv", b'text\tid\n"a film\t1\ngreat\t2\n\t3\nso good"\t4\n', [2, 3, 4, 5]),
        ("test.csv", gzip.compress(b'text,id\n"a ""film""",1\ngreat,2\n,3\n'), [2, 3, 4]),
        ("test.json", b'[{"text": "a film"},\n{"text": "great"},\n{"text": null}]', [1, 2, 3]),
        ("test.jsonl", b'{"text": "a film"}\n\n{"id": 2, "text": "great"}\n{"text": null}\n', [1, 3, 4]),
    ],
)
def test_table_gives_an_input_for_each_row(name: str, content: bytes, lines: list[int]) -> None:
    Path(name).write_bytes(content)
    inputs = list(argument_inputs(name, TEXTS, "text"))
    assert [dict(one.location) for one in inputs] == [{"file": name, "line": line} for line in lines]
    assert [one.is_blank for one in inputs[:3]] == [False, False, True]
    assert inputs[1].read() == "great"


def test_table_without_column_names_the_option_and_the_columns() -> None:
    Path("test.csv").write_text("id,text\n1,a\n", encoding="utf-8")
    for preprocessing in (TEXTS, IMAGES):
        message = reason(next(argument_inputs("test.csv", preprocessing)))
        assert message == "this is a table: name the column with the inputs by --column (id, text)"


@pytest.mark.parametrize(
    ("content", "column", "keep", "message", "available"),
    [
        ("id,text\n1,a\n", "txt", (), "unknown column 'txt' of the table", ("id", "text")),
        ("id,text\n1,a\n", "text", ("stars",), "unknown column 'stars' of the table", ("id", "text")),
        ("id,text\n", "text", (), "the table has no rows: expected at least one", ()),
        ("", "text", (), "the table is empty: expected a header and rows", ()),
    ],
)
def test_table_without_rows_or_column_is_refused(
    content: str, column: str, keep: tuple[str, ...], message: str, available: tuple[str, ...]
) -> None:
    Path("test.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        next(argument_inputs("test.csv", TEXTS, column, keep))
    (problem,) = caught.value.problems
    assert (problem.message, problem.where, tuple(problem.available)) == (message, "test.csv", available)


class Frame:
    """A data frame of pandas or polars, reduced to the parts that are read."""

    def __init__(self, columns: dict[str, list[object]]) -> None:
        self.columns = list(columns)
        self._values = columns

    def __getitem__(self, name: str) -> list[object]:
        return self._values[name]


COLUMNS: dict[str, list[object]] = {"text": ["a film", None, "***"], "id": [7, 8, 9]}


@pytest.mark.parametrize(
    "frame",
    [COLUMNS, [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)], Frame(COLUMNS)],
    ids=["dict of columns", "list of rows", "data frame"],
)
def test_rows_of_a_table_in_memory_are_values(frame: object) -> None:
    inputs = list(frame_inputs(frame, "text", TEXTS, ["id"]))
    assert [(one.name, one.is_blank, dict(one.kept)) for one in inputs] == [
        ("a film", False, {"id": 7}),
        ("", True, {"id": 8}),
        ("***", False, {"id": 9}),
    ]
    assert inputs[2].read() == "***"
    with pytest.raises(DataError, match="unknown column 'review'"):
        next(frame_inputs(frame, "review", TEXTS))


@pytest.mark.parametrize("frame", [5, {"text": ["a"], "id": []}, {"text": {"a"}}])
def test_object_that_is_no_table_is_refused(frame: object) -> None:
    with pytest.raises(DataError, match=r"is no table|differ in length|wrong type"):
        next(frame_inputs(frame, "text", TEXTS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b'text,id\n"a, b",1\n"open'),
        ("t.jsonl", b"[1]\n"),
        ("t.csv", b"\xff\n"),
        ("t.csv.gz", gzip.compress(b"text\na")[:-9]),
    ],
)
def test_damaged_table_is_named(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    message = reason(next(argument_inputs(name, TEXTS, "text")))
    assert "the table cannot be read" in message or "the JSON is not a table" in message


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
