from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import logging
import os
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from transfer import ConfigError, DataError, data_folder
from transfer.data.delimited import Dialect, read_delimited
from transfer_text.data import datasets
from transfer_text.data.datasets import IMDb, MiniReviews
from transfer_text.data.empty_texts import is_empty
from transfer_text.data.folders import TextFolder
from transfer_text.data.hugging_face import HuggingFace
from transfer_text.data.tables import TextCSV

# ---------------------------------------------------------------------------------------------------------------- IMDb

REVIEWS = {
    f"aclImdb/{split}/{sentiment}/{number}_{stars}.txt": f"{split} {sentiment} {number} caf\u00e9<br />"
    for split in ("train", "test")
    for sentiment, stars in (("neg", 2), ("pos", 9))
    for number in (0, 10, 2)
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRANSFER_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "IMDB_REVIEWS", 3)
    return tmp_path


def pack(folder: Path, reviews: dict[str, str]) -> Path:
    path = folder / "aclImdb_v1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in reviews.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def unpack(folder: Path, reviews: dict[str, str]) -> Path:
    for name, text in reviews.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "aclImdb"


def test_imdb_archive_and_folder_give_same_reviews(folder: Path) -> None:
    (folder / "packed").mkdir()
    (folder / "open").mkdir()
    shuffled = dict(reversed(REVIEWS.items())) | {
        "aclImdb/train/unsup/0_0.txt": "no label",
        "aclImdb/README": "read me",
        "../../evil/train/pos/x.txt": "outside",
    }
    packed, opened = pack(folder / "packed", shuffled), unpack(folder / "open", REVIEWS)
    for root in (packed, packed.parent, opened, opened.parent):
        data = IMDb(root=str(root)).load()
        train = data.splits["train"]
        assert list(data.splits) == ["train", "test"]
        assert train.names == [
            *(f"aclImdb/train/neg/{n}_2.txt" for n in (0, 10, 2)),
            *(f"aclImdb/train/pos/{n}_9.txt" for n in (0, 10, 2)),
        ]
        assert train.fields["text"] == [REVIEWS[name] for name in train.names]
        assert train.targets.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.spec.classes == ("negative", "positive")


def test_imdb_in_data_folder_is_not_downloaded(folder: Path) -> None:
    pack(folder, REVIEWS)
    assert len(IMDb().load().splits["test"]) == 6


def test_unlabelled_reviews_are_counted_and_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    unlabelled = {f"aclImdb/train/unsup/{number}_0.txt": "no label" for number in range(2)}
    (folder / "packed").mkdir()
    roots = pack(folder / "packed", REVIEWS | unlabelled), unpack(folder, REVIEWS | unlabelled)
    for root in roots:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="transfer_text.data.datasets"):
            assert len(IMDb(root=str(root)).load().splits["train"]) == 6
        assert "omitted 2 unlabeled reviews" in caplog.text


def test_what_is_not_there_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(url: str, name: str) -> Path:
        asked.append((url, name))
        return pack(folder, REVIEWS)

    monkeypatch.setattr(datasets, "download", download)
    assert len(IMDb().load().splits["train"]) == 6
    assert asked == [(datasets.IMDB_URL, "aclImdb_v1.tar.gz")]


@pytest.mark.parametrize("file", ["reviews.bin", "reviews.json"])
def test_imdb_archive_is_read_again_if_cache_is_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setenv("TRANSFER_CACHE", str(folder / "cache"))
    pack(folder, REVIEWS)
    first = IMDb().load().splits["train"]
    (kept,) = folder.glob(f"cache/text/reviews-*/{file}")
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        again = IMDb().load().splits["train"]
    assert (again.fields["text"], again.names) == (first.fields["text"], first.names)
    kept.write_bytes(kept.read_bytes()[:-3])
    mended = IMDb().load().splits["train"]
    assert (mended.fields["text"], mended.names) == (first.fields["text"], first.names)


def test_an_incomplete_archive_is_refused(folder: Path) -> None:
    path = pack(folder, dict(list(REVIEWS.items())[:-1]))
    with pytest.raises(DataError, match="test contains 3 negative and 2 positive") as caught:
        IMDb().load()
    assert caught.value.problems[0].where == str(path)


def test_a_damaged_archive_is_refused(folder: Path) -> None:
    path = pack(folder, REVIEWS)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read"):
        IMDb().load()


