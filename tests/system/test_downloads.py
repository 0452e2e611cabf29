"""Where data lives, and how a file gets there."""

from __future__ import annotations

import hashlib
import http.client
import io
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
        self.status = 200
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

        def urlopen(request: urllib.request.Request, timeout: float) -> Answer:
            asked.append(request.full_url)
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


def test_data_folder_is_in_user_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_download_without_content_length(answer: Callable[..., list[str]]) -> None:
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
    with pytest.raises(DataError, match="wrong SHA-256") as caught:
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
def test_error_without_network_names_file_and_path(
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


def test_unwritable_folder_is_an_error(folder: Path, answer: Callable[..., list[str]]) -> None:
    answer(CONTENT)
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file, no folder")
    with pytest.raises(DataError, match="cannot be downloaded"):
        download(URL, "words.zip")


# ----------------------------------------------------------------------------------------------- going on after a break


@dataclass
class Server:
    """A server on this machine, and what it was asked for.

    Args:
        content: The file.
        version: Its entity tag; empty: none.
        cut: Break off after so many bytes of an answer.
        ranges: It can begin in the middle.
        asked: The Range of each request, and how many bytes were sent in answer.
    """

    content: bytes = CONTENT
    version: str = '"one"'
    cut: int | None = None
    ranges: bool = True
    asked: list[tuple[str | None, int]] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers["Range"]
        begin = int(wanted[len("bytes=") : -1]) if wanted and self.ranges else 0
        if handler.headers["If-Range"] not in (None, self.version):
            begin = 0
        if begin and begin >= len(self.content):
            handler.send_error(416)
            self.asked.append((wanted, 0))
            return
        handler.send_response(206 if begin else 200)
        if self.version:
            handler.send_header("ETag", self.version)
        handler.send_header("Content-Length", str(len(self.content) - begin))
        handler.end_headers()
        sent = self.content[begin:][: self.cut]
        handler.wfile.write(sent)
        self.asked.append((wanted, len(sent)))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serve a file on this machine, and send there what is meant for the address."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, *_: object) -> None:
            return

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    original = urllib.request.urlopen

    def urlopen(request: urllib.request.Request, timeout: float) -> Any:
        assert request.full_url == URL
        here = urllib.request.Request(
            f"http://127.0.0.1:{http_server.server_port}/", headers=dict(request.header_items())
        )
        return original(here, timeout=timeout)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    yield state
    http_server.shutdown()
    thread.join()
    http_server.server_close()


def broken_off(server: Server, after: int = 4000) -> str:
    """Begin a download that breaks off, and return what the user is told to do."""
    server.cut = after
    with pytest.raises(DataError, match=f"the connection ended after {after} of 10000 bytes") as caught:
        download(URL, "words.zip")
    server.cut = None
    return str(caught.value.problems[0].fix)


def test_interrupted_download_is_resumed(folder: Path, server: Server) -> None:
    assert broken_off(server).startswith("run it again to resume the download, or download https://")
    assert not (folder / "words.zip").exists()
    path = download(URL, "words.zip", sha256=hashlib.sha256(CONTENT).hexdigest()[:8])
    assert path.read_bytes() == CONTENT
    assert server.asked == [(None, 4000), ("bytes=4000-", 6000)]
    assert [p.name for p in folder.iterdir()] == ["words.zip"]


def test_it_may_break_off_more_than_once(server: Server) -> None:
    broken_off(server)
    server.cut = 1000
    with pytest.raises(DataError, match="the connection ended after 5000 of 10000 bytes"):
        download(URL, "words.zip")
    server.cut = None
    assert download(URL, "words.zip").read_bytes() == CONTENT
    assert [wanted for wanted, _ in server.asked] == [None, "bytes=4000-", "bytes=5000-"]


def test_changed_file_is_downloaded_again(server: Server) -> None:
    broken_off(server)
    server.content, server.version = b"other words" * 900, '"two"'
    assert download(URL, "words.zip").read_bytes() == server.content


def test_server_without_ranges_restarts_download(server: Server) -> None:
    broken_off(server)
    server.ranges = False
    assert download(URL, "words.zip").read_bytes() == CONTENT


def test_too_long_partial_file_is_dropped(folder: Path, server: Server) -> None:
    broken_off(server)
    (folder / "words.zip.part").write_bytes(b"x" * 20_000)
    assert download(URL, "words.zip").read_bytes() == CONTENT
    assert [wanted for wanted, _ in server.asked] == [None, "bytes=20000-", None]


def test_file_without_version_is_not_resumed(folder: Path, server: Server) -> None:
    server.version = ""
    assert broken_off(server).startswith("download https://")
    assert list(folder.iterdir()) == []


def test_digest_detects_foreign_partial_file(folder: Path, server: Server) -> None:
    broken_off(server)
    (folder / "words.zip.part").write_bytes(b"x" * 4000)
    with pytest.raises(DataError, match="wrong SHA-256"):
        download(URL, "words.zip", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert list(folder.iterdir()) == []
