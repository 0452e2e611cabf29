"""Two real processes that train one run on the CPU: like one, or stopped with a clear message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import kill_harness
import pytest
import torch
import yaml
from kill_harness import Attempt, Zygote
from safetensors.torch import load_file
from torch.distributed import TCPStore
from torch.nn.functional import cross_entropy

import transfer
from transfer.config.check import load_config
from transfer.runs import train as workflow
from transfer.training.build import build

LONGEST_SECONDS = 60.0
WORDS = ("good", "bad", "film", "plot", "dull", "bright", "slow", "fast", "actor", "end")

Config = dict[str, Any]


class Launcher:
    """Starts two processes as torchrun does, which takes ten seconds longer: environment, and the store to meet at.

    Args:
        zygote: Forks the first process. The second has a parent of its own, so that their sets differ in order.
    """

    def __init__(self, zygote: Zygote) -> None:
        self.zygotes = [zygote, Zygote()]

    def __enter__(self) -> Self:
        self.zygotes[1].__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.zygotes[1].__exit__()

    def start(
        self, cwd: Path, *arguments: str, environment: Mapping[str, str] | None = None, **second: str
    ) -> list[Attempt]:
        """Start a command line twice; ``second`` adds to the environment of the second process."""
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        attempts = []
        for rank, zygote in enumerate(self.zygotes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            meeting |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            own = {"TRANSFER_CACHE": str(cwd / "cache"), "COLUMNS": "200", **(environment or {})}
            attempts.append(zygote.start(arguments, cwd, {**place, **meeting, **own, **(second if rank else {})}))
        return attempts


@pytest.fixture(scope="module")
def launcher(zygote: Zygote) -> Iterator[Launcher]:
    with Launcher(zygote) as started:
        yield started


@pytest.fixture
def reviews(tmp_path: Path) -> Config:
    """Odd numbers of texts everywhere, and a last batch (of 3) that is too small for two processes."""
    generator = torch.Generator().manual_seed(0)
    for name, count in {"train": 45, "val": 21, "test": 33}.items():
        lines = ["text,label"]
        for number in range(count):
            words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (1 + number % 7,), generator=generator)]
            lines.append(f"{' '.join(words)},{'good' if 'good' in words or 'bright' in words else 'other'}")
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    files = {name: str(tmp_path / f"{name}.csv") for name in ("train", "val", "test")}
    return {
        "seed": 1,
        "data": {"name": "text_csv", "text": "text", "label": "label", **files},
        "backbone": {"name": "textcnn", "vectors": None, "dimensions": 8, "kernel_sizes": [1, 2], "filters": 8},
        "head": {"name": "linear"},
        "task": {"name": "classification"},
        "train": {
            "batch_size": 7,
            "optimizer": {"name": "adam", "lr": 0.01},
            "scheduler": {"name": "one_cycle"},
            "ema": 0.9,
            "clip_norm": 1.0,
            "phases": [{"epochs": 1, "freeze": ["embedding"]}, {"epochs": 2, "lr": 0.003}],
            "checkpoint": {"every_steps": 1},
        },
    }


@pytest.fixture
def images() -> Config:
    """Frozen batch norm: the feature cache, of two views of augmented images, then a stage that is fine-tuned."""
    return {
        "seed": 1,
        "data": {"name": "shapes", "image_size": 32, "per_class": 13},
        "backbone": {
            "name": "torchvision",
            "model": "shufflenet_v2_x0_5",
            "weights": None,
            "image_size": 32,
            "resize": 32,
            "augmentation": [{"name": "RandomHorizontalFlip"}],
        },
        "train": {
            "batch_size": 7,
            "accumulate": 2,
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
            "views": 2,
            "phases": [{"epochs": 2, "freeze": "backbone"}],
        },
    }


def write(folder: Path, config: Config) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def statuses(attempts: list[Attempt]) -> list[int]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda attempt: attempt.status(), attempts))


def folder_of(cwd: Path) -> Path:
    (run,) = (cwd / "runs").iterdir()
    return run


def begin(launcher: Launcher, cwd: Path, config: Config) -> tuple[list[Attempt], Path]:
    """Start a run in two processes and wait until it has saved for the first time."""
    write(cwd, config)
    attempts = launcher.start(cwd, "run", "config.yaml")
    saved_by = time.monotonic() + LONGEST_SECONDS
    while all(attempt.running for attempt in attempts) and not any(cwd.glob("runs/*/checkpoints/last/state.json")):
        assert time.monotonic() < saved_by, (cwd / "log").read_text()
        time.sleep(0.002)
    return attempts, folder_of(cwd)


def run_both(launcher: Launcher, cwd: Path, config: Config) -> Path:
    write(cwd, config)
    assert statuses(launcher.start(cwd, "run", "config.yaml")) == [0, 0], (cwd / "log").read_text()
    return folder_of(cwd)


def figures(run: Path) -> list[Any]:
    """Return losses and metrics of every epoch, and those of the test split."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [*(part for record in records for part in (record["train"], record["validation"])), summary(run)["test"]]