def test_root_without_data_lists_its_content(folder: Path) -> None:
    (folder / "somewhere").mkdir()
    (folder / "somewhere" / "else.txt").touch()
    with pytest.raises(DataError) as caught:
        IMDb(root=str(folder / "somewhere")).load()
    assert caught.value.problems[0].available == ("else.txt",)


@pytest.mark.data
def test_all_of_imdb_is_read() -> None:
    if not (data_folder() / "aclImdb_v1.tar.gz").is_file():
        pytest.skip("needs aclImdb_v1.tar.gz")
    splits = IMDb().load().splits
    assert {name: (len(split), int(split.targets.sum())) for name, split in splits.items()} == {
        "train": (25_000, 12_500),
        "test": (25_000, 12_500),
    }


# -------------------------------------------------------------------------------------------------------- mini reviews


def test_mini_reviews_are_balanced_in_three_splits() -> None:
    data = MiniReviews().load()
    assert {name: (len(s), int(s.targets.sum())) for name, s in data.splits.items()} == {
        "train": (792, 396),
        "validation": (168, 84),
        "test": (168, 84),
    }
    assert data.splits["train"].name(0) == "mini_reviews.csv:2"
    assert data.spec == MiniReviews().spec


def test_no_mini_review_is_in_two_splits() -> None:
    texts = [text for split in MiniReviews().load().splits.values() for text in split.fields["text"]]
    assert len({" ".join(text.lower().split()) for text in texts}) == len(texts) == 1128
    assert all(text == text.strip() and len(text.split()) >= 5 for text in texts)


# ------------------------------------------------------------------------------------------------------------ text_csv

TABLE = "text,label\nA fine film,good\nToo slow,bad\n"


def write(folder: Path, content: str | bytes, name: str = "train.csv") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def problem(folder: Path, content: str | bytes, name: str = "train.csv", **options: Any) -> str:
    path = write(folder, content, name)
    with pytest.raises(DataError) as caught:
        TextCSV(train=path, **options).load()
    assert len(caught.value.problems) == 1
    return str(caught.value).replace(str(folder) + "/", "")


def test_classes_are_the_labels_in_alphabetical_order(tmp_path: Path) -> None:
    path = write(tmp_path, TABLE)
    data = TextCSV(train=path).load()
    assert data.spec.classes == ("bad", "good")
    assert data.splits["train"].targets.tolist() == [1, 0]
    assert data.splits["train"].targets.dtype == np.int64
    assert data.splits["train"].fields["text"] == ["A fine film", "Too slow"]
    assert list(data.splits["train"].names) == [f"{path}:2", f"{path}:3"]
    assert list(data.splits) == ["train"]


def test_the_test_split_uses_the_classes_of_training(tmp_path: Path) -> None:
    train = write(tmp_path, TABLE + "So so,middling\n")
    test = write(tmp_path, "text,label\nFine,good\n", "test.csv")
    assert TextCSV(train=train, test=test).load().splits["test"].targets.tolist() == [1]


def test_quoting_is_that_of_python(tmp_path: Path) -> None:
    rows = [['He said "no",\nand left', "bad"], ["x" * 200_000, "good"], ["plain", "bad"]]
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["text", "label"], *rows])
    path = write(tmp_path, buffer.getvalue())
    split = TextCSV(train=path).load().splits["train"]
    assert split.fields["text"] == [row[0] for row in rows]
    assert list(split.names) == [f"{path}:2", f"{path}:4", f"{path}:5"]
    assert csv.field_size_limit() == 131_072  # what is global is put back


def test_abandoned_csv_reader_keeps_field_limit(tmp_path: Path) -> None:
    records = read_delimited(["text,label\n", "a,b\n", "c,d\n"], tmp_path / "short.csv", Dialect(","))
    next(records)
    assert csv.field_size_limit() >= 131_072
    records.close()  # type: ignore[attr-defined]  # a generator
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.tsv", "text\tlabel\none, two\tx\nthree\ty\n", {}),
        ("a.csv", "text;label\none, two;x\nthree;y\n", {"delimiter": ";"}),
        ("a.csv", b'\xef\xbb\xbftext,label\r\n"one, two",x\r\n\r\nthree,y\r\n', {}),
        ("a.csv", 'text,label\n"one, two",x\nthree,y\n'.encode("utf-16"), {"encoding": "utf-16"}),
        ("a.csv.gz", gzip.compress(b'text,label\n"one, two",x\nthree,y\n', mtime=0), {}),
        ("a.TSV", b"\xef\xbb\xbftext\tlabel\rone, two\tx\rthree\ty\r", {}),
        ("a.csv", b"text,label\n'one, two',x\nthree,y\n".replace(b"'", b'"'), {"encoding": "cp1252"}),
        ("a.jsonl", '{"text": "one, two", "label": "x"}\n\n{"text": "three", "label": "y", "more": [1]}\n', {}),
    ],
    ids=["tsv", "semicolons", "byte order mark", "utf-16", "gzip", "capital suffix", "cp1252", "json lines"],
)
def test_every_format_gives_the_same_rows(
    tmp_path: Path, name: str, content: str | bytes, options: dict[str, Any]
) -> None:
    data = TextCSV(train=write(tmp_path, content, name), **options).load()
    assert data.splits["train"].fields["text"] == ["one, two", "three"]
    assert data.spec.classes == ("x", "y")


