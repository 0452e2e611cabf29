"""Sweeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import transfer
from transfer import ConfigError, RunError
from transfer.training.events import Event, Note

pytest.importorskip("optuna")

from transfer import sweep
from transfer.experiments.search_space import check_space, read_space
from transfer.experiments.sweep import _gpu_of_process

SPACE = """
sweep: {trials: 4, sampler: {name: tpe, seed: 1, n_startup_trials: 2}, pruner: {name: none}}
train.optimizer.lr: {log: [1.0e-4, 0.1]}
train.batch_size: [16, 32]
"""


@pytest.fixture
def files(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    config["train"]["phases"] = [{"epochs": 2, "freeze": "backbone"}]
    (tmp_path / "points.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    return tmp_path / "points.yaml", tmp_path / "space.yaml"


def outcome(report: Any) -> Any:
    """Leave out what is named by date and time."""
    return [{k: v for k, v in trial.items() if k != "run"} for trial in report["trials"]], report["best"]["test"]


def test_a_sweep_picks_the_best_by_validation_and_scores_test_once(files: tuple[Path, Path], tmp_path: Path) -> None:
    ended = sweep(*files, output=tmp_path)
    report = json.loads((ended.folder / "sweep.json").read_text(encoding="utf-8"))
    scores = [trial["validation"] for trial in report["trials"]]
    assert len(scores) == 4
    assert report["best"]["validation"] == max(scores)
    runs = sorted((ended.folder / "runs").iterdir())
    assert [json.loads((run / "summary.json").read_text())["test"] for run in runs] == [None] * 4
    assert report["best"]["test"] == transfer.evaluate(ended.folder / report["best"]["run"])
    assert "## Importance" in (ended.folder / "report.md").read_text(encoding="utf-8")
    # Learning rates and batch sizes leave the frozen features as they are: training and validation, stored once.
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 3


def test_a_sweep_that_was_interrupted_ends_with_the_same_trials(files: tuple[Path, Path], tmp_path: Path) -> None:
    whole = sweep(*files, output=tmp_path / "whole")
    seen: list[str] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, Note) and event.text.startswith("trial 3/4:"):
            seen.append(event.text)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(*files, output=tmp_path / "parts", observe=interrupt)
    assert len(seen) == 1
    went_on = sweep(*files, output=tmp_path / "parts")
    assert outcome(went_on.report) == outcome(whole.report)


def test_a_trial_that_the_pruner_stops_is_pruned(files: tuple[Path, Path], tmp_path: Path) -> None:
    pruner = "pruner: {name: percentile, percentile: 1.0, n_startup_trials: 1}"
    text = f"sweep: {{trials: 6, sampler: {{name: random, seed: 0}}, {pruner}}}"
    files[1].write_text(f"{text}\ntrain.optimizer.lr: {{log: [1.0e-6, 0.1]}}\n", encoding="utf-8")
    report = sweep(*files, ["train.phases.0.epochs=4"], output=tmp_path).report
    pruned = [trial for trial in report["trials"] if trial["state"] == "pruned"]
    assert pruned
    for trial in pruned:
        folder = tmp_path / "points-space" / trial["run"]
        assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"


def test_every_config_of_a_space_is_checked_before_anything_runs(files: tuple[Path, Path], tmp_path: Path) -> None:
    files[1].write_text(
        "train.batch_size: [16, 0]\nbackbone.sise: {integers: [1, 4]}\ntrain.mux.mixup: [0.1, 0.2]\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError) as error:
        sweep(*files, output=tmp_path / "runs")
    text = str(error.value)
    assert f"{files[1]}:1 (train.batch_size=0)" in text
    assert f"{files[1]}:2 (backbone.sise=1)" in text
    assert f"{files[1]}:3 (train.mux.mixup=0.1)" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.batch_size: 16", "expected a list of choices or a range, got 16"),
        ("train.batch_size: [16]", "expected 2 or more different values"),
        ("train.optimizer.lr: {log: [0.0, 1.0]}", "start above zero"),
        ("train.optimizer.lr: {uniform: [1.0, 0.5]}", "it should be ascending"),
        ("train.optimizer.lr: {uniform: [0.1, 0.5], log: [0.1, 0.5]}", "it should be one of"),
        ("sweep: {sampler: {name: tpo}}\nseed: [0, 1]", "did you mean 'tpe'"),
        ("sweep: {pruner: {name: median, startup: 3}}\nseed: [0, 1]", "has no option 'startup'"),
        ("sweep: {trails: 3}\nseed: [0, 1]", "did you mean 'trials'"),
        ("sweep: {trials: 3}", "the space is empty"),
        ("sweep: {sampler: {name: grid}}\nseed: {integers: [0, 1]}", "expected choices only"),
    ],
)
def test_a_wrong_space_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        read_space(path)
    assert str(path) in str(error.value)


def test_choices_may_be_lists_and_mappings(files: tuple[Path, Path]) -> None:
    files[1].write_text("train.phases: [[{epochs: 1}], [{epochs: 2, freeze: backbone}]]\n", encoding="utf-8")
    space = read_space(files[1])
    assert check_space(files[0], space).name == "accuracy"
    assert space.examples("train.phases")[1] == [{"epochs": 2, "freeze": "backbone"}]


def test_another_space_is_not_mixed_into_a_study(files: tuple[Path, Path], tmp_path: Path) -> None:
    short = SPACE.replace("trials: 4", "trials: 1")
    files[1].write_text(short, encoding="utf-8")
    sweep(*files, output=tmp_path)
    files[1].write_text(short.replace("0.1", "0.2"), encoding="utf-8")
    with pytest.raises(RunError, match="another config or space"):
        sweep(*files, output=tmp_path)


@pytest.mark.slow
def test_a_sweep_killed_and_continued_by_two_processes(tmp_path: Path) -> None:
    """On the shipped reviews: SIGKILL in the middle of a trial, then the same command with two processes."""
    config = Path(__file__).parents[2] / "configs" / "quickstart_text.yaml"
    space = tmp_path / "space.yaml"
    space.write_text("sweep: {trials: 4, pruner: {name: none}}\ntrain.optimizer.lr: {log: [1.0e-3, 1.0e-2]}\n")
    overrides = ["data.limit=150", "train.phases.0.epochs=4"]
    command = [
        sys.executable,
        "-m",
        "transfer",
        "sweep",
        str(config),
        str(space),
        *overrides,
        "--output",
        str(tmp_path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder = tmp_path / "quickstart_text-space"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "sweep.json").exists()
    ended = subprocess.run([*command, "--processes", "2"], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "resumes" in ended.stdout + (folder / "process-2.log").read_text(encoding="utf-8")
    report = json.loads((folder / "sweep.json").read_text())
    assert [trial["state"] for trial in report["trials"]] == ["complete"] * 4
    assert len(list((folder / "runs").iterdir())) == 4


@pytest.mark.parametrize(
    ("count", "visible", "device", "expected"),
    [
        (0, None, "auto", [None] * 4),
        (1, None, "auto", [None] * 4),
        (2, None, "auto", ["0", "1", "0", "1"]),
        (2, "5, 7", "cuda", ["5", "7", "5", "7"]),
        (2, None, "cpu", [None] * 4),
        (2, None, "cuda:1", [None] * 4),
    ],
)
def test_each_process_of_a_sweep_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None, device: str, expected: list[str | None]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = [_gpu_of_process(number, device).get("CUDA_VISIBLE_DEVICES") for number in (1, 2, 3, 4)]
    assert gpus == expected
