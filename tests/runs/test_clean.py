"""Removal of the checkpoints of complete runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import transfer


@pytest.fixture
def run(config: dict[str, Any], tmp_path: Path) -> transfer.Run:
    config["train"]["report"] = False
    return transfer.run(config, output=tmp_path)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_checkpoints_are_removed_and_the_run_is_usable(run: transfer.Run) -> None:
    before, checkpoints = size_of(run.folder), size_of(run.folder / "checkpoints")
    assert transfer.clean(run.folder, dry_run=True) == checkpoints > 0
    assert size_of(run.folder) == before
    assert transfer.clean(run.folder) == checkpoints
    assert size_of(run.folder) == before - checkpoints
    assert not (run.folder / "checkpoints").exists()
    assert transfer.evaluate(run.folder) == run.summary["test"]
    assert list(transfer.predict(run.folder, ["1,2,3,4"]))
    assert transfer.resume(run.folder).summary == run.summary
    assert transfer.report(run.folder).is_file()
    assert transfer.clean(run.folder) == 0


@pytest.mark.parametrize("file", ["summary.json", "model/model.json", "model/weights.safetensors"])
def test_incomplete_run_keeps_its_checkpoints(run: transfer.Run, file: str) -> None:
    (run.folder / file).unlink()
    with pytest.raises(transfer.RunError):
        transfer.clean(run.folder)
    assert (run.folder / "checkpoints" / "last" / "state.json").is_file()


def test_checkpoints_outside_the_run_are_not_removed(run: transfer.Run, tmp_path: Path) -> None:
    outside = (run.folder / "checkpoints").rename(tmp_path / "outside")
    (run.folder / "checkpoints").symlink_to(outside)
    with pytest.raises(transfer.RunError, match="leads out of the run directory"):
        transfer.clean(run.folder)
    assert (outside / "last" / "state.json").is_file()


def test_command_cleans_the_complete_runs_and_names_the_others(run: transfer.Run, tmp_path: Path, call: Any) -> None:
    status, out, _ = call("clean", run.folder, "--dry-run")
    assert status == 0
    assert f"{run.folder}: would free 0.0 MB" in out
    status, out, err = call("clean", tmp_path / "nothing", run.folder)
    assert status == 2
    assert f"{run.folder}: freed 0.0 MB" in out
    assert "nothing does not exist" in err