def test_json_lines_labels_are_numbers_and_booleans(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": "a", "label": label}) for label in (1, 0, True, "x"))
    assert TextCSV(train=write(tmp_path, lines, "a.jsonl")).load().spec.classes == ("0", "1", "true", "x")


def test_several_columns_are_labels_or_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "text,a,b\none,1,0\ntwo,TRUE,false\n")
    labels = TextCSV(train=path, label=("b", "a"), target="labels").load()
    assert labels.spec.classes == ("b", "a")
    assert labels.splits["train"].targets.tolist() == [[0, 1], [0, 1]]
    numbers = TextCSV(train=write(tmp_path, "text,a\none,-1.5e1\n"), label="a", target="number").load()
    assert numbers.spec.classes == ("a",)
    assert numbers.splits["train"].targets.tolist() == [[-15]]
    assert numbers.splits["train"].targets.dtype == np.float32


def test_label_list_in_one_column(tmp_path: Path) -> None:
    train = write(tmp_path, "text,genres\none,drama| comedy\ntwo,\nthree,war\n")
    test = write(tmp_path, '{"text": "a", "genres": ["war", "drama"]}\n{"text": "b", "genres": []}\n', "test.jsonl")
    data = TextCSV(train=train, test=test, label="genres", target="label_list", separator="|").load()
    assert (data.spec.target, data.spec.classes) == ("labels", ("comedy", "drama", "war"))
    assert data.splits["train"].targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert data.splits["test"].targets.tolist() == [[0, 1, 1], [0, 0, 0]]


def test_a_label_that_training_never_saw_is_named(tmp_path: Path) -> None:
    train = write(tmp_path, "text,genres\none,drama\n")
    test = write(tmp_path, "text,genres\none,drama\ntwo,farce\n", "test.csv")
    with pytest.raises(DataError, match="label 'farce' is not in the training data") as caught:
        TextCSV(train=train, test=test, label="genres", target="label_list").load()
    assert caught.value.problems[0].where == f"{test}:3"


def test_a_validation_table_is_a_split(tmp_path: Path) -> None:
    train, val = write(tmp_path, TABLE), write(tmp_path, "text,label\nFine,good\n", "val.csv")
    assert {name: len(split) for name, split in TextCSV(train=train, val=val).load().splits.items()} == {
        "train": 2,
        "validation": 1,
    }


def test_row_names_survive_pickling_and_slicing(tmp_path: Path) -> None:
    path = write(tmp_path, TABLE)
    names = pickle.loads(pickle.dumps(TextCSV(train=path).load().splits["train"].names))
    assert list(names[1:]) == [f"{path}:3"]


def test_utf_16_is_recognised(tmp_path: Path) -> None:
    assert "set encoding: utf-16" in problem(tmp_path, TABLE.encode("utf-16"))


def test_table_that_is_not_utf_16_is_named(tmp_path: Path) -> None:
    test = write(tmp_path, TABLE, "test.csv")
    (tmp_path / "train.csv").write_bytes(TABLE.encode("utf-16"))
    with pytest.raises(DataError, match="no byte order mark of UTF-16") as caught:
        TextCSV(train=str(tmp_path / "train.csv"), test=test, encoding="utf-16").load()
    assert caught.value.problems[0].where == f"{test}:1"


def test_half_a_character_is_named(tmp_path: Path) -> None:
    rows = ['{"text": "\\ud83d\\ude00 fine", "label": "a"}', '{"text": "cut \\ud83d", "label": "b"}']
    path = write(tmp_path, "\n".join(rows), "train.jsonl")
    with pytest.raises(DataError, match="unpaired surrogate") as caught:
        TextCSV(train=path).load()
    assert caught.value.problems[0].where == f"{path}:2"


