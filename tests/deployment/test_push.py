"""Uploads to a hub: a local server answers as the Hugging Face Hub does."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

import transfer
from transfer import UserError
from transfer.deployment import export as exporting, verify_export

pytest.importorskip("huggingface_hub")


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that an upload of small files needs. Requests are recorded."""

    requests: ClassVar[list[tuple[str, Any]]] = []
    files: ClassVar[dict[str, bytes]] = {}
    status = 200

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        """Answer one request."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert self.headers["Authorization"] == "Bearer hf_secret"
        address = f"http://{self.headers['Host']}/owner/name"
        answer: dict[str, Any] = {"url": address, "name": "owner/name"}
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{address}/commit/1", "commitOid": "1" * 40, "success": True}
        else:
            content = json.loads(body or b"{}")
            self.requests.append((self.path, content))
            if "/preupload/" in self.path:
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in content["files"]]
                answer = {"files": files}
        data = json.dumps(answer if self.status == 200 else {"error": "no rights"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Start a hub that the client library uses instead of the real one."""
    Hub.requests.clear()
    Hub.files.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def loaded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the export as the fresh process does, but in this process, which has imported torch already."""

    def run(command: Sequence[str], **options: Any) -> Any:
        verify_export.main(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(exporting.subprocess, "run", run)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {
        "data": {"name": "mini_reviews", "limit": 12},
        "backbone": {"name": "textcnn", "vectors": "mini", "kernel_sizes": [2, 3], "filters": 4},
        "head": {"name": "linear"},
        "task": {"name": "classification"},
        "train": {"batch_size": 8, "phases": [{"epochs": 1}]},
    }
    return transfer.run(config, output=tmp_path_factory.mktemp("runs")).folder


def test_push_uploads_the_files_of_the_export(run: Path, hub: type[Hub], tmp_path: Path) -> None:
    pushed = transfer.push(run, "owner/name", private=True)
    assert pushed.url.endswith("/owner/name/commit/1")
    assert hub.requests[0][0] == "/api/repos/create"
    assert hub.requests[0][1]["name"] == "name"
    assert pushed.files == {name: len(content) for name, content in hub.files.items()}
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    texts = ["a warm, funny film"]
    assert list(transfer.predict(tmp_path, texts)) == list(transfer.predict(run, texts))


def test_dry_run_lists_the_files_without_a_hub_or_a_token(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    names = transfer.push(run, "owner/name", dry_run=True).names
    assert names == transfer.export(run, "safetensors", dry_run=True).files


def test_refused_upload_is_reported_with_the_reason_of_the_hub(
    run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "status", 403)
    with pytest.raises(UserError, match=r"the upload to owner/name failed: .*403"):
        transfer.push(run, "owner/name")
    assert hub.files == {}


@pytest.mark.parametrize("name", ["name", "a/b/c", "owner/na me", "owner/"])
def test_wrong_repository_is_refused_before_the_export(run: Path, name: str) -> None:
    with pytest.raises(UserError, match="the repository is wrong"):
        transfer.push(run, name)


def test_missing_token_is_refused_before_the_export(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the hub"):
        transfer.push(run, "owner/name")
