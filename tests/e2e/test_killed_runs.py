"""Runs that are killed with SIGKILL at random moments end the same: the short version of ``make soak``."""

from __future__ import annotations

import os
import time
from pathlib import Path

import kill_harness

KILLS = {"text": 9, "vision": 7, "vision, two loader processes": 4}


def test_killed_runs_end_the_same_to_the_last_bit(tmp_path: Path) -> None:
    seed = int(os.environ.get("TRANSFER_KILL_SEED") or time.time())
    report = kill_harness.kill(tmp_path, seed, KILLS)
    print(report)  # noqa: T201  # shown where the test fails: TRANSFER_KILL_SEED=... draws the same moments
    assert not report.differences
    assert report.kills == KILLS
    assert report.total >= 20
    assert report.counts["compared"] >= len(KILLS)
    assert report.counts["fresh processes"] >= 2
