"""Labels as files contain them: nulls, floats, lists in several notations, rows of zeros and ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfer import ConfigError, Data, DataError, Tables
from transfer.data.targets import is_multi_hot, parse_label_list


def read(path: Path, content: str, **options: Any) -> Data:
    path.write_text(content, encoding="utf-8")
    return Tables(**{"train": str(path), "example": "text", "column": "text", "label": "label"} | options).read("text")


def lines(*labels: object) -> str:
    return "".join(json.dumps({"text": f"text {index}", "label": label}) + "\n" for index, label in enumerate(labels))


# --------------------------------------------------------------------------------------------------------- null labels


@pytest.mark.parametrize("missing", [None, float("nan"), "", " "])
@pytest.mark.parametrize("target", ["class", "number", "labels"])
def test_null_label_is_refused(tmp_path: Path, missing: object, target: str) -> None:
    with pytest.raises(DataError, match="column 'label' is empty") as caught:
        read(tmp_path / "a.jsonl", lines(0, 1, missing), target=target)
    assert caught.value.problems[0].where == f"{tmp_path}/a.jsonl:3"


@pytest.mark.parametrize("names", [("NA", "None"), ("nan", "null"), ("NaN", "yes")])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_class_with_the_name_of_a_null_stays(tmp_path: Path, names: tuple[str, str], suffix: str) -> None:
    content = lines(*names) if suffix == "jsonl" else f"text,label\na,{names[0]}\nb,{names[1]}\n"
    assert read(tmp_path / f"a.{suffix}", content).spec.classes == tuple(sorted(names))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ((0.0, 1.0), ("0", "1")),
        (("0.0", "1.0"), ("0", "1")),
        ((0, 1.0, "1.00"), ("0", "1")),
        ((-1.0, 1), ("-1", "1")),
        (("1.0", "1.5"), ("1.0", "1.5")),
        (("1.0", "x"), ("1.0", "x")),
        (("01", "02"), ("01", "02")),
        ((True, False), ("false", "true")),
    ],
)
def test_integers_with_decimals_are_classes_without(
    tmp_path: Path, labels: tuple[object, ...], classes: tuple[str, ...]
) -> None:
    assert read(tmp_path / "a.jsonl", lines(*labels)).spec.classes == classes
    if not any(isinstance(label, bool) for label in labels):
        content = "text,label\n" + "".join(f"text,{label}\n" for label in labels)
        assert read(tmp_path / "a.csv", content).spec.classes == classes


def test_zero_decimals_in_one_table_name_the_same_class(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("text,label\na,1.0\nb,0.0\n")
    data = read(tmp_path / "a.csv", "text,label\na,1\nb,0\n", test=str(tmp_path / "test.csv"))
    assert data.splits["test"].targets.tolist() == [1, 0]


def test_null_example_or_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'text' is empty"):
        read(tmp_path / "a.jsonl", '{"text": null, "label": "x"}\n' + lines("y"))
    rows = [{"text": "a", "label": label, "who": who} for label, who in (("x", 1.0), ("y", float("nan")))]
    with pytest.raises(DataError, match="column 'who' is empty"):
        read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)), group="who")


def test_examples_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected text, got list"):
        read(tmp_path / "a.jsonl", '{"text": ["a"], "label": "x"}\n')


# --------------------------------------------------------------------------------------------------------- label lists


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        ("a|b c", ("a", "b c")),
        ("", ()),
        ("['a', 'b c']", ("a", "b c")),
        ('["a", "b|c"]', ("a", "b|c")),
        (" [ 'a' , \"it's\", ] ", ("a", "it's")),
        ("[]", ()),
        ("()", ()),
        ("('a', 'b')", ("a", "b")),
        ("{'a', 'b'}", ("a", "b")),
        ("[drama, science fiction]", ("drama", "science fiction")),
        ("[0, 1, 0]", ("0", "1", "0")),
        (r"['caf\u00e9', 'a\'b']", ("caf\u00e9", "a'b")),
        (["a ", "", "b"], ("a", "b")),
        ([1, 2.0, True], ("1", "2", "true")),
        ([], ()),
        ("smile :)|(sad", ("smile :)", "(sad")),
    ],
)
def test_label_list_in_every_notation(value: object, labels: tuple[str, ...]) -> None:
    assert parse_label_list(value, "|") == labels


@pytest.mark.parametrize(
    "value",
    [
        None,
        float("nan"),
        3,
        {"a": 1},
        ["a", None],
        ["a", ["b"]],
        ["a", float("nan")],
        "['a' 'b']",
        "['a', ['b']]",
        "[a]|[b]",
    ],
)
def test_value_that_is_no_label_list_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="labels"):
        parse_label_list(value, "|")


def test_wrong_label_list_error_has_file_and_line(tmp_path: Path) -> None:
    for value in (None, ["a", None]):
        with pytest.raises(DataError, match="column 'label' is wrong") as caught:
            read(tmp_path / "a.jsonl", lines(["a"], ["b"], value), target="label_list")
        assert caught.value.problems[0].where == f"{tmp_path}/a.jsonl:3"


def test_python_lists_in_csv_are_label_lists(tmp_path: Path) -> None:
    content = "text,label\none,\"['a', 'b']\"\ntwo,['b']\nthree,[]\n"
    data = read(tmp_path / "a.csv", content, target="label_list")
    assert data.spec.classes == ("a", "b")
    assert data.splits["train"].targets.tolist() == [[1, 1], [0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("0", "0", "1"), ("1", "0", "0")], True),
        ([("0", "1"), ("1", "0")], True),
        ([("0", "0", "1"), ("1", "0")], True),
        ([("false", "true"), ("True", "False")], True),
        ([("0",), ("1",)], False),
        ([("0", "1"), ("1",), ()], False),
        ([("a", "b"), ("b", "c")], False),
        ([("0", "0", "2"), ("1", "0", "0")], False),
    ],
)
def test_rows_of_zeros_and_ones_are_recognized(rows: list[tuple[str, ...]], expected: bool) -> None:
    assert is_multi_hot(rows) is expected


MULTI_HOT = [[0, 0, 1], [1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_multi_hot_rows_need_names(tmp_path: Path, suffix: str) -> None:
    table = "text,label\n" + "".join(f'text {i},"{row}"\n' for i, row in enumerate(MULTI_HOT))
    content = lines(*MULTI_HOT) if suffix == "jsonl" else table
    with pytest.raises(DataError, match="rows of zeros and ones") as caught:
        read(tmp_path / f"a.{suffix}", content, target="label_list")
    assert "a list of 3 names" in str(caught.value.problems[0].fix)
    options = {"target": "label_list", "label_names": ("war", "love", "death")}
    data = read(tmp_path / f"a.{suffix}", content, **options)
    assert data.spec.classes == ("war", "love", "death")
    np.testing.assert_array_equal(data.splits["train"].targets, MULTI_HOT)


def test_wrong_multi_hot_row_is_named(tmp_path: Path) -> None:
    for row in ([0, 1], [0, 1, 2], ["war"]):
        with pytest.raises(DataError, match="expected 3 zeros and ones") as caught:
            read(tmp_path / "a.jsonl", lines([0, 0, 1], row), target="label_list", label_names=("a", "b", "c"))
        assert caught.value.problems[0].where == f"{tmp_path}/a.jsonl:2"


@pytest.mark.parametrize("options", [{"target": "class"}, {"target": "label_list", "label_names": ("a", "a")}])
def test_label_names_without_use_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="label_names"):
        Tables(**{"train": "a", "example": "text", "column": "text", "label": "b", "label_names": ("a",)} | options)


@pytest.mark.parametrize("names", [("['a', 'b']", "['a']"), ("[0, 1]", "[1, 0]")])
def test_lists_are_no_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="contains lists of labels") as caught:
        read(tmp_path / "a.csv", f'text,label\none,"{names[0]}"\ntwo,"{names[1]}"\n')
    assert caught.value.problems[0].fix == "set target: label_list"
    assert read(tmp_path / "a.csv", "text,label\none,[NEUTRAL]\ntwo,[GOOD]\n").spec.classes == ("[GOOD]", "[NEUTRAL]")


def test_another_separator_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tmp_path / "a.csv", "text,label\none,a|b\ntwo,c\n", target="label_list")
    assert "some labels contain '|': set separator" in caplog.text
    caplog.clear()
    read(tmp_path / "a.csv", "text,label\none,a|b\ntwo,c\n", target="label_list", separator="|")
    assert not caplog.text