def summary(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text()))


def assert_equal_to_rounding(found: Path, expected: Path) -> None:
    assert len(figures(found)) == len(figures(expected))
    for one, other in zip(figures(found), figures(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for name in ("model/weights.safetensors", "predictions.safetensors"):
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["reviews", "images"])
def test_two_processes_give_what_one_gives(
    kind: str, launcher: Launcher, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = request.getfixturevalue(kind)
    alone = transfer.run(config, output=tmp_path / "alone").folder
    both = run_both(launcher, tmp_path / "both", config)
    assert all(count % 2 for count in summary(both)["examples"].values()), "two must not divide what is tested"
    assert_equal_to_rounding(both, alone)
    assert json.loads((both / "environment.json").read_text())["processes"] == 2
    # What one process must not do twice.
    log = (tmp_path / "both" / "log").read_text()
    assert log.count("epoch 1/") == log.count(" done ") == log.count("next: transfer predict") == 1
    assert sorted(path.name for path in both.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert summary(both)["cache"] == summary(alone)["cache"]
    if kind == "images":
        assert all(report["cached"] for report in summary(both)["cache"])
        entries = [path for path in (tmp_path / "both" / "cache").iterdir() if len(path.name) == 40]
        assert len(entries) == 4  # two views of the training split, and the two others


@pytest.mark.parametrize("batch_size", [100, 3])
def test_gradient_equals_that_of_global_batch(
    batch_size: int, launcher: Launcher, tmp_path: Path, reviews: Config
) -> None:
    """A step of plain descent at rate 1 is the gradient; of a batch of 3 the second process has no share."""
    train_file = Path(reviews["data"]["train"])
    train_file.write_text("".join(train_file.read_text().splitlines(keepends=True)[: 1 + batch_size]))
    reviews["train"] = {
        "batch_size": batch_size,
        "optimizer": {"name": "sgd", "lr": 1.0},
        "phases": [{"epochs": 1}],
    }
    built = build(load_config(reviews), workflow.ignore_events)
    model, train = built.experiment.model, built.experiment.train
    (batch,) = train.epoch(0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    cross_entropy(model(batch.inputs), batch.targets).backward()
    run = run_both(launcher, tmp_path / "both", reviews)
    after = load_file(run / "checkpoints" / "last" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(before[name] - after[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_batch_norm_statistics_are_means_over_ranks(launcher: Launcher, tmp_path: Path, images: Config) -> None:
    """With shares of one size the mean of the first layer's inputs is that of the whole batch; its spread is not."""
    images["data"]["per_class"] = 4
    images["backbone"]["augmentation"] = "none"
    images["train"] = {"batch_size": 12, "optimizer": {"name": "sgd", "lr": 0.01}, "phases": [{"epochs": 1}]}
    alone = transfer.run(images, output=tmp_path / "alone").folder
    both = run_both(launcher, tmp_path / "both", images)
    one, other = (load_file(run / "checkpoints" / "last" / "model.safetensors") for run in (alone, both))
    (first,) = [name for name in one if name.startswith("stem.") and name.endswith("running_mean")]
    assert one[first].abs().max() > 1e-3
    torch.testing.assert_close(other[first], one[first], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_other_with_error(
    victim: int, launcher: Launcher, tmp_path: Path, reviews: Config
) -> None:
    reviews["train"]["phases"] = [{"epochs": 1000}]
    attempts, run = begin(launcher, tmp_path / "run", reviews)
    attempts[victim].kill()
    killed_at = time.monotonic()
    expected = [1, 1]
    expected[victim] = -signal.SIGKILL
    assert statuses(attempts) == expected
    assert time.monotonic() - killed_at < LONGEST_SECONDS / 2
    log = (tmp_path / "run" / "log").read_text()
    assert log.count("another process of this run was lost") == 1
    assert f"transfer resume runs/{run.name}" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_all_ranks_and_any_number_resumes(
    number: signal.Signals, status: int, launcher: Launcher, tmp_path: Path, reviews: Config
) -> None:
    reviews["train"]["phases"] = [{"epochs": 2}, {"epochs": 6, "freeze": ["embedding"]}]
    whole = run_both(launcher, tmp_path / "whole", reviews)
    stopped = tmp_path / "stopped"
    attempts, run = begin(launcher, stopped, reviews)
    os.kill(attempts[1].pid, number)
    assert statuses(attempts) == [status, status]
    log = (stopped / "log").read_text()
    assert log.count(f"interrupted; resume with: transfer resume runs/{run.name}") == 1
    assert "Traceback" not in log
    assert summary(run)["status"] == "interrupted"
    if number == signal.SIGTERM:
        assert statuses(launcher.start(stopped, "resume", f"runs/{run.name}")) == [0, 0]
        assert kill_harness.outcome(run) == kill_harness.outcome(whole)  # as many as before: to the last bit
    else:
        notes: list[Any] = []
        transfer.resume(run, observe=notes.append)
        assert any("processes 2 -> 1" in getattr(note, "text", "") for note in notes)
        assert_equal_to_rounding(run, whole)


def test_single_process_run_resumes_in_two(launcher: Launcher, tmp_path: Path, reviews: Config) -> None:
    reviews["train"]["phases"] = [{"epochs": 6}]
    config = write(tmp_path / "run", reviews)
    whole = transfer.run(config, output=tmp_path / "whole").folder
    environment = {"TRANSFER_CACHE": str(tmp_path / "cache"), "COLUMNS": "1000"}
    attempt = launcher.zygotes[0].start(("run", "config.yaml"), config.parent, environment)
    while not any(config.parent.glob("runs/*/checkpoints/last/state.json")):
        time.sleep(0.002)
    attempt.kill()
    assert attempt.status() == -signal.SIGKILL
    run = folder_of(config.parent)
    assert statuses(launcher.start(config.parent, "resume", f"runs/{run.name}")) == [0, 0]
    assert "processes 1 -> 2" in (config.parent / "log").read_text()
    assert_equal_to_rounding(run, whole)


MISTAKES = {
    "a key that is none": ("train.batchsize=3", {}, [2, 2], "batchsize"),
    "no such data": ("data.train=nowhere.csv", {}, [2, 1], "nowhere.csv"),
    "sharding": ("seed=1", {"ACCELERATE_USE_FSDP": "true"}, [2, 2], "FSDP shards the model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_error_is_printed_once(mistake: str, launcher: Launcher, tmp_path: Path, reviews: Config) -> None:
    override, environment, expected, text = MISTAKES[mistake]
    write(tmp_path, reviews)
    found = statuses(launcher.start(tmp_path, "run", "config.yaml", override, environment=environment))
    log = (tmp_path / "log").read_text()
    assert found == expected, log
    assert log.count("╭─") == 1, log
    assert text in log
    assert "Traceback" not in log
    assert not (tmp_path / "runs").exists()


def test_processes_with_different_data_are_refused(launcher: Launcher, tmp_path: Path, reviews: Config) -> None:
    """As on two machines, one of which has another version of the data."""
    lines = Path(reviews["data"]["train"]).read_text().splitlines(keepends=True)
    (tmp_path / "other.csv").write_text("".join([*lines[:-1], "good good,other\n"]))
    reviews["data"]["train"] = f"${{TRAIN:-{reviews['data']['train']}}}"
    write(tmp_path, reviews)
    found = statuses(launcher.start(tmp_path, "run", "config.yaml", TRAIN=str(tmp_path / "other.csv")))
    log = (tmp_path / "log").read_text()
    assert found == [1, 1], log
    assert log.count("process 1 was given other data") == 1


def test_non_finite_loss_is_printed_once(launcher: Launcher, tmp_path: Path, reviews: Config) -> None:
    reviews["train"] |= {"optimizer": {"name": "sgd", "lr": 1e30}, "clip_norm": None, "scheduler": None}
    write(tmp_path, reviews)
    assert statuses(launcher.start(tmp_path, "run", "config.yaml")) == [1, 1]
    log = (tmp_path / "log").read_text()
    assert log.count("fix ") == 1, log


@pytest.mark.slow
@pytest.mark.parametrize(
    "real",
    [
        ["torch.distributed.run", "--nproc-per-node=2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_real_launchers(real: list[str], tmp_path: Path, reviews: Config) -> None:
    alone = transfer.run(reviews, output=tmp_path / "alone").folder
    write(tmp_path, reviews)
    command = [sys.executable, "-m", *real, "-m", "transfer", "run", "config.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFER_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    assert json.loads((folder_of(tmp_path) / "environment.json").read_text())["processes"] == 2
    assert_equal_to_rounding(folder_of(tmp_path), alone)