def test_missing_json_label_does_not_suggest_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "one"}\n', "train.jsonl")
    with pytest.raises(DataError, match="unknown column 'label'") as caught:
        TextCSV(train=path).load()
    assert "delimiter" not in str(caught.value.problems[0].fix)


def test_spec_from_options_without_data(tmp_path: Path) -> None:
    assert TextCSV(train="nowhere.csv").spec.classes == ()
    assert TextCSV(train="nowhere.csv", label=("a", "b"), target="labels").spec.classes == ("a", "b")


def test_table_name_in_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFER_DATA", str(tmp_path))
    write(tmp_path, TABLE, "in_the_folder.csv")
    assert len(TextCSV(train="in_the_folder.csv").load().splits["train"]) == 2


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file") as caught:
        TextCSV(train=str(tmp_path / "none.csv")).load()
    assert caught.value.problems[0].where == str(tmp_path / "none.csv")


def test_missing_column_lists_available_and_nearest(tmp_path: Path) -> None:
    message = problem(tmp_path, TABLE, text="texts")
    assert "train.csv:2: unknown column 'texts'" in message
    assert "available: label, text" in message
    assert "did you mean 'text'?" in message


def test_a_table_with_an_unusual_delimiter_is_explained(tmp_path: Path) -> None:
    assert "set delimiter" in problem(tmp_path, "text~label\nabc~x\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nfine,x\n  ,y\n", "train.csv:3: column 'text' is empty"),
        ("text,label\nfine,x\nslow, \n", "train.csv:3: column 'label' is empty"),
        ('text,label\n"a\nb",x\none,two,three\n', "train.csv:4: the row is malformed: expected 2 fields, got 3"),
        ("text,label\nfine,x\nslow\n", "train.csv:3: the row is malformed: expected 2 fields, got 1"),
        ('text,label\n"fine, so",x\n"never closed,y\nmore,x\n', "train.csv:3: the row cannot be parsed"),
        (b"text,label\nfine,x\ncaf\xe9,y\n", "train.csv:3: byte 0xe9 is not utf-8-sig"),
        (b"\xef\xbb\xbftext,label\nfine,x\n\xe9,y\n", "train.csv:3: byte 0xe9 is not utf-8-sig"),
        ("text,label\nfine,x\nslow,x\n", "train.csv: column 'label' contains only the class 'x'"),
        ("text,label,text\nfine,x,y\n", "train.csv:1: two columns are called 'text'"),
        ("text,label\n", "train.csv: the table contains no rows"),
        ("", "train.csv: the table contains no rows"),
    ],
)
def test_wrong_table_error_has_file_and_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert message in problem(tmp_path, content)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', "a.jsonl:2: the line is not JSON"),
        ('["b", "x"]', "a.jsonl:2: the line is malformed: expected a JSON object, got list"),
        ('{"text": "b", "label": ["x", "y"]}', "a.jsonl:2: column 'label' is wrong: expected one value, got a list"),
        ('{"text": "b", "label": null}', "a.jsonl:2: column 'label' is empty"),
        ('{"text": "b", "labels": "x"}', "a.jsonl:2: unknown column 'label'"),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    assert message in problem(tmp_path, '{"text": "a", "label": "x"}\n' + line + "\n", "a.jsonl")


@pytest.mark.parametrize(
    ("value", "target", "message"),
    [
        ("2", "labels", "train.csv:3: column 'a' is wrong: expected 0 or 1, got '2'"),
        ("many", "number", "train.csv:3: column 'a' is wrong: expected a finite number, got 'many'"),
        ("nan", "number", "train.csv:3: column 'a' is wrong: expected a finite number, got 'nan'"),
    ],
)
def test_a_target_that_cannot_be_parsed_is_named(tmp_path: Path, value: str, target: str, message: str) -> None:
    content = f"text,a\none,1\ntwo,{value}\n"
    assert message in problem(tmp_path, content, label="a", target=target)


