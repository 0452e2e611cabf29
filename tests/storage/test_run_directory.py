"""The folder of one run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from transfer import RunError
from transfer.storage.environment import environment, environment_diff
from transfer.storage.run_directory import RunDirectory


def test_runs_of_the_same_second_get_separate_folders(tmp_path: Path) -> None:
    paths = {RunDirectory.create(tmp_path / "runs", "name").path for _ in range(5)}
    assert len(paths) == 5
    assert all(path.is_dir() and path.name.startswith("name-") for path in paths)


def test_a_file_is_no_folder_for_runs(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(RunError) as caught:
        RunDirectory.create(tmp_path / "runs", "name")
    assert "--output" in str(caught.value.problems[0].fix)


def test_the_config_comes_back(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "name")
    plain = {"a": {"b": [1, 1e-5, "off", "1e-3", None, True]}, "c": "ü"}
    run.write_config(plain)
    assert RunDirectory.open(run.path).config() == plain


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words"])
def test_wrongly_edited_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RunError) as caught:
        RunDirectory.open(tmp_path).config()
    assert str(caught.value.problems[0].where).startswith(str(tmp_path / "config.yaml"))


def test_another_folder_names_the_runs_inside_it(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    with pytest.raises(RunError, match="is no run directory") as caught:
        RunDirectory.open(tmp_path)
    assert caught.value.problems[0].available == ("first", "second")
    with pytest.raises(RunError, match="does not exist") as missing:
        RunDirectory.open(tmp_path / "third")
    assert missing.value.problems[0].available == ("first", "second")


def test_incomplete_run_has_no_summary(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="it did not end"):
        RunDirectory(tmp_path).summary()


def test_metrics_are_a_line_each(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for epoch in (1, 2):
        run.append_metrics({"epoch": epoch})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"epoch": 1},
        {"epoch": 2},
    ]


def test_the_environment_is_written(tmp_path: Path) -> None:
    RunDirectory(tmp_path).write_environment(environment("cpu", {"some-plugin": "1.2"}), quick=False)
    content = json.loads((tmp_path / "environment.json").read_text())
    assert content["versions"]["some-plugin"] == "1.2"
    assert content["versions"]["torch"]
    assert {"command", "python", "device", "git_revision", "started", "threads"} <= set(content)


@pytest.mark.parametrize("version", [2, "1", {"x": 1}, None])
def test_run_of_another_format_is_refused(tmp_path: Path, version: object) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "environment.json").write_text(json.dumps({"format": version}), encoding="utf-8")
    with pytest.raises(RunError, match="the run has format"):
        RunDirectory.open(tmp_path)


def test_what_differs_between_two_environments_is_said() -> None:
    before = environment("cpu", {"some-plugin": "1.2"})
    assert environment_diff(before, before) == []
    now = {**before, "threads": 99, "versions": {**before["versions"], "some-plugin": "1.3"}}
    assert environment_diff(before, now) == [f"threads {before['threads']} -> 99", "some-plugin 1.2 -> 1.3"]


def test_metrics_are_made_to_agree_with_the_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    records = [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 0.30000000000000004}]
    for record in records:
        run.append_metrics(record)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    assert run.restore_metrics(records) is None
    for damaged, said in {
        whole + b'{"epoch": 3, "lo': "dropped 1 newer than the checkpoint",
        whole[:-5]: "dropped 1 newer than the checkpoint, restored 1 missing or damaged",
        whole.replace(b"0.1", b"0.5"): "restored 1 missing or damaged",
        b"": "restored 2 missing or damaged",
    }.items():
        (tmp_path / "metrics.jsonl").write_bytes(damaged)
        assert said in str(run.restore_metrics(records))
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_lock_refuses_second_process_and_ends_with_first(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    ready, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with run.locked():
            os.write(ready[1], b".")
            os.read(go_on[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(RunError, match=f"process {child} on "), run.locked():
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "lock").exists()
    with run.locked():
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
    assert list(tmp_path.iterdir()) == []
