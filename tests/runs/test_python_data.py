"""Runs with data that a Python program passes to them."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

import transfer
from transfer import ConfigError, DataError, InMemoryTable, RunError
from transfer.config.check import load_config
from transfer.training.events import EpochEnded

CONFIG = {
    "backbone": {"name": "dense", "dropout": 0.0},
    "train": {"epochs": 2, "batch_size": 4, "optimizer": {"lr": 0.01}, "cache": "off", "report": False},
}
POINTS = [[6.0 * (i % 2), 0.01 * i, 1.0, -0.01 * i] for i in range(40)]


def make_table(points: list[list[float]] = POINTS) -> InMemoryTable:
    columns = {"xs": points, "y": ["even", "odd"] * 20}
    return transfer.table(columns, label="y", test_fraction=0.25, point="xs")


@pytest.fixture
def interrupted(tiny: None, tmp_path: Path) -> Path:
    """A run that was interrupted after its first epoch."""

    def stop(event: Any) -> None:
        if isinstance(event, EpochEnded):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.run(CONFIG, data=make_table(), into=tmp_path / "run", observe=stop)
    gc.collect()
    return tmp_path / "run"


@pytest.mark.usefixtures("tiny")
def test_run_of_a_table_is_complete(tmp_path: Path) -> None:
    data = make_table()
    # The options for every dataset stay those of the config, and the others are replaced.
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**CONFIG, "data": {"name": "points", "count": 9, "limit": 12}}))
    run = transfer.run(tmp_path / "mine.yaml", ["data.validation=0.2"], data=data, output=tmp_path)
    assert run.folder.name.startswith("mine-")
    assert run.summary["examples"] == {"train": 24, "validation": 6, "test": 10}
    block = yaml.safe_load((run.folder / "config.yaml").read_text())["data"]
    assert block == {**data.block, "validation": 0.2, "limit": 12, "exclude": None, "fold": None}
    assert isinstance(run.model, nn.Module)
    assert not run.model.training
    assert run.predict(POINTS[:2]) == transfer.load(run.folder).predict(POINTS[:2])
    assert transfer.evaluate(run.folder, data=data) == run.summary["test"]
    assert transfer.report(run.folder).is_file()


@pytest.mark.usefixtures("tiny")
def test_html_of_a_run_escapes_its_values(tmp_path: Path) -> None:
    html = transfer.Run(tmp_path / "<b>", {"status": "complete", "test": {"accuracy": 0.91234}})._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<td>test</td><td>accuracy 0.9123</td>" in html
    assert "<script" not in html


@pytest.mark.usefixtures("tiny")
def test_checked_config_is_a_config(tmp_path: Path) -> None:
    data = make_table()
    checked = load_config(CONFIG, data=data.block)
    again = load_config(checked, ["seed=3"])
    assert (again.seed, again.resolved["data"]) == (3, checked.resolved["data"])
    assert transfer.run(checked.with_seed(3), data=data, output=tmp_path).summary["status"] == "complete"


def test_resumed_run_needs_the_same_data(interrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data of this run is not stored") as caught:
        transfer.resume(interrupted)
    assert "transfer.resume(RUN, data=transfer.table(...))" in str(caught.value.problems[0].fix)
    assert caught.value.exit_status == 2
    with pytest.raises(RunError, match="the data is not that of the run: expected the digest"):
        transfer.resume(interrupted, data=make_table([[1.0, 1.0, 1.0, 1.0], *POINTS[1:]]))
    with pytest.raises(ConfigError, match=r"data is wrong: expected a transfer\.table, got dict"):
        transfer.resume(interrupted, data={"xs": POINTS})  # type: ignore[arg-type]
    resumed = transfer.resume(interrupted, data=make_table())
    assert resumed.summary["test"] == transfer.run(CONFIG, data=make_table(), output=tmp_path).summary["test"]


@pytest.mark.usefixtures("tiny")
def test_other_tables_are_scored(tmp_path: Path) -> None:
    run = transfer.run(CONFIG, data=make_table(), output=tmp_path)
    other = transfer.table({"xs": POINTS[:8], "y": ["even", "odd"] * 4}, label="y", point="xs")
    with pytest.raises(RunError, match="the data is not that of the run") as caught:
        transfer.evaluate(run.folder, data=other)
    assert "to score other data: transfer.evaluate(RUN, on=data)" in str(caught.value.problems[0].fix)
    columns = {"xs": POINTS[:8], "y": ["even", "odd"] * 4}
    assert "accuracy" in transfer.evaluate(run.folder, on=transfer.table(columns, label="y", point="xs"))
    assert json.loads((run.folder / "evaluations" / "in_memory.json").read_text())["examples"] == 8


def test_files_are_no_data_of_a_python_run(tiny: None, tmp_path: Path) -> None:
    run = transfer.run({**CONFIG, "data": {"name": "points"}}, output=tmp_path)
    with pytest.raises(RunError, match="the run reads its data by itself, from points"):
        transfer.evaluate(run.folder, data=make_table())