def test_a_class_that_training_never_saw_is_named(tmp_path: Path) -> None:
    train = write(tmp_path, TABLE)
    test = write(tmp_path, "text,label\nFine,good\nOdd,strange\n", "test.csv")
    with pytest.raises(DataError, match="'strange' is not in the training data") as caught:
        TextCSV(train=train, test=test).load()
    assert caught.value.problems[0].where == f"{test}:3"
    assert caught.value.problems[0].available == ("bad", "good")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": ("a", "b")}, "a class is in one column"),
        ({"label": ("a", "b"), "target": "label_list"}, "a label list is in one column"),
        ({"separator": ""}, "separator is empty"),
        ({"label": ()}, "do not name different columns"),
        ({"label": "text"}, "do not name different columns"),
        ({"delimiter": ";;"}, "one character"),
        ({"encoding": "utf-9"}, "unknown encoding 'utf-9'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextCSV(train="a.csv", **options)


# --------------------------------------------------------------------------------------------------------- text_folder


def plant(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"\ufefftext of {name}", encoding="utf-8")
    return str(root)


def sizes(root: str, **options: Any) -> dict[str, int]:
    return {name: len(split) for name, split in TextFolder(root=root, **options).load().splits.items()}


def test_class_folders_are_read_in_order(tmp_path: Path) -> None:
    root = plant(tmp_path, "train/b/1.txt", "train/a/2.txt", "train/a/deep/1.txt", "test/a/x.TXT", "test/b/y.txt")
    data = TextFolder(root=root).load()
    train = data.splits["train"]
    assert data.spec.classes == ("a", "b")
    assert train.fields["text"] == ["text of train/a/2.txt", "text of train/a/deep/1.txt", "text of train/b/1.txt"]
    assert train.targets.tolist() == [0, 0, 1]
    assert train.names[2] == f"{root}/train/b/1.txt"
    assert TextFolder(root=root).spec.classes == ()


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "val", "test"), {"train": 2, "validation": 2, "test": 2}),
        (("train", "valid"), {"train": 2, "validation": 2}),
        (("train", "test"), {"train": 2, "test": 2}),
        (("train",), {"train": 2}),
    ],
)
def test_folders_of_splits_go_by_their_usual_names(
    tmp_path: Path, folders: tuple[str, ...], splits: dict[str, int]
) -> None:
    root = plant(tmp_path, *(f"{folder}/{label}/1.txt" for folder in folders for label in "ab"))
    assert sizes(root) == splits


def test_test_split_from_class_folders_without_splits(tmp_path: Path) -> None:
    root = plant(tmp_path, *(f"{label}/{number}.txt" for label in "ab" for number in range(10)))
    data = TextFolder(root=root, test_fraction=0.3).load()
    assert {name: split.targets.tolist() for name, split in data.splits.items()} == {
        "train": [0] * 7 + [1] * 7,
        "test": [0] * 3 + [1] * 3,
    }
    again = TextFolder(root=root, test_fraction=0.3).load()
    assert list(again.splits["test"].names) == list(data.splits["test"].names)
    assert sizes(root, test_fraction=0.0) == {"train": 20}


