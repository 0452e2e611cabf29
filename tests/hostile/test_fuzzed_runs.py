"""Whatever is done to the files of a run directory, every command takes it or refuses it in words."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

import transfer
from transfer.cli import app as cli
from transfer.storage import checkpoint

MUTATIONS = int(os.environ.get("TRANSFER_MUTATIONS", "15"))
"""Mutations of each run; TRANSFER_MUTATIONS=5000 for a long search."""
PLAIN = {".json", ".jsonl", ".yaml"}

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([-1, 0, 1, 2**31, 10**30, 0.5, float("nan"), float("inf")]),
        st.sampled_from(["", "..", "../../outside", "/outside", "\x1b[31mred", "linear", "\ud800", "a" * 300]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "x", ""]), inner, max_size=3),
    max_leaves=4,
)


class Killed(BaseException):
    """Stands in for a signal that nothing can catch."""


def exit_status(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; return its exit status and what it printed."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr("sys.argv", ["transfer", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), printed.getvalue()
    return 0, printed.getvalue()


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value below a node."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from places(child, (*at, key))


def retyped(draw: st.DrawFn, content: Any) -> Any:
    """Drop, replace or swap a value anywhere in plain data."""
    content = copy.deepcopy(content)
    everywhere = list(places(content))
    if not everywhere:
        return draw(values)
    # Evenly over the depths: a file may hold thousands of words and few keys.
    depth = draw(st.sampled_from(sorted({len(place) for place in everywhere})))
    *way, key = draw(st.sampled_from([place for place in everywhere if len(place) == depth]))
    holder = content
    for step in way:
        holder = holder[step]
    match draw(st.sampled_from(["drop", "replace", "replace", "wrap", "add"])):
        case "drop":
            del holder[key]
        case "wrap":
            holder[key] = [holder[key]]
        case "add" if isinstance(holder, dict):
            holder[draw(st.sampled_from(["name", "x", *map(str, holder)]))] = draw(values)
        case _:
            holder[key] = draw(values)
    return content


@st.composite
def damaged(draw: st.DrawFn, path: Path) -> bytes:
    """Flip bits of a file, cut it, put something into it, or change one value of its plain data."""
    content = path.read_bytes()
    if path.suffix in PLAIN and draw(st.booleans()):
        if path.suffix == ".yaml":
            return yaml.safe_dump(retyped(draw, yaml.safe_load(content))).encode("utf-8", "surrogatepass")
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        return b"\n".join(json.dumps(retyped(draw, json.loads(line))).encode() for line in lines)
    if not content:
        return draw(st.binary(max_size=8))
    # The beginning of a file says what the rest means.
    place = draw(st.integers(0, min(len(content), 400) - 1) | st.integers(0, len(content) - 1))
    match draw(st.sampled_from(["flip", "cut", "insert", "replace"])):
        case "flip":
            return content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
        case "cut":
            return content[:place]
        case "insert":
            return content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:]
        case _:
            return draw(st.sampled_from([b"", b"{}", b"[]", b"null", b"\x00" * 64, b"[" * 100_000, b"\xff\xfe"]))


def tree(folder: Path) -> dict[str, int]:
    """Return every path below a folder, with its time."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def search(run: Path, folder: Path, command: Callable[[Path], list[str]], files: list[str], examples: int) -> None:
    """Give a command many damaged copies of a run: it says something, and writes nowhere else."""
    folder.mkdir()
    (folder / "around").mkdir()
    (folder / "around" / "keep.txt").write_text("mine", encoding="utf-8")

    @seed(0)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        copied = folder / "around" / "run"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(run, copied)
        before = {path: time for path, time in tree(folder).items() if not path.startswith("around/run")}
        name = data.draw(st.sampled_from(files))
        (copied / name).write_bytes(data.draw(damaged(copied / name)))
        status, printed = exit_status(*command(copied))
        assert status in (0, 1, 2), printed
        assert printed.strip(), "nothing was said"
        assert not set(printed) & {chr(code) for code in range(32)} - {"\n"}, repr(printed)
        after = {path: time for path, time in tree(folder).items() if not path.startswith("around/run")}
        # The folder that holds the run may have had a temporary folder in it.
        assert {k: v for k, v in after.items() if k != "around"} == {k: v for k, v in before.items() if k != "around"}

    attack()


def files_of(run: Path, *leave_out: str) -> list[str]:
    return [str(p.relative_to(run)) for p in sorted(run.rglob("*")) if p.is_file() and p.name not in leave_out]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of a small text model, with a vocabulary."""
    config = {
        "data": {"name": "mini_reviews"},
        "backbone": {"name": "textcnn", "dimensions": 4, "filters": 2, "kernel_sizes": [2], "min_frequency": 8},
        "train": {"batch_size": 32, "phases": [{"epochs": 1}]},
    }
    return transfer.run(config, output=tmp_path_factory.mktemp("text"), quick=True).folder


@pytest.fixture(scope="module")
def scored_text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of a small text model with stored predictions."""
    config = {
        "data": {"name": "mini_reviews", "limit": 20},
        "backbone": {"name": "textcnn", "dimensions": 4, "filters": 2, "kernel_sizes": [2], "min_frequency": 8},
        "train": {"batch_size": 32, "phases": [{"epochs": 2}]},
    }
    return transfer.run(config, output=tmp_path_factory.mktemp("scored")).folder


@pytest.fixture
def stopped_run(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run that was killed in its second epoch."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    save, count = checkpoint.save, 0

    def counting(*arguments: Any, **options: Any) -> None:
        nonlocal count
        save(*arguments, **options)
        count += 1
        if count == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", counting)
        options = ["train.ema=0.9", "train.optimizer={name: adam}", "train.scheduler={name: cosine}"]
        with pytest.raises(Killed):
            transfer.run(config, [*options, "train.checkpoint.every_steps=3"], output=tmp_path / "stopped")
    (folder,) = (tmp_path / "stopped").iterdir()
    return folder


def test_predict_takes_or_refuses_any_model_folder(text_run: Path, tmp_path: Path) -> None:
    files = [name for name in files_of(text_run) if name.startswith("model/")]
    search(text_run, tmp_path / "attacks", lambda run: ["predict", str(run), "a good film"], files, MUTATIONS)


def test_evaluate_takes_or_refuses_any_run(text_run: Path, tmp_path: Path) -> None:
    files = files_of(text_run, "keep.txt")
    search(text_run, tmp_path / "attacks", lambda run: ["evaluate", str(run)], files, MUTATIONS // 2)


def test_report_takes_or_refuses_any_run(scored_text_run: Path, tmp_path: Path) -> None:
    files = [name for name in files_of(scored_text_run) if not name.startswith("checkpoints/")]
    search(scored_text_run, tmp_path / "attacks", lambda run: ["report", str(run)], files, MUTATIONS)


def test_export_takes_or_refuses_any_run(text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a fresh process makes of an export is tested elsewhere, and takes seconds.
    monkeypatch.setattr("transfer.deployment.export._compare", lambda *arguments: (0.0, 1, frozenset()))
    files = files_of(text_run, "state.json")
    search(
        text_run,
        tmp_path / "attacks",
        lambda run: ["export", str(run), "--format", "safetensors"],
        files,
        MUTATIONS // 2,
    )


def test_resume_takes_or_refuses_any_run(stopped_run: Path, tmp_path: Path) -> None:
    search(stopped_run, tmp_path / "attacks", lambda run: ["resume", str(run)], files_of(stopped_run), MUTATIONS)
