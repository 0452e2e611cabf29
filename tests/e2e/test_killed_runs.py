"""Runs that are killed with SIGKILL at random moments and resumed: the short versions of ``make soak``."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from kill_harness import Harness, Zygote

KILLS = {"text": 2, "vision": 2, "vision, two loader processes": 1}
MORE_KILLS = {"text": 9, "vision": 7, "vision, two loader processes": 4}


@pytest.mark.parametrize("kills", [KILLS, pytest.param(MORE_KILLS, marks=pytest.mark.slow)], ids=["few", "many"])
def test_killed_runs_end_with_identical_bits(tmp_path: Path, kills: dict[str, int], zygote: Zygote) -> None:
    seed = int(os.environ.get("TRANSFER_KILL_SEED") or time.time())
    report = Harness(tmp_path, seed, zygote).run(kills)
    print(report)  # noqa: T201  # shown if the test fails: TRANSFER_KILL_SEED=... draws the same moments
    assert not report.differences
    assert report.kills == kills
    assert report.counts["compared"] >= len(kills)
    assert report.counts["fresh processes"] >= (kills is MORE_KILLS)