def test_other_files_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = plant(tmp_path, "train/a/1.txt", "train/b/1.txt", "train/b/notes.md", "train/README", "train/a/.hidden.txt")
    assert sizes(root) == {"train": 2}
    assert "skipped 2 files that are no texts: 1 without extension, 1 .md" in caplog.text


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("1.txt",), {}, "contains 1 files but no class folder"),
        (("a/1.txt",), {}, "only one class, 'a'"),
        (("a/1.txt", "b/1.md"), {}, "class 'b' has no texts, only 1 .md"),
        (("a/1.txt", "b/1.txt"), {}, "class 'a' has too few texts"),
        (("train/a/1.txt", "train/b/1.txt", "test/a/1.txt", "test/c/1.txt"), {}, "unknown class 'c'"),
        (("train/a/1.txt", "train/b/1.txt", "test/a/1.md"), {}, "the folder contains no texts"),
        (("train/a/1.txt", "train/b/1.txt"), {"test": "held_out"}, "there is no folder 'held_out'"),
        (("train/a/1.txt", "val/a/1.txt", "valid/a/1.txt"), {}, "can each be the val split"),
    ],
)
def test_a_wrong_folder_is_explained(
    tmp_path: Path, names: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    root = plant(tmp_path, *names)
    with pytest.raises(DataError, match=message) as caught:
        TextFolder(root=root, **options).load()
    assert str(caught.value.problems[0].where).startswith(root)
    assert caught.value.problems[0].fix


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    root = plant(tmp_path, "train/a/1.txt", "train/b/1.txt")
    (tmp_path / "train/b/1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="byte 0xe9 is not utf-8-sig") as caught:
        TextFolder(root=root).load()
    assert caught.value.problems[0].where == f"{root}/train/b/1.txt"
    assert TextFolder(root=root, encoding="latin-1").load().splits["train"].fields["text"][1] == "caf\xe9"


def test_empty_texts_of_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = plant(tmp_path, *(f"train/{label}/{number}.txt" for label in "ab" for number in range(3)))
    for name, content in {"a/1": " ", "b/0": "<br />", "b/2": "&nbsp;\u200b"}.items():
        (tmp_path / f"train/{name}.txt").write_text(content)
    with pytest.raises(DataError) as caught:
        TextFolder(root=root).load()
    table = "3 of 6 texts are empty:\n  train/a/1.txt\n  train/b/0.txt\n  train/b/2.txt"
    assert caught.value.problems[0].message == table
    assert "bad_texts: skip" in (caught.value.problems[0].fix or "")
    train = TextFolder(root=root, bad_texts="skip").load().splits["train"]
    assert (len(train), train.targets.tolist(), train.name(2)) == (3, [0, 0, 1], f"{root}/train/b/1.txt")
    assert table in caplog.text


@pytest.mark.parametrize(
    ("names", "options", "count"),
    [
        (["10101", "10102.eml"], {}, 4),
        (["1.md", "2.text", "image.bin"], {}, 4),
        (["1.txt", "2.md"], {}, 2),
        (["1.txt", "2.md"], {"extensions": (".MD", ".txt")}, 4),
        (["1", "2.md"], {"extensions": ("",)}, 2),
    ],
)
def test_texts_of_a_folder_may_have_any_extension(
    tmp_path: Path, names: list[str], options: dict[str, Any], count: int
) -> None:
    root = plant(tmp_path, "README.txt", *(f"{label}/{name}" for label in "ab" for name in names))
    for binary in tmp_path.glob("*/*.bin"):
        binary.write_bytes(b"\x89\0\0")
    assert sizes(root, test_fraction=0.0, **options) == {"train": count}


def test_pipe_among_texts_is_refused(tmp_path: Path) -> None:
    root = plant(tmp_path, "train/a/1.txt", "train/b/1.txt")
    os.mkfifo(tmp_path / "train/b/2.txt")
    with pytest.raises(DataError, match="it is no regular file"):
        TextFolder(root=root).load()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", True), (" \n\t", True), ("<br /><P>", True), ("&nbsp;", True), ("\u200b\ufeff", True), ("\ufeffa", False)]
    + [(text, False) for text in (":)", "!", "&amp;", "<3", "<user>", "你", "<b>a</b>")],
)
def test_empty_text(text: str, expected: bool) -> None:
    assert is_empty(text) == expected


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_empty_texts_of_table(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("one", "a"), (" ", "b"), ("two", "b"), ("<br />", "a"), ("three", "a")]
    path = tmp_path / f"train.{suffix}"
    if suffix == "csv":
        path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    else:
        path.write_text("".join(json.dumps({"text": text or None, "label": label}) + "\n" for text, label in rows))
    lines = "lines 3, 5" if suffix == "csv" else "lines 2, 4"
    with pytest.raises(DataError, match=f"column 'text' is empty in 2 of 5 rows: {lines}") as caught:
        TextCSV(train=str(path)).load()
    assert "bad_texts: skip" in (caught.value.problems[0].fix or "")
    train = TextCSV(train=str(path), bad_texts="skip").load().splits["train"]
    assert list(train.fields["text"]) == ["one", "two", "three"]
    assert train.name(2) == f"{path}:{6 if suffix == 'csv' else 5}"
    assert f"left out: column 'text' is empty in 2 of 5 rows: {lines}" in caplog.text


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder does not exist"):
        TextFolder(root=str(tmp_path / "none")).load()


@pytest.mark.parametrize("options", [{"val": "train"}, {"encoding": "utf-9"}])
def test_text_folder_refuses_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TextFolder(root="texts", **options)


# --------------------------------------------------------------------------------------------------------- huggingface


def test_huggingface_without_library_states_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DataError, match="not installed") as caught:
        HuggingFace(dataset="stanfordnlp/imdb").load()
    assert caught.value.problems[0].fix == "pip install 'transferkit[huggingface]'"


