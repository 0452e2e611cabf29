"""Delimited files as people write them: stray quotes, escapes, no header, unused columns, other delimiters."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from transfer import ConfigError, Data, DataError, Tables

ROWS = [(f"sentence number {number}", "pos" if number % 2 else "neg") for number in range(40)]


def read(path: Path, content: str | bytes, **options: Any) -> Data:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Tables(**{"train": str(path), "example": "text", "column": "text", "label": "label"} | options).read("text")


def texts(data: Data) -> list[str]:
    return list(data.splits["train"].fields["text"])


def labels(data: Data) -> list[str]:
    return [data.spec.classes[index] for index in data.splits["train"].targets]


def delimited(rows: list[tuple[str, str]], delimiter: str) -> str:
    return "".join(f"{text}{delimiter}{label}\n" for text, label in rows)


# -------------------------------------------------------------------------------------------------------- stray quotes

STRAY = [
    *ROWS[:5],
    ('"Hello he said', "pos"),
    *ROWS[6:9],
    ('and she smiled"', "neg"),
    *ROWS[10:20],
    ('"Really" she asked "me"', "pos"),
    *ROWS[21:],
]


@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("reverse", [False, True], ids=["text first", "label first"])
def test_stray_quotes_swallow_no_rows(tmp_path: Path, delimiter: str, reverse: bool) -> None:
    rows = [("text", "label"), *STRAY]
    content = delimited([row[::-1] for row in rows] if reverse else rows, delimiter)
    data = read(tmp_path / "table.csv", content)
    assert list(zip(texts(data), labels(data), strict=True)) == STRAY


def test_choice_of_quoting_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tmp_path / "table.tsv", "text\tlabel\n" + delimited(STRAY, "\t"))
    assert "table.tsv: quotes are read as part of the text; set quoting" in caplog.text


def test_explicit_quoting_is_used(tmp_path: Path) -> None:
    content = 'text,label\n"one",x\n"two",y\n'
    assert texts(read(tmp_path / "a.csv", content)) == ["one", "two"]
    assert texts(read(tmp_path / "a.csv", content, quoting="none")) == ['"one"', '"two"']
    with pytest.raises(DataError, match="cannot be parsed"):
        read(tmp_path / "a.csv", 'text,label\n"one,x\ntwo,y\n', quoting="csv")


def test_field_that_swallows_rows_is_refused(tmp_path: Path) -> None:
    # One field contains a delimiter in quotes, so the file is CSV, and two stray quotes form a field over five lines.
    content = "text,label\n" + delimited([('"one, two"', "neg"), *STRAY], ",")
    with pytest.raises(DataError, match="spans lines 8 to 12, which look like separate rows") as caught:
        read(tmp_path / "table.csv", content.replace('"Really" she asked "me"', "plain"))
    problem = caught.value.problems[0]
    assert problem.where == f"{tmp_path}/table.csv:8"
    assert "quoting: none" in str(problem.fix)
    data = read(tmp_path / "table.csv", content.replace('"Really" she asked "me"', "plain"), quoting="csv")
    assert len(texts(data)) == 37


def test_fields_over_several_lines_stay(tmp_path: Path) -> None:
    rows = [*ROWS[:9], ("Dear all, hello\nit is fine, really\nbye", "pos"), ("One, two\nthree", "neg")]
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    data = read(tmp_path / "table.csv", (tmp_path / "table.csv").read_bytes())
    assert list(zip(texts(data), labels(data), strict=True)) == rows


def test_multiline_field_with_delimiters_is_kept(tmp_path: Path) -> None:
    data = read(tmp_path / "table.csv", "text,label\n" + delimited([*ROWS[:9], ('"Hello, world\nfine"', "pos")], ","))
    assert texts(data)[-1] == "Hello, world\nfine"


@pytest.mark.parametrize("header", [True, False])
def test_quoted_delimiters_in_equal_number_per_row(tmp_path: Path, header: bool) -> None:
    rows = [*([("text", "label")] if header else []), *((f'"Bears, {text}"', f'"{label}"') for text, label in ROWS)]
    columns = {} if header else {"header": False, "column": 0, "label": 1}
    assert texts(read(tmp_path / "ag.csv", delimited(rows, ","), **columns))[:2] == [
        "Bears, sentence number 0",
        "Bears, sentence number 1",
    ]


def test_quote_of_unknown_meaning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="starts with a quote that is not closed in its line") as caught:
        read(tmp_path / "a.tsv", 'text\tlabel\n"one\tx\ntwo"\ty\n')
    problem = caught.value.problems[0]
    assert (problem.where, "quoting: none" in str(problem.fix)) == (f"{tmp_path}/a.tsv:2", True)


def test_wrong_row_of_a_csv_file_is_named(tmp_path: Path) -> None:
    content = '"text","label"\n"one ""two""","x"\n"three "four" five","y"\n'
    with pytest.raises(DataError, match="cannot be parsed") as caught:
        read(tmp_path / "table.csv", content)
    assert caught.value.problems[0].where == f"{tmp_path}/table.csv:3"


