# ruff: noqa: T201
"""Kills runs with SIGKILL at random moments, resumes them, and compares their ends to that of a run left alone.

    python tests/e2e/kill_harness.py --kills 200 --seed 7

Every attempt is a process of its own. Most are forked from one that has imported everything and done nothing else, so
that an attempt takes a second and not five; some are started anew. All kills are real; their moments are drawn from the
seed: any time at all, while a checkpoint is written, or while the feature cache is filled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.append(str(Path(__file__).parents[1]))  # where pytest finds the module by itself
from forked_python import LIBRARIES, ForkedPython

TIMES = {"seconds", "examples_per_second", "waiting_for_data", "peak_memory_bytes"}
LONGEST_SECONDS = 300.0
FRESH_EVERY = 14
"""Every so many attempts one is started anew instead of forked."""
KILLS_OF_A_RUN = (4, 9)
CHECKPOINT = {"every_steps": 1, "keep": 2}
IN_BACKGROUND = {**CHECKPOINT, "in_background": True}
CONFIGS: dict[str, dict[str, Any]] = {
    # Dropout, a moving average, accumulation, clipping, a schedule by steps, words learned from the data.
    "text": {
        "seed": 1,
        "data": {"name": "mini_reviews", "limit": 20},
        "backbone": {"name": "textcnn", "vectors": None, "dimensions": 8, "kernel_sizes": [1, 2], "filters": 8},
        "head": {"name": "linear", "dropout": 0.5},
        "train": {
            "batch_size": 5,
            "optimizer": {"name": "adam", "lr": 0.01},
            "scheduler": {"name": "one_cycle"},
            "ema": 0.9,
            "accumulate": 2,
            "clip_norm": 1.0,
            "phases": [{"epochs": 1, "freeze": ["embedding"]}, {"epochs": 2, "lr": 0.003}],
            "checkpoint": IN_BACKGROUND,
        },
    },
    # Augmentation, batch norm, loader processes, a feature cache of two views that is filled in each phase.
    "vision": {
        "seed": 1,
        "data": {"name": "shapes", "image_size": 32, "per_class": 8},
        "backbone": {
            "name": "torchvision",
            "model": "shufflenet_v2_x0_5",
            "weights": None,
            "image_size": 32,
            "resize": 32,
            "augmentation": [{"name": "RandomHorizontalFlip"}],
        },
        "train": {
            "batch_size": 6,
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
            "scheduler": {"name": "cosine"},
            "views": 2,
            "phases": [{"epochs": 1, "freeze": "backbone"}, {"epochs": 2, "freeze": {"until": "stage4"}, "lr": 0.01}],
            "checkpoint": CHECKPOINT,
        },
    },
}
# The same without the cache, so that pictures are augmented by loader processes and the whole network trains.
CONFIGS["vision, two loader processes"] = {
    **CONFIGS["vision"],
    "train": {
        **CONFIGS["vision"]["train"],
        "views": None,
        "workers": 2,
        "checkpoint": IN_BACKGROUND,
        "phases": [{"epochs": 1, "freeze": {"until": "stage2"}}, {"epochs": 1, "lr": 0.01}],
    },
}


@dataclass
class Report:
    """What the harness did."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    def __str__(self) -> str:
        compared = f"{self.counts['compared']} runs compared to the last bit, {len(self.differences)} differences"
        lines = [f"seed {self.seed}: {self.total} kills, {compared}"]
        lines += [f"  {count:5d} kills of {name}" for name, count in sorted(self.kills.items())]
        lines += [f"  {count:5d} kills {moment}" for moment, count in self.moments.most_common()]
        lines += [f"  {count:5d} {what}" for what, count in sorted(self.counts.items())]
        return "\n".join([*lines, *(f"DIFFERENT: {text}" for text in self.differences)])