@pytest.mark.parametrize(
    "options", [{}, {"train": "a.pickle"}, {"dataset": "x", "label": "text"}, {"dataset": "x", "label": ("a", "b")}]
)
def test_huggingface_refuses_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        HuggingFace(**options)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = pytest.importorskip("datasets", reason="the extra `huggingface` is not installed")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found.disable_progress_bars()
    return found


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_files_are_read_by_the_library(library: Any, tmp_path: Path, suffix: str) -> None:
    rows = library.Dataset.from_dict({"text": ["one, two", "three", "four"], "label": ["x", "y", "x"]})
    path = str(tmp_path / f"train.{suffix}")
    getattr(rows, {"jsonl": "to_json"}.get(suffix, f"to_{suffix}"))(path)
    data = HuggingFace(train=path, test=path).load()
    assert data.spec.classes == ("x", "y")
    assert data.splits["test"].fields["text"] == ["one, two", "three", "four"]
    assert data.splits["train"].targets.tolist() == [0, 1, 0]
    assert data.splits["train"].name(2) == (f"{path}[2]" if suffix == "parquet" else f"{path}:{4 - (suffix != 'csv')}")


def test_a_saved_dataset_keeps_its_classes_and_splits(library: Any, tmp_path: Path) -> None:
    features = library.Features({"text": library.Value("string"), "label": library.ClassLabel(names=["neg", "pos"])})
    rows = library.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    library.DatasetDict({"train": rows, "test": rows, "unsupervised": rows}).save_to_disk(str(tmp_path / "saved"))
    data = HuggingFace(dataset=str(tmp_path / "saved")).load()
    assert (list(data.splits), data.spec.classes) == (["train", "test"], ("neg", "pos"))
    assert data.splits["train"].targets.tolist() == [1, 0]
    with pytest.raises(DataError, match="unknown split 'held_out'") as caught:
        HuggingFace(dataset=str(tmp_path / "saved"), test="held_out").load()
    assert caught.value.problems[0].available == ("train", "test", "unsupervised")


def test_lists_of_labels_and_numbers_are_targets(library: Any, tmp_path: Path) -> None:
    rows = library.Dataset.from_dict(
        {"text": ["a", "b"], "tags": [["war", "drama"], []], "stars": [1.5, -2], "good": [True, False]}
    )
    rows.to_parquet(path := str(tmp_path / "rows.parquet"))
    lists = HuggingFace(train=path, label="tags", target="label_list").load()
    assert lists.spec.classes == ("drama", "war")
    assert lists.splits["train"].targets.tolist() == [[1, 1], [0, 0]]
    numbers = HuggingFace(train=path, label="stars", target="number").load()
    assert numbers.splits["train"].targets.tolist() == [[1.5], [-2]]
    assert HuggingFace(train=path, label="good", target="labels").load().splits["train"].targets.tolist() == [[1], [0]]
    with pytest.raises(DataError, match="expected 0 or 1"):
        HuggingFace(train=path, label="stars", target="labels").load()


def test_unlabelled_rows_and_missing_columns_are_named(library: Any, tmp_path: Path) -> None:
    features = library.Features({"text": library.Value("string"), "label": library.ClassLabel(names=["neg", "pos"])})
    rows = library.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="column 'label' is -1") as caught:
        HuggingFace(dataset=str(tmp_path / "saved")).load()
    assert caught.value.problems[0].where == "train[1]"
    with pytest.raises(DataError, match="unknown column 'review'"):
        HuggingFace(dataset=str(tmp_path / "saved"), text="review").load()


