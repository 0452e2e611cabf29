"""The cache of folders on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from transfer import DirectoryCache, cache_folder
from transfer.system.directory_cache import STALE_SECONDS

KEYS = ["a" * 40, "b" * 40, f"vocabulary-{'c' * 40}"]
PLENTY = 1 << 20


def content(size: int = 10) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "file").write_bytes(bytes(size))

    return write


def age(path: Path, seconds: float) -> None:
    moment = time.time() - seconds
    for file in (*path.iterdir(), path):
        os.utime(file, (moment, moment))


def test_entry_is_found_under_its_key_only(tmp_path: Path) -> None:
    cache = DirectoryCache(tmp_path / "cache", PLENTY)
    assert cache.get(KEYS[0]) is None
    for key in KEYS:
        assert cache.add(key, content()) == cache.get(key) == tmp_path / "cache" / key
    assert sorted(entry.key for entry in cache.entries()) == KEYS
    cache.drop(KEYS[0])
    assert cache.get(KEYS[0]) is None
    assert cache.get(KEYS[1]) is not None


@pytest.mark.parametrize("key", ["", "../x", "a" * 39, "A" * 40, f"{'a' * 40}/..", f"-{'a' * 40}"])
def test_invalid_key_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="invalid cache key"):
        DirectoryCache(tmp_path, PLENTY).get(key)


def test_entries_are_sorted_by_last_use(tmp_path: Path) -> None:
    cache = DirectoryCache(tmp_path, PLENTY)
    for key, seconds in zip(KEYS, (300, 200, 100), strict=True):
        age(cache.add(key, content(30)), seconds)
    cache.get(KEYS[0])
    assert [(entry.key, entry.bytes) for entry in cache.entries()] == [(KEYS[i], 30) for i in (0, 2, 1)]


def test_least_recently_used_entries_are_evicted(tmp_path: Path) -> None:
    cache = DirectoryCache(tmp_path, 100)
    age(cache.add(KEYS[0], content(40)), 300)
    age(cache.add(KEYS[1], content(40)), 200)
    cache.get(KEYS[0])
    cache.add(KEYS[2], content(40))
    assert {entry.key for entry in cache.entries()} == {KEYS[0], KEYS[2]}


def test_new_entry_beyond_limit_is_kept(tmp_path: Path) -> None:
    cache = DirectoryCache(tmp_path, 100)
    cache.add(KEYS[0], content(40))
    cache.add(KEYS[1], content(400))
    assert [entry.key for entry in cache.entries()] == [KEYS[1]]


def test_exception_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "half").write_bytes(b"1")
        raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        DirectoryCache(tmp_path, PLENTY).add(KEYS[0], write)
    assert list(tmp_path.iterdir()) == []


def test_entry_of_a_faster_process_is_kept(tmp_path: Path) -> None:
    cache = DirectoryCache(tmp_path, PLENTY)

    def write(folder: Path) -> None:
        (folder / "file").write_bytes(b"slow")
        cache.add(KEYS[0], lambda folder: (folder / "file").write_bytes(b"fast") and None)

    assert (cache.add(KEYS[0], write) / "file").read_bytes() == b"fast"
    assert [path.name for path in tmp_path.iterdir()] == [KEYS[0]]


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        DirectoryCache(tmp_path / "file" / "cache", PLENTY).add(KEYS[0], content())


def test_sweep_removes_only_stale_temporary_folders(tmp_path: Path) -> None:
    cache = DirectoryCache(tmp_path, PLENTY)
    stale, fresh, foreign = (tmp_path / name for name in (f".{KEYS[2]}.{'1' * 32}", f".{KEYS[0]}.{'2' * 32}", ".git"))
    for folder in (stale, fresh, foreign):
        folder.mkdir()
        (folder / "file").touch()
    age(stale, STALE_SECONDS + 1)
    age(foreign, STALE_SECONDS + 1)
    cache.add(KEYS[1], content())
    assert sorted(tmp_path.iterdir()) == sorted([fresh, foreign, tmp_path / KEYS[1]])


def test_clear_frees_entries_and_temporary_folders_only(tmp_path: Path) -> None:
    cache = DirectoryCache(tmp_path, PLENTY)
    for key in KEYS:
        cache.add(key, content(10))
    temporary = tmp_path / f".{KEYS[0]}.{'1' * 32}"
    temporary.mkdir()
    (temporary / "file").write_bytes(bytes(5))
    (tmp_path / "notes.txt").touch()
    assert cache.clear() == 35
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_cache_folder_depends_on_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path))
    assert (cache_folder("features"), cache_folder("text")) == (tmp_path, tmp_path / "text")
    monkeypatch.delenv("TRANSFER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("features") == tmp_path / "transfer" / "features"
    assert cache_folder("text") == tmp_path / "transfer" / "text"


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_entry_with_another_kind_of_file_is_dropped(tmp_path: Path, kind: str) -> None:
    cache = DirectoryCache(tmp_path / "cache", 1000)
    path = cache.add(KEYS[0], content()) / "odd"
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(tmp_path / "mine")
        case _:
            path.mkdir()
    assert cache.get(KEYS[0]) is None
    assert not list(cache.folder.iterdir())
    assert (tmp_path / "mine").exists()
