"""What goes wrong on real machines, injected: what the user is told, what is left, and that the run can go on."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
import torch
from conftest import Points
from test_resume import outcome

import transfer
from transfer import Data, DataError, RunError, Split, TrainingError, TransferError, register
from transfer.models.model import Model
from transfer.storage import checkpoint
from transfer.system.atomic_files import write_atomically
from transfer.training.events import EpochEnded, Event, Note

OVERRIDES = ["train.batch_size=27", "train.phases=[{epochs: 3}]", "train.checkpoint.every_steps=1"]


class Texts:
    """Collects what a user reads."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.lines.append(event.text)


class Stop(BaseException):
    """Ends a process as a signal would that nothing can catch."""


def after_epoch(number: int, do: Callable[[], None]) -> Callable[[Event], None]:
    """Return an observer that does something when an epoch has ended."""

    def observe(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.record["epoch"] == number:
            do()

    return observe


def stop() -> None:
    raise Stop


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def expected(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return the outcome of a run to which nothing happened."""
    return outcome(transfer.run(config, OVERRIDES, output=tmp_path / "whole").folder)


@pytest.fixture
def stopped(config: dict[str, Any], tmp_path: Path) -> Path:
    """Return the folder of a run that was stopped in its third epoch."""
    with pytest.raises(Stop):
        transfer.run(config, OVERRIDES, output=tmp_path / "stopped", observe=after_epoch(2, stop))
    (folder,) = (tmp_path / "stopped").iterdir()
    return folder


def the_run(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


@pytest.mark.parametrize("in_background", [False, True], ids=["foreground", "background"])
def test_disk_full(config: dict[str, Any], tmp_path: Path, expected: dict[str, Any], in_background: bool) -> None:
    """A limit on the size of files stands in for a full disk: the kernel refuses the write in the same place."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = after_epoch(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1])))
    overrides = [*OVERRIDES, f"train.checkpoint.in_background={str(in_background).lower()}"]
    try:
        with pytest.raises(TrainingError, match=r"the checkpoint cannot be written: .*large") as caught:
            transfer.run(config, overrides, output=tmp_path / "runs", observe=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "transfer resume" in str(caught.value.problems[0].fix)
    folder = the_run(tmp_path)
    _, state = checkpoint.load(folder / "checkpoints" / "last")
    assert "recovered" not in state
    assert not list((folder / "checkpoints").glob(".*"))
    transfer.resume(folder)
    assert outcome(folder) == expected


def test_a_file_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        with pytest.raises(OSError, match="large"):
            write_atomically(tmp_path / "file", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list(tmp_path.iterdir())


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped": _flip,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "metrics.safetensors"])
def test_a_damaged_checkpoint(stopped: Path, expected: dict[str, Any], file: str, damage: str) -> None:
    DAMAGE[damage](stopped / "checkpoints" / "last" / file)
    said = Texts()
    transfer.resume(stopped, observe=said)
    assert any("checkpoint before is used" in line and file in line for line in said.lines)
    assert outcome(stopped) == expected


def test_every_checkpoint_is_damaged(stopped: Path) -> None:
    for folder in ("last", "last.previous"):
        _flip(stopped / "checkpoints" / folder / "model.safetensors")
    with pytest.raises(RunError, match="damaged") as caught:
        transfer.resume(stopped)
    assert len(caught.value.problems) == 2
    assert all("transfer run" in str(problem.fix) for problem in caught.value.problems)


def test_the_weights_of_the_best_epoch_are_damaged(config: dict[str, Any], tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "data.distance=3.0", "train.optimizer.lr=0.01"]
    with pytest.raises(Stop):
        transfer.run(config, overrides, output=tmp_path / "runs", observe=after_epoch(3, stop))
    folder = the_run(tmp_path)
    before = checkpoint.load(folder / "checkpoints" / "best.previous")[1]
    DAMAGE["truncated"](folder / "checkpoints" / "best" / "model.safetensors")
    said = Texts()
    run = transfer.resume(folder, observe=said)
    assert any("the weights of the best epoch are damaged" in line for line in said.lines)
    assert (run.summary["best_epoch"], run.summary["validation"]) == (before["epoch"], before["validation"])


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_metrics(stopped: Path, expected: dict[str, Any], damage: str) -> None:
    DAMAGE[damage](stopped / "metrics.jsonl")
    said = Texts()
    transfer.resume(stopped, observe=said)
    assert any("metrics.jsonl" in line and "restored" in line for line in said.lines)
    assert outcome(stopped) == expected


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    overrides = [*OVERRIDES, "train.phases=[{epochs: 3, freeze: backbone}]"]
    expected = outcome(transfer.run(config, overrides, output=tmp_path / "whole").folder)
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Stop):
        transfer.run(config, overrides, output=tmp_path / "runs", observe=after_epoch(1, stop))
    for file in (tmp_path / "cache").glob("*/0.bin"):
        DAMAGE[damage](file)
    folder = the_run(tmp_path)
    transfer.resume(folder)
    assert outcome(folder) == expected


def test_a_read_only_run_directory(stopped: Path) -> None:
    """Root may write everywhere, so a child that is somebody else tries."""
    before = sorted(path.name for path in stopped.rglob("*"))
    stopped.chmod(0o555)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.chdir(stopped)
        if not os.getuid():
            os.setuid(65534)
        try:
            transfer.resume(".")
        except RunError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    stopped.chmod(0o755)
    assert "the run directory cannot be written: Permission denied" in os.read(reading, 10_000).decode()
    assert sorted(path.name for path in stopped.rglob("*")) == before


class Files(Sequence[Any]):
    """Points in files, read when they are asked for."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> list[float]:
        if (self.folder / "kill").exists() and os.getpid() != int((self.folder / "kill").read_text()):
            os.kill(os.getpid(), signal.SIGKILL)
        return [float(number) for number in (self.folder / str(int(index))).read_text().split()]


@pytest.fixture
def points_in_files(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put points into files, which are read anew in every epoch."""
    folder = tmp_path / "points"
    folder.mkdir()
    data = Points().load()
    for name, split in data.splits.items():
        (folder / name).mkdir()
        for i, point in enumerate(split.fields["point"]):
            (folder / name / str(i)).write_text(" ".join(map(repr, point)))

    @register("dataset", "files")
    class PointFiles(Points):
        def load(self) -> Data:
            splits = {
                name: Split(
                    {"point": Files(folder / name, len(split))}, split.targets, [str(i) for i in range(len(split))]
                )
                for name, split in data.splits.items()
            }
            return Data(self.spec, splits)

    monkeypatch.setattr(conftest.PointPreprocessing, "keep_bytes", 0)
    config["data"] = {"name": "files"}
    return folder


def test_a_data_file_vanishes(config: dict[str, Any], tmp_path: Path, points_in_files: Path) -> None:
    expected = outcome(transfer.run(config, OVERRIDES, output=tmp_path / "whole").folder)
    file = points_in_files / "train" / "7"
    content = file.read_text()
    with pytest.raises(DataError, match="cannot be read") as caught:
        transfer.run(config, OVERRIDES, output=tmp_path / "runs", observe=after_epoch(1, file.unlink))
    assert caught.value.exit_status == 2
    assert caught.value.problems[0].where == "7"
    file.write_text(content)
    folder = the_run(tmp_path)
    transfer.resume(folder)
    assert outcome(folder) == expected


def test_a_loader_process_is_killed(config: dict[str, Any], tmp_path: Path, points_in_files: Path) -> None:
    overrides = [*OVERRIDES, "train.workers=2"]
    expected = outcome(transfer.run(config, overrides, output=tmp_path / "whole").folder)
    flag = points_in_files / "train" / "kill"
    with pytest.raises(TrainingError, match="a loader process was killed") as caught:
        transfer.run(
            config,
            overrides,
            output=tmp_path / "runs",
            observe=after_epoch(1, lambda: flag.write_text(str(os.getpid())) and None),
        )
    assert "transfer resume" in str(caught.value.problems[0].fix)
    flag.unlink()
    folder = the_run(tmp_path)
    transfer.resume(folder)
    assert outcome(folder) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, expected: dict[str, Any]
) -> None:
    from transfer.builtin.tasks import Classification

    loss = Classification.loss
    broken = [False]

    def fails(self: Classification, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss(self, outputs, targets) * (value if broken[0] and outputs.requires_grad else 1.0)

    monkeypatch.setattr(Classification, "loss", fails)
    with pytest.raises(TrainingError, match=r"the loss of epoch 2, step 1 is (nan|inf)"):
        transfer.run(
            config, OVERRIDES, output=tmp_path / "runs", observe=after_epoch(1, lambda: broken.insert(0, True))
        )
    folder = the_run(tmp_path)
    tensors, _ = checkpoint.load(folder / "checkpoints" / "last")
    assert all(torch.isfinite(tensor).all() for tensor in tensors["model"].values())
    broken.insert(0, False)
    transfer.resume(folder)
    assert outcome(folder) == expected


def test_weights_that_are_not_finite_are_never_saved(config: dict[str, Any], tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "train.optimizer={name: sgd, lr: 1.0e+38}"]
    with pytest.raises(TransferError, match=r"not finite|is nan|is inf"):
        transfer.run(config, overrides, output=tmp_path / "runs")
    for file in the_run(tmp_path).glob("checkpoints/*/model.safetensors"):
        assert all(np.isfinite(tensor.numpy()).all() for tensor in checkpoint.load_tensors(file).values())


def test_out_of_memory(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:

        def fails(self: Model, inputs: Any, first_stage: int = 0) -> Any:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(TrainingError, match="memory ran out on a batch of 27 examples") as caught:
            transfer.run(
                config,
                OVERRIDES,
                output=tmp_path / "runs",
                observe=after_epoch(1, lambda: patch.setattr(Model, "forward", fails)),
            )
    assert "train.batch_size" in str(caught.value.problems[0].fix)
    folder = the_run(tmp_path)
    transfer.resume(folder)
    assert outcome(folder) == expected


def test_other_data_is_refused(config: dict[str, Any], stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Points.load

    def fewer(self: Points) -> Data:
        data = load(self)
        return Data(data.spec, {**data.splits, "train": data.splits["train"].select(np.arange(100))})

    monkeypatch.setattr(Points, "load", fewer)
    with pytest.raises(RunError, match="the run began with other data"):
        transfer.resume(stopped)


def test_other_base_weights_are_refused(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*OVERRIDES, "train.phases=[{epochs: 3, freeze: backbone}]"]
    with pytest.raises(Stop):
        transfer.run(config, overrides, output=tmp_path / "runs", observe=after_epoch(1, stop))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: torch.default_generator.manual_seed(seed + 1))
    with pytest.raises(RunError, match="the run began with other base weights"):
        transfer.resume(the_run(tmp_path))


def test_a_run_without_a_checkpoint_begins_again(
    config: dict[str, Any], tmp_path: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *arguments, **options: stop())
        with pytest.raises(Stop):
            transfer.run(config, OVERRIDES, output=tmp_path / "runs")
    folder = the_run(tmp_path)
    said = Texts()
    transfer.resume(folder, observe=said)
    assert any("starts from the beginning" in line for line in said.lines)
    assert outcome(folder) == expected


def test_a_complete_run_is_left_alone(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, OVERRIDES, output=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    said = Texts()
    assert transfer.resume(run.folder, observe=said).summary == run.summary
    assert any("is already complete" in line for line in said.lines)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()} == before


def test_what_has_changed_since_is_said(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    said = Texts()
    transfer.resume(stopped, observe=said)
    assert any("threads 1 -> 99" in line for line in said.lines)
