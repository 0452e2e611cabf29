"""SIGTERM and Ctrl-C, sent to processes: the step is finished and saved, the command to go on is printed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import kill_harness
import pytest
import yaml
from kill_harness import Attempt, Zygote

import transfer
from transfer import RunError
from transfer.storage import checkpoint

VISION = "vision, two loader processes"


def start(zygote: Zygote, cwd: Path, *arguments: str) -> Attempt:
    return zygote.start(arguments, cwd, {"TRANSFER_CACHE": str(cwd / "cache"), "COLUMNS": "1000"})


def begin(zygote: Zygote, cwd: Path, name: str, **train: object) -> tuple[Attempt, Path]:
    """Start a run and wait until it has saved for the first time."""
    config = kill_harness.CONFIGS[name]
    (cwd / "config.yaml").write_text(yaml.safe_dump({**config, "train": config["train"] | train}))
    attempt = start(zygote, cwd, "run", "config.yaml")
    while attempt.running and not any(cwd.glob("runs/*/checkpoints/last/state.json")):
        time.sleep(0.002)
    (run,) = (cwd / "runs").iterdir()
    return attempt, run


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("name", ["text", VISION])
def test_interrupted_run_resumes_to_the_same_result(
    zygote: Zygote, tmp_path: Path, number: signal.Signals, status: int, name: str
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    attempt, expected = begin(zygote, whole, name)
    assert attempt.status() == 0
    attempt, run = begin(zygote, stopped, name)
    # Ctrl-C at a terminal, and many schedulers, reach loader processes too.
    os.killpg(attempt.pid, number)
    assert attempt.status() == status
    log = (stopped / "log").read_text()
    assert f"interrupted; resume with: transfer resume runs/{run.name}" in log
    assert "Traceback" not in log
    assert '"status": "interrupted"' in (run / "summary.json").read_text()
    assert start(zygote, stopped, "resume", str(run)).status() == 0
    assert kill_harness.outcome(run) == kill_harness.outcome(expected)


def test_second_ctrl_c_stops_at_once_with_complete_checkpoint(zygote: Zygote, tmp_path: Path) -> None:
    attempt, run = begin(zygote, tmp_path, "text", phases=[{"epochs": 1000}])
    for _ in range(2):
        os.kill(attempt.pid, signal.SIGINT)
        time.sleep(0.001)
    assert attempt.status() == 130
    _, state = checkpoint.load(run / "checkpoints" / "last")
    assert state["progress"]["epoch"]["batches"] or state["progress"]["records"]


def test_a_second_process_on_one_run_is_refused(zygote: Zygote, tmp_path: Path) -> None:
    attempt, run = begin(zygote, tmp_path, "text", phases=[{"epochs": 1000}])
    with pytest.raises(RunError, match=f"another process writes into .*: process {attempt.pid} on"):
        transfer.resume(run)
    attempt.kill()
    assert attempt.status() == -signal.SIGKILL
