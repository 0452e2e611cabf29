"""Several seeds: a folder of runs and one summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transfer
from transfer import DataError, RunError, UserError, resume_seeds, run_seeds
from transfer.runs import train as workflow

EPOCH = "train.phases=[{epochs: 1}]"


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_a_folder_of_runs_and_one_summary(config_file: Path, tmp_path: Path) -> None:
    several = run_seeds(config_file, [EPOCH], seeds=3, output=tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == [several.folder]
    assert several.folder.name.startswith("tiny-")
    assert several.folder.name.endswith("-seeds")
    seeds = [read(several.folder / f"seed-{seed}" / "summary.json") for seed in (3, 4, 5)]
    assert several.summary == read(several.folder / "summary.json")
    assert several.summary["status"] == "complete"
    assert several.summary["seeds"] == [3, 4, 5]
    accuracy = several.summary["test"]["accuracy"]
    assert accuracy["values"] == [summary["test"]["accuracy"] for summary in seeds]
    assert accuracy["mean"] == pytest.approx(np.mean(accuracy["values"]))
    assert accuracy["standard_deviation"] == pytest.approx(np.std(accuracy["values"], ddof=1))
    assert accuracy["interval"][0] <= accuracy["mean"] <= accuracy["interval"][1]


def test_seeds_share_the_splits_and_differ_in_the_rest(config: dict[str, Any], tmp_path: Path) -> None:
    several = run_seeds(config, [EPOCH], seeds=2, output=tmp_path)
    one, other = (read(several.folder / name / "summary.json") for name in several.summary["runs"])
    assert one["digests"] == other["digests"]
    assert set(one["digests"]) == {"train", "validation", "test"}
    assert one["test"]["loss"] != other["test"]["loss"]


def test_each_run_is_the_one_that_its_seed_gives(config: dict[str, Any], tmp_path: Path) -> None:
    several = run_seeds(config, [EPOCH], seeds=2, output=tmp_path / "several")
    alone = transfer.run(config, [EPOCH, "seed=4"], output=tmp_path / "alone")
    assert read(several.folder / "seed-4" / "summary.json")["test"] == alone.summary["test"]


def test_one_seed_has_no_spread(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected 2 or more, got 1"):
        run_seeds(config, seeds=1, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_data_that_is_wrong_leaves_nothing_behind(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run_seeds(config, ["data.count=2"], seeds=2, output=tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("when", ["before its config", "in its first epoch"])
def test_it_goes_on_with_the_seeds_that_are_missing(
    when: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_seeds(config, [EPOCH], seeds=3, output=tmp_path / "whole")
    name = "transfer.runs.train.RunDirectory.write_config" if when == "before its config" else "transfer.runs.train.fit"
    module, _, function = name.rpartition(".")
    target = workflow.RunDirectory if module.endswith("RunDirectory") else workflow
    original, calls = getattr(target, function), []

    def stop_at_the_second(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(target, function, stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_seeds(config, [EPOCH], seeds=3, output=tmp_path / "stopped")
    monkeypatch.setattr(target, function, original)
    (folder,) = (tmp_path / "stopped").iterdir()
    assert read(folder / "summary.json")["status"] == "interrupted"
    first = (folder / "seed-3" / "summary.json").stat().st_mtime_ns
    again = resume_seeds(folder)
    assert (folder / "seed-3" / "summary.json").stat().st_mtime_ns == first
    assert again.summary["test"] == whole.summary["test"]


def test_the_folder_of_one_run_is_no_folder_of_seeds(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a folder of seeds"):
        resume_seeds(transfer.run(config, [EPOCH], output=tmp_path).folder)


def test_interval_of_an_accuracy_near_one_does_not_exceed_one(config: dict[str, Any], tmp_path: Path) -> None:
    several = run_seeds(config, [EPOCH, "data.distance=3.0"], seeds=2, output=tmp_path)
    accuracy = several.summary["test"]["accuracy"]
    assert accuracy["values"][0] != accuracy["values"][1]
    assert accuracy["interval"][1] == 1.0