class Zygote(ForkedPython):
    """A process that has imported everything, and forks one that runs a command line."""

    def __init__(self) -> None:
        commands = ("transfer.cli.app", "transfer.cli.progress", "transfer.runs.train")
        super().__init__((*LIBRARIES, *commands, "transfer_vision.data.datasets"))

    def start(self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Attempt:
        """Start ``transfer ARGUMENTS``, whose output is appended to the file ``log`` of its working directory."""
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        return Attempt(self.fork(("-m", "transfer", *arguments), cwd, variables), cwd, self)


@dataclass
class Attempt:
    """One process; ``parent`` says how it ended, or it is a process of our own."""

    pid: int
    cwd: Path
    parent: Zygote | subprocess.Popen[bytes]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    @property
    def running(self) -> bool:
        """It is neither gone nor a zombie."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def status(self) -> int:
        """Wait for the end; the exit status, or minus the signal."""
        if isinstance(self.parent, Zygote):
            return self.parent.wait(self.pid)
        return self.parent.wait(timeout=LONGEST_SECONDS)


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that a run ends with, but for times: metrics, summary, and the bytes of model and checkpoints."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    files = [*(folder / "model").iterdir(), *(folder / "checkpoints").glob("[bl]*t/*.safetensors")]
    return {
        "metrics.jsonl": [{k: v for k, v in record.items() if k not in TIMES} for record in records],
        "summary.json": {k: v for k, v in summary.items() if k not in TIMES},
        **{str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)},
    }


def _run_folder(cwd: Path) -> Path | None:
    """Return the run directory; one that was killed before its config was written is no run."""
    found = [path.parent for path in (cwd / "runs").glob("*/config.yaml")]
    assert len(found) < 2, found
    return found[0] if found else None


class Harness:
    """Kills, resumes, compares.

    Args:
        folder: Where everything is written.
        seed: Of every moment.
        zygote: Forks the attempts.
    """

    def __init__(self, folder: Path, seed: int, zygote: Zygote) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.zygote = zygote
        self.report = Report(seed)
        self.number = self.attempts = 0

    def run(self, kills: Mapping[str, int]) -> Report:
        for name, wanted in kills.items():
            config = self.folder / f"{name.replace(', ', '_').replace(' ', '_')}.yaml"
            config.write_text(yaml.safe_dump(CONFIGS[name]), encoding="utf-8")
            started = time.monotonic()
            whole = self._new_folder()
            status = self._start(whole, "run", str(config)).status()
            assert status == 0, (whole / "log").read_text()
            seconds = time.monotonic() - started
            expected = self._ended_with(whole, name)
            while self.report.kills[name] < wanted:
                killed = self._kill_a_run(name, config, seconds, wanted)
                if killed is not None:
                    self._compare(name, expected, self._ended_with(killed, name))
        return self.report

    def _kill_a_run(self, name: str, config: Path, seconds: float, wanted: int) -> Path | None:
        """Kill one run up to a few times, then let it end; its folder, or None where it was never interrupted."""
        cwd = self._new_folder()
        most = min(self.random.randint(*KILLS_OF_A_RUN), wanted - self.report.kills[name])
        kills = 0
        while kills < most:
            attempt = self._start(cwd, *self._command(cwd, config))
            moment = self._wait(attempt, seconds)
            attempt.kill()
            status = attempt.status()
            if status == 0:
                self.report.counts["attempts that ended before their kill"] += 1
                return cwd if kills else None
            assert status == -signal.SIGKILL, f"{status}: {(cwd / 'log').read_text()}"
            kills += 1
            self.report.kills[name] += 1
            self.report.moments[f"{moment}, {self._state(cwd)}"] += 1
        status = self._start(cwd, *self._command(cwd, config)).status()
        assert status == 0, f"{status}: {(cwd / 'log').read_text()}"
        return cwd

    def _command(self, cwd: Path, config: Path) -> tuple[str, str]:
        found = _run_folder(cwd)
        if found is None:
            return "run", str(config)  # killed before the run's folder was whole: nothing was lost
        return "resume", str(found)

    def _start(self, cwd: Path, *arguments: str) -> Attempt:
        environment = {"TRANSFER_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
        self.attempts += 1
        fresh = self.attempts % FRESH_EVERY == 0
        self.report.counts[f"{'fresh' if fresh else 'forked'} processes"] += 1
        if not fresh:
            return self.zygote.start(arguments, cwd, environment)
        with (cwd / "log").open("ab") as log:
            command = [sys.executable, "-m", "transfer", *arguments]
            process = subprocess.Popen(command, cwd=cwd, env=os.environ | environment, stdout=log, stderr=log)
        return Attempt(process.pid, cwd, process)

    def _wait(self, attempt: Attempt, seconds: float) -> str:
        """Wait for a moment to kill at; say which kind of moment it was."""
        kind = self.random.choice(["at any time", "at any time", "at a checkpoint", "at the cache"])
        delay = self.random.uniform(0, seconds)
        skip, extra = self.random.randint(0, 4), self.random.uniform(0, 0.02)
        deadline = time.monotonic() + (delay if kind == "at any time" else LONGEST_SECONDS)
        patterns = {"at a checkpoint": "runs/*/checkpoints/.*.tmp", "at the cache": "cache/.*"}
        seen = before = False
        while time.monotonic() < deadline and attempt.running:
            if kind != "at any time":
                seen = any(attempt.cwd.glob(patterns[kind]))
                skip -= seen and not before
                if seen and skip < 0:
                    time.sleep(extra)
                    break
                before = seen
            time.sleep(0.001)
        return kind

    def _state(self, cwd: Path) -> str:
        """Say what a kill has left."""
        run = _run_folder(cwd)
        if run is None:
            return "before the run's folder was whole"
        checkpoints = run / "checkpoints"
        if any(cwd.glob("cache/.*")) and not (checkpoints / "last").exists():
            return "with a cache half filled"
        if any(checkpoints.glob(".*.tmp")):
            return "with a checkpoint half written"
        try:
            progress = json.loads((checkpoints / "last" / "state.json").read_text(encoding="utf-8"))["progress"]
        except OSError:
            return "before the first checkpoint" if not checkpoints.exists() else "between two checkpoints"
        return "in an epoch" if progress["epoch"]["batches"] else "after the end of an epoch"

    def _ended_with(self, cwd: Path, name: str) -> dict[str, Any]:
        run = _run_folder(cwd)
        assert run is not None
        found = outcome(run)
        if name == "text":
            (cwd / "log").write_bytes(b"")
            reviews = ["a warm, funny film", "two hours of my life that I will never get back"]
            assert self._start(cwd, "predict", str(run), *reviews, "--json").status() == 0
            found["predictions"] = (cwd / "log").read_text()
        return found

    def _compare(self, name: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        self.report.counts["compared"] += 1
        if expected.keys() != found.keys():
            self.report.differences.append(f"{name}: files {sorted(expected.keys() ^ found.keys())}")
        self.report.differences += [
            f"{name}: {part}" for part in expected if part in found and expected[part] != found[part]
        ]

    def _new_folder(self) -> Path:
        self.number += 1
        path = self.folder / str(self.number)
        path.mkdir()
        return path


def kill(folder: Path, seed: int, kills: Mapping[str, int]) -> Report:
    """Kill runs of some configs so many times each."""
    with Zygote() as zygote:
        return Harness(folder, seed, zygote).run(kills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, help="over all configs")
    parser.add_argument("--seed", type=int, help="of the moments; by default one from the clock, which is printed")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"seed {seed}", flush=True)
    share = -(-options.kills // len(CONFIGS))
    with tempfile.TemporaryDirectory() as folder:
        report = kill(Path(folder), seed, dict.fromkeys(CONFIGS, share))
    print(report)
    sys.exit(bool(report.differences))


if __name__ == "__main__":
    main()
