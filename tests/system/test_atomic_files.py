"""Files and folders that are written atomically."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from transfer import RunError
from transfer.system.atomic_files import atomic_folder, is_disk_full, read_json, write_atomically, write_json
from transfer.system.file_schema import FileSchema, checked


def test_write_replaces_file_without_leftovers(tmp_path: Path) -> None:
    for content in ("first", "second"):
        write_atomically(tmp_path / "file", content)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "second")]


def test_json_refuses_infinity(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"a": math.inf})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_damaged_json_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError):
        read_json(tmp_path / "file.json", "missing")


def write_folder(path: Path, content: str, **options: object) -> None:
    with atomic_folder(path, **options) as temporary:  # type: ignore[arg-type]
        assert not path.exists() or (path / "file").read_text() != content
        (temporary / "file").write_text(content)


def test_folder_appears_complete(tmp_path: Path) -> None:
    write_folder(tmp_path / "parent" / "folder", "first")
    assert (tmp_path / "parent" / "folder" / "file").read_text() == "first"
    assert [p.name for p in (tmp_path / "parent").iterdir()] == ["folder"]


def test_folder_is_unchanged_after_an_exception(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt

    write_folder(tmp_path / "folder", "first")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(p.name, (p / "file").read_text()) for p in tmp_path.iterdir()] == [("folder", "first")]


def test_existing_folder_stays_unless_room_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_folder(folder, "first")
    with pytest.raises(OSError, match="not empty"):
        write_folder(folder, "second")
    assert (folder / "file").read_text() == "first"
    write_folder(folder, "second", make_room=lambda: folder.rename(tmp_path / "old"))
    assert sorted((p.name, (p / "file").read_text()) for p in tmp_path.iterdir()) == [
        ("folder", "second"),
        ("old", "first"),
    ]


def test_temporary_folder_of_a_crash_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".folder.tmp" / "other").touch()
    write_folder(tmp_path / "folder", "first")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["file"]


class Shape(FileSchema):
    size: int
    name: str = ""


@pytest.mark.parametrize("content", [{}, {"size": "1"}, {"size": 1.5}, {"size": True}, {"size": None}])
def test_content_of_another_type_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(RunError, match="size"):
        checked(content, Shape, "shape.json")


def test_content_with_non_utf8_path() -> None:
    assert checked({"size": 1, "folder": "\udc80"}, Shape, "shape.json").size == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), True),
        (ValueError("database or disk is full"), True),
        (OSError(2, "x"), False),
    ],
)
def test_full_disk_is_recognized_by_its_cause(error: Exception, expected: bool) -> None:
    outer = RuntimeError("outer")
    outer.__cause__ = error
    assert is_disk_full(outer) == expected
