"""Folders of sweeps and seeds that were edited or damaged: refused in words, and nothing is trained elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import transfer
from transfer import RunError, TrainingError
from transfer.experiments.seeds import open_runs, resume_seeds

pytest.importorskip("optuna")

from transfer import sweep
from transfer.experiments import sweep as sweep_module

SPACE = "sweep: {trials: 2, sampler: {name: random, seed: 1}, pruner: {name: none}}\ntrain.batch_size: [16, 32]\n"
_SWEEPS: list[Path] = []


@pytest.fixture
def folder(config: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep with two trials, a copy for each test, next to its config and space."""
    config["train"]["phases"] = [{"epochs": 1}]
    (tmp_path / "points.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    if not _SWEEPS:
        output = tmp_path_factory.mktemp("sweep")
        _SWEEPS.append(sweep(tmp_path / "points.yaml", tmp_path / "space.yaml", output=output).folder)
    return Path(shutil.copytree(_SWEEPS[0], tmp_path / "out" / _SWEEPS[0].name))


def again(folder: Path) -> Any:
    """Call the sweep again, with a third trial."""
    files = folder.parent.parent / "points.yaml", folder.parent.parent / "space.yaml"
    files[1].write_text(SPACE.replace("trials: 2", "trials: 3"), encoding="utf-8")
    return sweep(*files, output=folder.parent).report


def set_trial_folder(folder: Path, value: object) -> None:
    with sqlite3.connect(folder / "study.db") as study:
        study.execute("UPDATE trial_user_attributes SET value_json = ? WHERE key = 'folder'", [json.dumps(value)])
        study.execute("UPDATE trials SET state = 'RUNNING'")
    study.close()


@pytest.mark.parametrize("value", ["../../x", "/tmp/x", "runs/../../x", "runs/..", "runs", 5, ["runs/x"]])
def test_trial_folder_outside_of_the_sweep_is_refused(folder: Path, value: object) -> None:
    other = transfer.run(folder.parent.parent / "points.yaml", output=folder.parent.parent / "mine").folder
    other.rename(folder.parent.parent / "x")
    (folder.parent.parent / "x" / "summary.json").unlink()
    set_trial_folder(folder, value)
    with pytest.raises(RunError, match="has the folder"):
        again(folder)
    assert not (folder.parent.parent / "x" / "summary.json").exists()


@pytest.mark.parametrize("name", ["runs", "locks", "study.db", "sweep.yaml", "sweep.json", "report.md"])
def test_link_out_of_the_sweep_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="leads out of"):
        again(folder)


@pytest.mark.parametrize("name", ["sweep.yaml", "study.lock", "report.lock", "study.db", "process-2.log"])
def test_pipe_in_a_sweep_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(RunError, match="no regular file"):
        again(folder)


def test_link_to_itself_is_refused(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    with pytest.raises(RunError, match="leads out of"):
        again(folder)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"\xff\xfe", b"space: 5", b"space: {sweep: 5}", BOMB.encode()]
)
def test_damaged_settings_of_a_sweep_are_refused(folder: Path, content: bytes) -> None:
    (folder / "sweep.yaml").write_bytes(content)
    with pytest.raises(transfer.UserError):
        again(folder)


@pytest.mark.parametrize("content", [b"\xff", b'{"best": {"trial": 0, "test": 5}}'])
def test_damaged_report_of_a_sweep_is_written_again(folder: Path, content: bytes) -> None:
    (folder / "sweep.json").write_bytes(content)
    assert again(folder)["best"]["test"].keys() == {"loss", "accuracy", "f1_macro"}


@pytest.mark.parametrize("content", [b"damaged" * 99, b"SQLite format 3\0" + b"\0" * 200])
def test_damaged_study_is_refused(folder: Path, content: bytes) -> None:
    (folder / "study.db").write_bytes(content)
    with pytest.raises(RunError, match="the study is damaged"):
        again(folder)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE trial_params SET param_name = 'x'",
        "UPDATE trial_params SET distribution_json = 'x'",
        "UPDATE trials SET state = 'x'",
        "UPDATE trial_user_attributes SET value_json = '{'",
        "UPDATE studies SET study_name = 5",
        "DROP TABLE trial_values",
        "UPDATE version_info SET schema_version = 1",
    ],
)
def test_edited_study_is_refused_or_taken(folder: Path, statement: str) -> None:
    with sqlite3.connect(folder / "study.db") as study:
        study.execute(statement)
    study.close()
    with suppress(RunError):  # any other error fails the test
        again(folder)


def test_trial_runs_again_after_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        error = TrainingError("the checkpoint cannot be written: No space left on device")
        raise error from OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module.train, "run", full)
        with pytest.raises(TrainingError, match="No space left"):
            again(folder)
    trials = again(folder)["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 3


# --------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(seeds=["one", "two"]),
        lambda m: m.update(seeds=5),
        lambda m: m.update(seeds=[0, 10**30]),
        lambda m: m.update(seeds=[]),
        lambda m: m.update(quick="no"),
        lambda m: m.update(config=[]),
        lambda m: m.update(format=2),
        lambda m: m.pop("seeds"),
    ],
)
def test_damaged_list_of_seeds_is_refused(
    config: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    manifest = {"format": 1, "name": "x", "seeds": [0, 1], "quick": False, "config": config}
    change(manifest)
    (tmp_path / "seeds.json").write_text(json.dumps(manifest), encoding="utf-8")
    for read in (resume_seeds, open_runs):
        with pytest.raises(transfer.UserError, match=r"the file is damaged"):
            read(tmp_path)
