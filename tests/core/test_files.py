"""Where data lives, and how a file gets there."""

from __future__ import annotations

import hashlib
import http.client
import io
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfer import DataError, data_folder, download, find_file

URL = "https://example.org/files/words.zip"
CONTENT = b"some words" * 1000


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRANSFER_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


class Answer(io.BytesIO):
    """What urlopen returns; ``told`` is its Content-Length."""

    def __init__(self, content: bytes, told: int | None = None, breaks_with: Exception | None = None) -> None:
        super().__init__(content)
        self.headers = {} if told is None else {"Content-Length": str(told)}
        self.breaks_with = breaks_with

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(100)
        if not chunk and self.breaks_with:
            raise self.breaks_with
        return chunk


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that sets what the next download gets; it returns the list of addresses asked for."""

    def set_answer(content: bytes | Exception, **options: Any) -> list[str]:
        asked: list[str] = []

        def urlopen(url: str, timeout: float) -> Answer:
            asked.append(url)
            if isinstance(content, Exception):
                raise content
            return Answer(content, **options)

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return asked

    return set_answer


def test_the_data_folder_is_the_environment_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert data_folder() == tmp_path / "data"
    monkeypatch.setenv("TRANSFER_DATA", "~/here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder() == tmp_path / "here"


def test_the_data_folder_is_in_the_user_s_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRANSFER_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder() == tmp_path / "cache" / "transfer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder() == tmp_path / ".cache" / "transfer"


def test_the_first_file_that_is_there_is_found(folder: Path) -> None:
    assert find_file("aclImdb", "aclImdb.tar.gz") is None
    folder.mkdir()
    (folder / "aclImdb.tar.gz").touch()
    assert find_file("aclImdb", "aclImdb.tar.gz") == folder / "aclImdb.tar.gz"
    (folder / "aclImdb").mkdir()
    assert find_file("aclImdb", "aclImdb.tar.gz") == folder / "aclImdb"


def test_a_download_ends_under_its_name(folder: Path, answer: Callable[..., list[str]]) -> None:
    asked = answer(CONTENT, told=len(CONTENT))
    path = download(URL, "text/words.zip", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert path == folder / "text" / "words.zip"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["words.zip"]
    assert asked == [URL]


def test_a_length_that_is_not_told_is_no_error(answer: Callable[..., list[str]]) -> None:
    answer(CONTENT)
    assert download(URL, "words.zip").read_bytes() == CONTENT


def test_a_file_that_is_there_is_kept(folder: Path, answer: Callable[..., list[str]]) -> None:
    asked = answer(CONTENT)
    folder.mkdir()
    (folder / "words.zip").write_bytes(b"mine")
    assert download(URL, "words.zip", sha256="0" * 64).read_bytes() == b"mine"
    assert asked == []


def test_the_wrong_content_leaves_nothing(folder: Path, answer: Callable[..., list[str]]) -> None:
    answer(CONTENT, told=len(CONTENT))
    with pytest.raises(DataError, match="has SHA-256") as caught:
        download(URL, "words.zip", sha256="0" * 64)
    assert list(folder.iterdir()) == []
    assert str(folder / "words.zip") in str(caught.value.problems[0].fix)


@pytest.mark.parametrize(
    "options",
    [
        {"told": len(CONTENT) + 1},
        {"breaks_with": ConnectionResetError("reset by peer")},
        {"breaks_with": TimeoutError()},
        {"breaks_with": http.client.IncompleteRead(b"")},
    ],
)
def test_a_broken_download_leaves_nothing(
    folder: Path, answer: Callable[..., list[str]], options: dict[str, Any]
) -> None:
    answer(CONTENT, **options)
    with pytest.raises(DataError):
        download(URL, "words.zip")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route to host"), OSError("no route to host"), TimeoutError("no route to host")]
)
def test_without_a_network_the_message_says_which_file_to_put_where(
    folder: Path, answer: Callable[..., list[str]], error: Exception
) -> None:
    answer(error)
    with pytest.raises(DataError, match=r"words\.zip is not in .* cannot be downloaded: no route to host") as caught:
        download(URL, "words.zip")
    fix = str(caught.value.problems[0].fix)
    assert URL in fix
    assert str(folder / "words.zip") in fix
    assert list(folder.iterdir()) == []


def test_a_missing_page_is_an_error(answer: Callable[..., list[str]]) -> None:
    answer(urllib.error.HTTPError(URL, 404, "Not Found", {}, None))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Not Found"):
        download(URL, "words.zip")


@pytest.mark.parametrize(
    "url", ["http://example.org/words.zip", "file:///etc/passwd", "ftp://example.org/x", "words.zip"]
)
def test_only_https_is_fetched(answer: Callable[..., list[str]], url: str) -> None:
    asked = answer(CONTENT)
    with pytest.raises(DataError, match="only https"):
        download(url, "words.zip")
    assert asked == []


def test_a_folder_that_cannot_be_written_is_an_error(folder: Path, answer: Callable[..., list[str]]) -> None:
    answer(CONTENT)
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file, no folder")
    with pytest.raises(DataError, match="cannot be downloaded"):
        download(URL, "words.zip")
