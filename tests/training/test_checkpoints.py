"""Checkpoints that a thread writes while training continues."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import transfer
from transfer import TrainingError
from transfer.config.check import load_config
from transfer.config.train_settings import Checkpoint
from transfer.storage import checkpoint
from transfer.storage.run_directory import RunDirectory
from transfer.system.signals import Interrupted
from transfer.training.build import build
from transfer.training.engine import Trainer
from transfer.training.events import ignore_events


class SlowDisk:
    """Disk on which a checkpoint is written after :attr:`released` is set.

    Attributes:
        released: Event that writes wait for.
        written: The weights and the state of each written checkpoint.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released = threading.Event()
        self.written: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []
        self.error: Exception | None = None
        monkeypatch.setattr(checkpoint, "save", self._save)

    def _save(self, folder: Path, tensors: Any, state: Any, keep: int = 2) -> None:
        assert self.released.wait(10)
        if self.error is not None:
            raise self.error
        self.written.append((tensors["model"], state))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


@pytest.fixture
def trainer(config: dict[str, Any], tmp_path: Path) -> Trainer:
    checked = load_config(config, ["train.checkpoint={in_background: true}"])
    trainer = Trainer(build(checked, ignore_events).experiment, RunDirectory(tmp_path))
    trainer.prepare_phase(trainer.experiment.phases[0])
    return trainer


def step(trainer: Trainer) -> None:
    batch = next(iter(trainer.experiment.train.epoch(0)))
    trainer.train_step([batch], examples=len(batch.indices))


def test_background_write_contains_state_at_save(trainer: Trainer, disk: SlowDisk) -> None:
    step(trainer)
    tensors, state = trainer.state.contents()
    before = {name: tensor.clone() for name, tensor in tensors["model"].items()}
    trainer.checkpoints.save()
    step(trainer)
    assert not disk.written
    disk.released.set()
    trainer.checkpoints.wait()
    ((weights, saved),) = disk.written
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    assert any(not torch.equal(weights[name], tensor) for name, tensor in tensors["model"].items())
    assert saved["progress"]["epoch"] == state["progress"]["epoch"]


def test_background_save_waits_for_previous_write(trainer: Trainer, disk: SlowDisk) -> None:
    step(trainer)
    trainer.checkpoints.save()
    threading.Timer(0.05, disk.released.set).start()
    trainer.checkpoints.save()
    assert len(disk.written) >= 1


def test_background_error_is_raised_at_next_step(trainer: Trainer, disk: SlowDisk) -> None:
    disk.error = TrainingError("the checkpoint cannot be written: No space left on device")
    step(trainer)
    trainer.checkpoints.save()
    assert not trainer.checkpoints.is_due(1)
    disk.released.set()
    with pytest.raises(TrainingError, match="No space left"):
        trainer.checkpoints.wait()
    with pytest.raises(TrainingError, match="No space left"):
        trainer.checkpoints.is_due(1)


def test_second_signal_does_not_wait_for_background_write(trainer: Trainer, disk: SlowDisk) -> None:
    step(trainer)
    trainer.checkpoints.save()
    trainer.checkpoints.__exit__(Interrupted, Interrupted(2, at_once=True), None)
    assert not disk.written
    disk.released.set()
    trainer.checkpoints.__exit__(Interrupted, Interrupted(2), None)
    assert disk.written


def test_background_write_refuses_weights_that_are_not_finite(trainer: Trainer, disk: SlowDisk) -> None:
    step(trainer)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    trainer.checkpoints.save()
    with pytest.raises(TrainingError, match=r"weights are not finite .* after epoch 0, batch 1"):
        trainer.checkpoints.wait()
    assert not disk.written


def test_background_changes_no_bit(config: dict[str, Any], tmp_path: Path) -> None:
    tensors = []
    for in_background in ("false", "true"):
        overrides = [f"train.checkpoint={{every_steps: 1, in_background: {in_background}}}"]
        run = transfer.run(config, overrides, output=tmp_path / in_background)
        tensors.append([checkpoint.load(run.folder / "checkpoints" / name)[0] for name in ("best", "last")])
    for one, other in zip(*tensors, strict=True):
        assert one.keys() == other.keys()
        for file in one:
            assert all(torch.equal(one[file][name], other[file][name]) for name in other[file])


def test_background_is_off_on_cpu_by_default(config: dict[str, Any]) -> None:
    assert Checkpoint().in_background == "auto"
    trainer = Trainer(build(load_config(config), ignore_events).experiment)
    assert not trainer.checkpoints._in_background
