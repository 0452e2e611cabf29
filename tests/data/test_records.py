"""Files in other formats than their suffix says: compression, JSON, Parquet, workbooks, and archives."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import tarfile
import threading
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from transfer import Data, DataError, Tables
from transfer.data import records

ROWS = [("a good film", "pos"), ("a bad film", "neg"), ("so, so", "pos")]
CSV = b'text,label\na good film,pos\na bad film,neg\n"so, so",pos\n'
OBJECTS = [{"text": text, "label": label} for text, label in ROWS]


def read(path: Path, content: bytes | str | None = None, **options: Any) -> Data:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Tables(**{"train": str(path), "example": "text", "column": "text", "label": "label"} | options).read("text")


def rows(data: Data) -> list[tuple[str, str]]:
    train = data.splits["train"]
    return [(text, data.spec.classes[label]) for text, label in zip(train.fields["text"], train.targets, strict=True)]


def archive(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tar_archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        member = tarfile.TarInfo("a.csv")
        member.size = len(CSV)
        file.addfile(member, io.BytesIO(CSV))
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.zip", "a"])
@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        bz2.compress,
        lzma.compress,
        lambda content: archive({"a.csv": content}),
        lambda content: archive({"data/a.csv": content, "readme": b"read me", "__MACOSX/data/._a.csv": b"\0"}),
    ],
    ids=["gzip", "bzip2", "xz", "zip", "zip with other files"],
)
def test_compression_is_recognized_by_content(tmp_path: Path, name: str, compress: Callable[[bytes], bytes]) -> None:
    data = read(tmp_path / name, compress(CSV))
    assert rows(data) == ROWS
    assert data.splits["train"].name(1) == f"{tmp_path}/{name}:3"


def test_table_with_suffix_of_a_compression_is_read(tmp_path: Path) -> None:
    assert rows(read(tmp_path / "a.csv.gz", CSV)) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive({"[Content_Types].xml": b"<x/>", "xl/workbook.xml": b"<x/>"}), "the file is a spreadsheet"),
        (archive({"mimetype": b"application/x", "content.xml": b"<x/>"}), "the file is a spreadsheet"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), r"it is an Excel workbook \(.xls\)"),
        (archive({"a.csv": CSV, "b.csv": CSV}), "expected one table, got 2 files"),
        (archive({}), "expected one table, got 0 files"),
        (gzip.compress(gzip.compress(CSV)), "compressed twice"),
        (gzip.compress(tar_archive()), "it is a tar archive"),
        (b"\x28\xb5\x2f\xfd1234", "it is compressed with Zstandard"),
        (b"%PDF-1.7", "it is a PDF document"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "it is a Git LFS pointer"),
        (gzip.compress(CSV)[:-9], "cannot be read"),
        (lzma.compress(CSV)[:-9], "cannot be read"),
        (bz2.compress(CSV)[:-9], "cannot be read"),
        (archive({"a.csv": CSV * 99})[:90], "cannot be read"),
    ],
)
def test_file_that_is_no_table_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "train.csv", content)
    problem = caught.value.problems[0]
    assert problem.where == f"{tmp_path}/train.csv"
    assert problem.fix


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress, lambda content: archive({"a.csv": content})])
def test_every_decompression_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(records, "MAX_TABLE_BYTES", 1 << 16)
    with pytest.raises(DataError, match="would unpack to"):
        read(tmp_path / "a.csv", compress(CSV + b" " * (1 << 16)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(CSV,))
    writer.start()
    assert rows(read(tmp_path / "pipe")) == ROWS
    writer.join()


# ---------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a.csv", "a"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("\n".join(map(json.dumps, OBJECTS)), [1, 2, 3]),
        (json.dumps(OBJECTS), [1, 1, 1]),
        (json.dumps(OBJECTS, indent=1), [2, 6, 10]),
        ("\ufeff \n" + json.dumps(OBJECTS), [2, 2, 2]),
    ],
    ids=["lines", "list", "indented list", "byte order mark"],
)
def test_json_is_recognized_by_content(tmp_path: Path, name: str, content: str, lines: list[int]) -> None:
    data = read(tmp_path / name, content)
    assert rows(data) == ROWS
    assert list(data.splits["train"].names) == [f"{tmp_path}/{name}:{line}" for line in lines]


@pytest.mark.parametrize(
    "content",
    [
        {"version": 1, "data": OBJECTS},
        {name: [row[name] for row in OBJECTS] for name in ("text", "label")},
        {name: {str(index): row[name] for index, row in enumerate(OBJECTS)} for name in ("text", "label")},
    ],
    ids=["list under a key", "lists of columns", "pandas columns"],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_object_of_rows_or_columns_is_read(tmp_path: Path, content: object, indent: int | None) -> None:
    data = read(tmp_path / "a.json", json.dumps(content, indent=indent))
    assert rows(data) == ROWS
    assert data.splits["train"].name(2) == f"{tmp_path}/a.json[2]"


def test_indented_objects_after_another_are_read(tmp_path: Path) -> None:
    data = read(tmp_path / "a.json", "\n".join(json.dumps(row, indent=1) for row in OBJECTS))
    assert rows(data) == ROWS
    assert data.splits["train"].name(1) == f"{tmp_path}/a.json:5"


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        ('[{"text": "a", "label": "x"},\n{"text": "b"', ":2", "the file is not JSON"),
        ('[{"text": "a", "label": "x"}\n{"text": "b"}]', ":1", "expected ',' or ']'"),
        ('[{"text": "a", "label": "x"},', "", "does not end"),
        ('[["text", "label"], ["a", "x"]]', ":1", "a list of list"),
        ('{"text": 1}', "", "expected a list of objects"),
        ("[]", "", "contains no rows"),
        ("", "", "contains no rows"),
        ("text,label\na,b\n", ":1", "not JSON"),
        ("[" * 100_000, "", "not JSON"),
    ],
)
def test_wrong_json_is_named(tmp_path: Path, content: str, where: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "a.json", content)
    assert str(caught.value.problems[0].where).startswith(f"{tmp_path}/a.json{where}")


# ------------------------------------------------------------------------------------------------------------- Parquet


class Batch(list[dict[str, object]]):
    """Record batch of the stand-in for pyarrow."""

    def to_pylist(self) -> list[dict[str, object]]:
        return list(self)


@pytest.fixture
def parquet(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for pyarrow, whose Parquet files contain the rows of ``content``."""
    stand_in = types.SimpleNamespace(content=[], metadata=None)

    class File:
        def __init__(self, file: io.BytesIO) -> None:
            if file.read() == b"PAR1 damaged":
                raise ValueError("magic bytes not found in footer")
            names = [*dict.fromkeys(name for row in stand_in.content for name in row)]
            self.schema_arrow = types.SimpleNamespace(names=names, metadata=stand_in.metadata)

        def iter_batches(self, columns: list[str]) -> Any:
            for row in stand_in.content:
                yield Batch([{name: row[name] for name in columns}])

    modules = {"pyarrow.parquet": types.SimpleNamespace(ParquetFile=File), "pyarrow.ipc": types.SimpleNamespace()}
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    return stand_in