def test_a_broken_file_is_named(library: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read") as caught:
        HuggingFace(train=str(tmp_path / "broken.parquet")).load()
    assert caught.value.problems[0].where == str(tmp_path / "broken.parquet")


# The tests below need no library: this one returns the given splits.


class Rows(list[dict[str, Any]]):
    """Rows of one split in the interface of the library."""

    features: dict[str, Any] = {}

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def select_columns(self, names: list[str]) -> Rows:
        return Rows({name: row[name] for name in names} for row in self)

    def iter(self, batch_size: int) -> Any:
        for start in range(0, len(self), batch_size):
            batch = self[start : start + batch_size]
            yield {name: [row[name] for row in batch] for name in batch[0]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Rows]:
    splits: dict[str, Rows] = {}
    library = SimpleNamespace(load_dataset=lambda *_, **__: splits)
    monkeypatch.setattr(importlib, "import_module", {"datasets": library}.__getitem__)
    return splits


def test_hub_dataset_follows_rules_of_tables(hub: dict[str, Rows]) -> None:
    hub["train"] = Rows({"text": f"text {i}", "label": i % 2, "image": b""} for i in range(2500))
    hub["train"].features = {"label": SimpleNamespace(names=["neg", "pos"])}
    hub["test"] = hub["train"]
    data = HuggingFace(dataset="a/b").load()
    assert (list(data.splits), data.spec.classes) == (["train", "test"], ("neg", "pos"))
    assert data.splits["train"].targets.tolist() == [0, 1] * 1250
    assert data.splits["train"].fields["text"][2499] == "text 2499"
    assert data.splits["test"].name(2) == "test[2]"
    with pytest.raises(DataError, match="unknown column 'review'") as caught:
        HuggingFace(dataset="a/b", text="review").load()
    assert caught.value.problems[0].available == ("text", "label", "image")
    hub["train"][1]["label"] = -1
    hub["train"][7] |= {"text": "", "label": -1}
    hub["train"][9]["label"] = -1
    with pytest.raises(DataError, match="column 'label' is -1, no label, in 2 of 2,500 rows: rows 1, 9") as caught:
        HuggingFace(dataset="a/b").load()
    assert [problem.where for problem in caught.value.problems] == ["train[1]", "train[7]"]
    assert HuggingFace(dataset="a/b", bad_texts="skip").load().splits["train"].name(1) == "train[2]"


def test_unlabeled_hub_test_split_is_not_used(hub: dict[str, Rows], caplog: pytest.LogCaptureFixture) -> None:
    for name, labels in {"train": [0, 1], "validation": [1, 0], "test": [-1, -1]}.items():
        hub[name] = Rows({"text": f"{name} {index}", "label": label} for index, label in enumerate(labels))
        hub[name].features = {"label": SimpleNamespace(names=["no", "yes"])}
    data = HuggingFace(dataset="glue").load()
    assert list(data.splits) == ["train", "validation"]
    assert "glue: the split 'test' is not used: all its labels are -1 or null" in caplog.text
    with pytest.raises(DataError, match="the split 'test' has no labels") as caught:
        HuggingFace(dataset="glue", test="test").load()
    assert "test: validation" in (caught.value.problems[0].fix or "")
    assert list(HuggingFace(dataset="glue", test="validation").load().splits) == ["train", "test"]
    hub["test"][1]["label"] = 1
    with pytest.raises(DataError, match="column 'label' is -1"):
        HuggingFace(dataset="glue").load()


@pytest.mark.parametrize("missing", [None, float("nan")])
@pytest.mark.parametrize("target", ["class", "label_list", "number", "labels"])
def test_null_label_of_the_hub_is_refused(hub: dict[str, Rows], missing: object, target: str) -> None:
    values = [["a"], ["b"], missing] if target == "label_list" else [0.0, 1.0, missing]
    hub["train"] = Rows({"text": "a text", "label": value} for value in values)
    with pytest.raises(DataError, match="column 'label' is") as caught:
        HuggingFace(dataset="a/b", target=target).load()  # type: ignore[arg-type]
    assert caught.value.problems[0].where == "train[2]"
    hub["train"].pop()
    classes = ("a", "b") if target == "label_list" else ("0", "1") if target == "class" else ("label",)
    assert HuggingFace(dataset="a/b", target=target).load().spec.classes == classes  # type: ignore[arg-type]


def test_multi_hot_rows_of_the_hub_need_names(hub: dict[str, Rows]) -> None:
    hub["train"] = Rows({"text": "a text", "label": row} for row in ([0, 0, 1], [1, 0, 1]))
    with pytest.raises(DataError, match="rows of zeros and ones"):
        HuggingFace(dataset="a/b", target="label_list").load()
    data = HuggingFace(dataset="a/b", target="label_list", label_names=("a", "b", "c")).load()
    assert data.splits["train"].targets.tolist() == [[0, 0, 1], [1, 0, 1]]


def test_local_files_are_read_without_the_library(tmp_path: Path) -> None:
    rows = "".join(f"sentence {number}\t{('NA', 'yes')[number % 2]}\n" for number in range(8))
    path = write(tmp_path, "text\tlabel\n" + rows + '"Hello he said\tNA\nand smiled"\tyes\n', "train.tsv")
    data = HuggingFace(train=path).load()
    assert data.spec.classes == ("NA", "yes")
    assert data.splits["train"].fields["text"][8:] == ['"Hello he said', 'and smiled"']
