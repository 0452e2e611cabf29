"""Trackers: what TensorBoard, MLflow and Weights and Biases hold after a run, and what a broken one does to it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
import yaml
from conftest import Install

import transfer
from transfer import ConfigError, TrackedRun, Tracker, register
from transfer.config.check import load_config
from transfer.config.json_schema import config_schema
from transfer.errors import Problem
from transfer.registry import entry_points as registry
from transfer.runs.tracking import flat, run_name, scalars
from transfer.storage.run_directory import RunDirectory
from transfer.training.events import EpochEnded, Event, Note

PHASES = "train.phases=[{epochs: 3}]"
PER_EPOCH = {"train/loss", "train/accuracy", "validation/loss", "validation/accuracy", "lr/head", "lr/first"}
PER_EPOCH |= {"examples_per_second", "seconds"}


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


class Stop(BaseException):
    """Ends a process as a signal would that nothing can catch."""


def after_epoch(number: int, do: Callable[[], None]) -> Callable[[Event], None]:
    def observe(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.record["epoch"] == number:
            do()

    return observe


def stop() -> None:
    raise Stop


class Recorder(Tracker):
    """Keeps what it is told, in the class: for every run.

    Args:
        fails: Where it fails.
    """

    told: list[tuple[Any, ...]] = []

    def __init__(self, *, fails: str = "nowhere") -> None:
        self.fails = fails

    def _tell(self, what: str, *arguments: Any) -> None:
        if what == self.fails:
            raise ConnectionError(f"no route to host\nwhile in {what}")
        self.told.append((what, *arguments))

    def start(self, run: TrackedRun) -> str:
        self._tell("start", run)
        return f"run {len(self.told)}"

    def record(self, figures: Mapping[str, float], epoch: int) -> None:
        self._tell("record", epoch, dict(figures))

    def finish(self, status: str) -> None:
        self._tell("finish", status)


@pytest.fixture
def told(config: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Register that tracker, name it in the config, and return what it is told."""
    register("tracker", "recorder")(Recorder)
    config["trackers"] = ["recorder"]
    Recorder.told = []
    return Recorder.told


# ------------------------------------------------------------------------------------------------- what they are told


def test_a_tracker_is_told_each_epoch_and_the_end(config: dict[str, Any], told: list[Any], tmp_path: Path) -> None:
    run = transfer.run(config, [PHASES], output=tmp_path)
    assert [what for what, *_ in told] == ["start", "record", "record", "record", "record", "finish"]
    (_, started), *records, (_, status) = told
    assert (started.folder, started.name, started.known, status) == (run.folder, run.folder.name, None, "complete")
    assert started.config["train.optimizer.lr"] == 0.05
    assert started.config["train.phases.0.epochs"] == 3
    assert not any(key.startswith("trackers") for key in started.config)
    lines = RunDirectory(run.folder).metrics()
    for (_, epoch, told_figures), line in zip(records[:3], lines, strict=True):
        assert epoch == line["epoch"]
        assert set(told_figures) >= PER_EPOCH
        assert told_figures["validation/accuracy"] == line["validation"]["accuracy"]
        assert told_figures["lr/head"] == line["lr"]["head"]
    _, epoch, final = records[3]
    assert epoch == 3
    assert final["test/accuracy"] == run.summary["test"]["accuracy"]
    assert final["best_validation/loss"] == run.summary["validation"]["loss"]
    assert final["best_epoch"] == run.summary["best_epoch"]


def test_tracking_changes_nothing(config: dict[str, Any], told: list[Any], tmp_path: Path) -> None:
    def outcome(trackers: str) -> Any:
        run = transfer.run(config, [PHASES, f"trackers={trackers}"], output=tmp_path)
        lines = RunDirectory(run.folder).metrics()
        return [(line["train"], line["validation"]) for line in lines], run.summary["test"]

    assert outcome("[recorder]") == outcome("[]")


def test_a_quick_try_is_not_tracked(config: dict[str, Any], told: list[Any], tmp_path: Path) -> None:
    run = transfer.run(config, output=tmp_path, quick=True)
    assert told == []
    assert not (run.folder / "trackers.json").exists()
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["trackers"] == []