def test_parquet_is_recognized_by_content(tmp_path: Path, parquet: types.SimpleNamespace) -> None:
    parquet.content = [{**row, "image": b"\0"} for row in OBJECTS]
    data = read(tmp_path / "a.csv", b"PAR1")
    assert rows(data) == ROWS
    assert data.splits["train"].name(2) == f"{tmp_path}/a.csv[2]"
    with pytest.raises(DataError, match="unknown column 'texts'"):
        read(tmp_path / "a.csv", b"PAR1", column="texts")
    with pytest.raises(DataError, match="magic bytes"):
        read(tmp_path / "a.csv", b"PAR1 damaged")


def test_class_names_in_parquet_metadata_are_used(tmp_path: Path, parquet: types.SimpleNamespace) -> None:
    features = {"label": {"names": ["neg", "pos", "mixed"], "_type": "ClassLabel"}, "text": {"dtype": "string"}}
    parquet.metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    parquet.content = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    data = read(tmp_path / "a.parquet", b"PAR1")
    assert (data.spec.classes, data.splits["train"].targets.tolist()) == (("neg", "pos", "mixed"), [1, 0])
    parquet.content.append({"text": "c", "label": -1})
    with pytest.raises(DataError, match="column 'label' is -1, no label, in 1 of 3 rows"):
        read(tmp_path / "a.parquet", b"PAR1")


def test_null_label_in_parquet_is_named(tmp_path: Path, parquet: types.SimpleNamespace) -> None:
    for missing in (None, float("nan")):
        parquet.content = [{"text": "a", "label": 1.0}, {"text": "b", "label": missing}, {"text": "c", "label": 0.0}]
        with pytest.raises(DataError, match="column 'label' is empty") as caught:
            read(tmp_path / "a.parquet", b"PAR1")
        assert caught.value.problems[0].where == f"{tmp_path}/a.parquet[1]"
        del parquet.content[1]
        assert read(tmp_path / "a.parquet", b"PAR1").spec.classes == ("0", "1")


def test_parquet_without_pyarrow_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DataError, match="need the library `pyarrow`") as caught:
        read(tmp_path / "a.parquet", b"PAR1")
    assert "transferkit[huggingface]" in str(caught.value.problems[0].fix)


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_files_of_pyarrow_are_read(tmp_path: Path, kind: str) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra `huggingface` is not installed")
    table = arrow.Table.from_pylist(OBJECTS)
    path = tmp_path / "a.bin"
    if kind == "parquet":
        importlib.import_module("pyarrow.parquet").write_table(table, path)
    else:
        with getattr(arrow.ipc, f"new_{kind}")(path, table.schema) as writer:
            writer.write_table(table)
    assert rows(read(path)) == ROWS