@pytest.mark.parametrize("text", ['he said "no"', 'he said "no", then', 'a \\ and "C:\\new"', '"'])
def test_backslashes_escape_quotes(tmp_path: Path, text: str) -> None:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    data = read(tmp_path / "table.csv", f'text,label\n"{escaped}","x"\n"plain \\"text\\"","y"\n')
    assert texts(data) == [text, 'plain "text"']


def test_trailing_backslash_of_csv_field_is_kept(tmp_path: Path) -> None:
    data = read(tmp_path / "table.csv", 'text,label\n"in C:\\",x\n"one, two",y\n')
    assert texts(data) == ["in C:\\", "one, two"]


# ---------------------------------------------------------------------------------------------------- header, columns


def test_columns_without_header_have_numbers(tmp_path: Path) -> None:
    content = delimited([(label, f'{text}, "ok') for text, label in ROWS], "\t")
    data = read(tmp_path / "SMSSpamCollection", content, header=False, column=1, label=0)
    assert (len(texts(data)), texts(data)[0], labels(data)[0]) == (40, 'sentence number 0, "ok', "neg")
    assert data.splits["train"].name(0) == f"{tmp_path}/SMSSpamCollection:1"


def test_columns_without_header_have_the_given_names(tmp_path: Path) -> None:
    content = '"3","Wall St. Bears","Reuters - ""Short-sellers"", said"\n"1","Peace","in the east"\n'
    data = read(tmp_path / "ag.csv", content, header=("label", "title", "text"))
    assert texts(data) == ['Reuters - "Short-sellers", said', "in the east"]
    assert labels(data) == ["3", "1"]
    with pytest.raises(DataError, match="expected 2 fields, got 3"):
        read(tmp_path / "ag.csv", content, header=("label", "text"))


def test_unknown_column_without_header_lists_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown column '2'") as caught:
        read(tmp_path / "a.csv", "a,x\nb,y\n", header=False, column=2, label=1)
    assert caught.value.problems[0].available == ("0", "1")


def test_first_row_of_data_as_header_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown column") as caught:
        read(tmp_path / "a.csv", "good film,pos\nbad film,neg\n")
    assert "header: false" in str(caught.value.problems[0].fix)


@pytest.mark.parametrize("header", ["v1,v2,,,", "v1,v2,x,x,x"])
def test_unused_columns_may_have_empty_or_equal_names(tmp_path: Path, header: str) -> None:
    content = f"{header}\nham,Hello,,,\nspam,Win \xa35,,,\n".encode("cp1252")
    data = read(tmp_path / "spam.csv", content, column="v2", label="v1", encoding="cp1252")
    assert texts(data) == ["Hello", "Win \xa35"]


def test_used_columns_have_one_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two columns are called 'label'"):
        read(tmp_path / "a.csv", "text,label,label\na,x,y\n")
    with pytest.raises(DataError, match="two columns are called 'a'"):
        read(tmp_path / "a.csv", "a,a,label\n1,2,x\n", column=None)


def test_trailing_empty_fields_are_ignored(tmp_path: Path) -> None:
    assert texts(read(tmp_path / "a.csv", "text,label\none,x,,\ntwo,y\n")) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "table"])
@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("header", [True, False])
def test_delimiter_is_chosen_by_content(tmp_path: Path, name: str, delimiter: str, header: bool) -> None:
    content = delimited([*([("text", "label")] if header else []), *ROWS], delimiter)
    columns = {} if header else {"header": False, "column": 0, "label": 1}
    assert texts(read(tmp_path / name, content, **columns)) == [text for text, _ in ROWS]


@pytest.mark.parametrize("header", [(), ("a", "a")])
def test_header_of_equal_or_no_names_is_refused(header: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="header is wrong"):
        Tables(train="a.csv", example="text", column="text", label="label", header=header)


@pytest.mark.parametrize("header", [False, ("label", "text")])
def test_last_blank_separated_column_is_rest_of_line(tmp_path: Path, header: Any) -> None:
    content = 'DESC:manner How did "serfdom develop ?\nNUM:count How many , in all ?\n'
    columns = {"column": 1, "label": 0} if header is False else {}
    data = read(tmp_path / "TREC.txt", content, header=header, delimiter=" ", **columns)
    assert texts(data) == ['How did "serfdom develop ?', "How many , in all ?"]
    assert labels(data) == ["DESC:manner", "NUM:count"]
    with pytest.raises(DataError, match="expected 2 fields, got 1") as caught:
        read(tmp_path / "TREC.txt", content + "NUM\n", header=header, delimiter=" ", **columns)
    assert caught.value.problems[0].where == f"{tmp_path}/TREC.txt:3"