def test_a_run_that_goes_on_is_told_what_was_missed_and_nothing_twice(
    config: dict[str, Any], told: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        transfer.run(config, [PHASES], output=tmp_path, observe=after_epoch(2, stop))
    (folder,) = tmp_path.iterdir()
    assert told[-1] == ("finish", "failed")
    marks = json.loads((folder / "trackers.json").read_text())
    assert marks == {"recorder": {"run": "run 1", "epochs": 2}}
    # As if the process had been killed before it could tell the second epoch.
    (folder / "trackers.json").write_text(json.dumps({"recorder": {"run": "run 1", "epochs": 1}}))
    told.clear()
    transfer.resume(folder)
    assert told[0][1].known == "run 1"
    assert [epoch for what, epoch, *_ in told[1:] if what == "record"] == [2, 3, 3]
    assert told[-1] == ("finish", "complete")


def test_a_run_that_fails_says_so(
    config: dict[str, Any], told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transfer.runs.train.fit", _fails)
    with pytest.raises(RuntimeError):
        transfer.run(config, output=tmp_path)
    assert [what for what, *_ in told] == ["start", "finish"]
    assert told[-1] == ("finish", "failed")


def _fails(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("of another kind")


@pytest.mark.parametrize(("fails", "before"), [("start", 0), ("record", 1), ("finish", 4)])
def test_a_tracker_that_fails_is_left_out(
    config: dict[str, Any], told: list[Any], tmp_path: Path, fails: str, before: int
) -> None:
    config["trackers"] = [{"name": "recorder", "fails": fails}]
    notes: list[str] = []
    run = transfer.run(
        config, output=tmp_path, observe=lambda event: notes.append(event.text) if isinstance(event, Note) else None
    )
    assert run.summary["status"] == "complete"
    assert len(told) == before
    assert [note for note in notes if "tracker" in note] == [
        "tracker 'recorder' failed and is disabled for this run: ConnectionError: no route to host"
    ]


def test_run_name_and_scalars() -> None:
    assert run_name(RunDirectory(Path("runs/imdb-20261125-152255-2"))) == "imdb-20261125-152255-2"
    assert run_name(RunDirectory(Path("runs/imdb-20261125-152255-seeds/seed-3"))) == "imdb-20261125-152255-seeds/seed-3"
    assert scalars({"epoch": 3, "phase": 1, "lr": {"head": 0.5}}) == {"phase": 1, "lr/head": 0.5}
    plain = {"a": [1, 2], "b": [{"c": None}], "d": {}, "e": {"f": True}}
    assert dict(flat(plain)) == {"a": "[1, 2]", "b.0.c": None, "d": "{}", "e.f": True}


# --------------------------------------------------------------------------------------------------------- the config


def test_mistakes_are_found_at_once(config: dict[str, Any], told: list[Any]) -> None:
    config["trackers"] = ["tensorbord", {"name": "recorder", "fail": "start"}, "recorder", "recorder", 5]
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    wrong, unknown, option, twice = caught.value.problems
    assert (
        wrong.message
        == "trackers.4 is invalid: expected the name of a tracker, or a mapping of its name and options, got 5"
    )
    assert unknown.message == "unknown tracker 'tensorbord'"
    assert unknown.fix == "did you mean 'tensorboard'?"
    assert {"mlflow", "recorder", "tensorboard", "wandb"} <= set(unknown.available)
    assert (option.message, option.fix) == ("unknown option 'fail' of tracker 'recorder'", "did you mean 'fails'?")
    assert twice.message == "tracker 'recorder' is listed twice"


def test_a_missing_extra_is_named_with_its_remedy(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    lacking = Problem("it needs wandb>=0.19.10, which is not installed", fix="pip install 'transferkit[wandb]'")
    monkeypatch.setattr(registry, "unmet", lambda distribution, extras: lacking if extras == ("wandb",) else None)
    with pytest.raises(ConfigError) as caught:
        transfer.check(config_file, ["trackers=[wandb]"])
    (problem,) = caught.value.problems
    assert problem.message == "tracker 'wandb' cannot be loaded: it needs wandb>=0.19.10, which is not installed"
    assert problem.fix == "pip install 'transferkit[wandb]'"
    assert str(problem.where).startswith("override 'trackers=[wandb]' -> entry point wandb")


def test_a_run_is_evaluated_where_its_tracker_is_not_installed(
    config: dict[str, Any], told: list[Any], tmp_path: Path
) -> None:
    run = transfer.run(config, output=tmp_path)
    del registry._registered["tracker", "recorder"]
    assert transfer.evaluate(run.folder) == run.summary["test"]
    (run.folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match="unknown tracker 'recorder'"):
        transfer.resume(run.folder)


def test_a_package_brings_a_tracker(config: dict[str, Any], install: Install, tmp_path: Path) -> None:
    source = """
from transfer import Tracker

class Lines(Tracker):
    '''A line for each epoch.'''

    def start(self, run):
        self.file = run.folder / "lines.txt"

    def record(self, figures, epoch):
        with self.file.open("a") as file:
            file.write(f"{epoch} {figures['phase' if 'phase' in figures else 'test/loss']}\\n")

    def finish(self, status):
        pass

class Wrong:
    pass
"""
    entries = {"transfer.trackers": ["lines = lines_plugin:Lines", "wrong = lines_plugin:Wrong"]}
    install("transfer-lines", "1", entries, lines_plugin=source)
    with pytest.raises(ConfigError, match=r"no subclass of transfer\.Tracker"):
        load_config({**config, "trackers": ["wrong"]})
    run = transfer.run({**config, "trackers": ["lines"]}, output=tmp_path)
    lines = (run.folder / "lines.txt").read_text().split("\n")
    assert lines[:2] == ["1 1", "2 1"]
    assert lines[2] == f"2 {run.summary['test']['loss']}"


def test_the_schema_knows_trackers(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    monkeypatch.setattr(registry, "unmet", lambda distribution, extras: None)
    whole, _ = config_schema()
    validator = jsonschema.Draft202012Validator(json.loads(json.dumps(whole)))
    block = {"data": {"name": "mini_reviews"}, "backbone": {"name": "textcnn"}}
    good = [
        "tensorboard",
        {"name": "mlflow", "tracking_uri": "sqlite:///runs.db"},
        {"name": "wandb", "mode": "offline"},
    ]
    assert validator.is_valid({**block, "trackers": good})
    for bad in ("tensorboard", ["tensorbord"], [{"name": "mlflow", "uri": "x"}], [{"name": "wandb", "mode": "of"}]):
        assert not validator.is_valid({**block, "trackers": bad}), bad


# ------------------------------------------------------------------------------------------------- the real programs


@needs("tensorboard")
def test_tensorboard(config: dict[str, Any], tmp_path: Path) -> None:
    config["trackers"] = ["tensorboard"]
    with pytest.raises(Stop):
        transfer.run(config, [PHASES], output=tmp_path, observe=after_epoch(2, stop))
    (folder,) = tmp_path.iterdir()
    run = transfer.resume(folder)
    events = _events(folder / "tensorboard")
    lines = RunDirectory(folder).metrics()
    for name, part in (("validation/accuracy", "validation"), ("train/loss", "train")):
        steps = [(event.step, event.value) for event in events.Scalars(name)]
        key = name.rpartition("/")[2]
        assert steps == [(line["epoch"], pytest.approx(line[part][key])) for line in lines]
    assert [event.value for event in events.Scalars("lr/head")] == [pytest.approx(line["lr"]["head"]) for line in lines]
    assert len(events.Scalars("examples_per_second")) == 3
    ((step, value),) = [(event.step, event.value) for event in events.Scalars("test/accuracy")]
    assert (step, value) == (3, pytest.approx(run.summary["test"]["accuracy"]))
    assert len(list((folder / "tensorboard").iterdir())) == 2  # one file for each process, in one folder


@needs("tensorboard")
def test_tensorboard_knows_the_hyperparameters(config: dict[str, Any], tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import metadata

    run = transfer.run(
        config, [f"trackers=[{{name: tensorboard, folder: {tmp_path}/board}}]"], output=tmp_path / "runs"
    )
    (folder,) = (tmp_path / "board").iterdir()
    assert folder.name == run.folder.name
    content = _events(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = metadata.parse_session_start_info_plugin_data(content)
    assert started.hparams["train.optimizer.lr"].number_value == 0.05
    assert started.hparams["backbone.name"].string_value == "dense"
    assert started.group_name == run.folder.name


def _events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.fixture
def mlflow_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Keep MLflow from the network, and its files and its process-wide settings from other tests."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.chdir(tmp_path)
    yield
    import mlflow

    mlflow.set_tracking_uri(None)


@needs("mlflow")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, between it and SQLAlchemy
def test_mlflow(config: dict[str, Any], tmp_path: Path, mlflow_environment: None) -> None:
    config["trackers"] = [{"name": "mlflow", "tracking_uri": f"sqlite:///{tmp_path}/store.db", "tags": {"who": "test"}}]
    with pytest.raises(Stop):
        transfer.run(config, [PHASES], output=tmp_path / "runs", observe=after_epoch(2, stop))
    (folder,) = (tmp_path / "runs").iterdir()
    with sqlite3.connect(tmp_path / "store.db") as store:
        assert store.execute("SELECT status FROM runs").fetchall() == [("FAILED",)]
    run = transfer.resume(folder)
    with sqlite3.connect(tmp_path / "store.db") as store:
        (identity, name, status), *more = store.execute("SELECT run_uuid, name, status FROM runs").fetchall()
        assert (name, status, more) == (folder.name, "FINISHED", [])
        assert identity == json.loads((folder / "trackers.json").read_text())["mlflow"]["run"]
        parameters = dict(store.execute("SELECT key, value FROM params").fetchall())
        assert parameters["train.optimizer.lr"] == "0.05"
        assert parameters["train.phases.0.epochs"] == "3"
        found = store.execute("SELECT step, value FROM metrics WHERE key = 'validation/accuracy' ORDER BY step")
        assert found.fetchall() == [(r["epoch"], r["validation"]["accuracy"]) for r in RunDirectory(folder).metrics()]
        final = store.execute("SELECT step, value FROM metrics WHERE key = 'test/accuracy'").fetchall()
        assert final == [(3, run.summary["test"]["accuracy"])]
        keys = {key for (key,) in store.execute("SELECT DISTINCT key FROM metrics").fetchall()}
        assert keys >= PER_EPOCH
        assert ("who", "test") in store.execute("SELECT key, value FROM tags").fetchall()
        assert store.execute("SELECT name FROM experiments WHERE name = 'transfer'").fetchall() == [("transfer",)]


@needs("mlflow")
def test_a_server_that_is_away(config: dict[str, Any], tmp_path: Path, mlflow_environment: None) -> None:
    config["trackers"] = [{"name": "mlflow", "tracking_uri": "http://127.0.0.1:9"}]
    notes: list[str] = []
    run = transfer.run(
        config, output=tmp_path, observe=lambda event: notes.append(event.text) if isinstance(event, Note) else None
    )
    assert run.summary["status"] == "complete"
    (note,) = [note for note in notes if "tracker" in note]
    assert note.startswith("tracker 'mlflow' failed and is disabled for this run: MlflowException")
    assert "127.0.0.1" in note


@needs("wandb")
def test_wandb_offline(config_file: Path, tmp_path: Path) -> None:
    """In a process of its own, which wandb's service and its hooks end with."""
    code = (
        "import sys, conftest; import transfer; from transfer import register\n"
        "register('dataset', 'points')(conftest.Points); register('backbone', 'dense')(conftest.Dense)\n"
        "run = transfer.run(sys.argv[1], ['trackers=[{name: wandb, mode: offline}]'], output=sys.argv[2])\n"
        "print(run.folder)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, str(config_file), str(tmp_path / "runs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    folder = Path(done.stdout.splitlines()[-1])
    identity = json.loads((folder / "trackers.json").read_text())["wandb"]["run"]
    (file,) = folder.glob(f"wandb/offline-run-*/run-{identity}.wandb")
    records = _wandb_records(file)
    rows = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    lines = RunDirectory(folder).metrics()
    assert [row["_step"] for row in rows] == [1, 2]
    assert [row["validation/accuracy"] for row in rows] == [line["validation"]["accuracy"] for line in lines]
    summary = json.loads((folder / "summary.json").read_text())
    assert rows[-1]["test/accuracy"] == summary["test"]["accuracy"]
    config = {item.key for record in records for item in record.config.update} | {
        item.key for record in records for item in record.run.config.update
    }
    assert "train.optimizer.lr" in config


def _wandb_records(file: Path) -> list[Any]:
    """Read LevelDB's log format, which wandb writes behind a header of seven bytes: its own reader is in no package."""
    from wandb.proto import wandb_internal_pb2

    content, block, header = file.read_bytes(), 32768, 7
    assert content.startswith(b":W&B")
    found, parts, at = [], b"", header
    while at + header < len(content):
        if block - at % block < header:  # what no header fits into is zeros
            at += block - at % block
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + header : at + header + size]
        at += header + size
        if kind in (1, 4):  # the whole of a record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found, parts = [*found, record], b""
    return found


class Server(Tracker):
    """Fails with its address in the message after the first epoch.

    Args:
        address: Address of the server.
    """

    addresses: ClassVar[list[str]] = []

    def __init__(self, *, address: str) -> None:
        self.address = address

    def start(self, run: TrackedRun) -> None:
        self.addresses.append(self.address)

    def record(self, metrics: Mapping[str, float], epoch: int) -> None:
        raise ConnectionError(f"{self.address} does not answer")

    def finish(self, status: str) -> None:
        pass


@pytest.fixture
def server_config(config_file: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a config whose tracker has a password from the environment in its address."""
    register("tracker", "server")(Server)
    monkeypatch.setattr(Server, "addresses", [])
    monkeypatch.setenv("TRACKER_TOKEN", "s3cret-word")
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    config["trackers"] = [{"name": "server", "address": "https://user:${TRACKER_TOKEN}@example.org"}]
    config_file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return config_file


def test_secret_of_a_tracker_is_in_no_file_and_no_note(server_config: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    run = transfer.run(server_config, output=tmp_path / "runs", observe=observe).folder
    assert Server.addresses == ["https://user:s3cret-word@example.org"]
    assert any("https://user:${TRACKER_TOKEN}@example.org does not answer" in note for note in notes)
    texts = [path for path in run.rglob("*") if path.is_file() and b"s3cret-word" in path.read_bytes()]
    assert texts == []
    assert "${TRACKER_TOKEN}" in (run / "config.yaml").read_text(encoding="utf-8")


def test_resumed_run_reads_the_variables_of_its_trackers_only_where_it_started(
    server_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        transfer.run(server_config, output=tmp_path / "runs", observe=after_epoch(1, stop))
    (run,) = (tmp_path / "runs").iterdir()
    foreign = tmp_path / "foreign"
    shutil.copytree(run, foreign)
    transfer.resume(run)
    assert Server.addresses == ["https://user:s3cret-word@example.org"] * 2
    # Somebody else's run names another server: no variable is sent there.
    text = (foreign / "config.yaml").read_text(encoding="utf-8").replace("example.org", "example.net")
    (foreign / "config.yaml").write_text(text, encoding="utf-8")
    notes: list[str] = []
    transfer.resume(foreign, observe=lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    assert Server.addresses[2:] == ["https://user:${TRACKER_TOKEN}@example.net"]
    assert any("the trackers use TRACKER_TOKEN" in note for note in notes)


def test_folder_of_seeds_has_no_secret_of_a_tracker(server_config: Path, tmp_path: Path) -> None:
    folder = transfer.run_seeds(server_config, ["train.phases=[{epochs: 1}]"], seeds=2, output=tmp_path / "runs").folder
    assert b"s3cret-word" not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    (folder / "seed-4" / "summary.json").unlink()
    transfer.resume_seeds(folder)
    assert set(Server.addresses) == {"https://user:s3cret-word@example.org"}
