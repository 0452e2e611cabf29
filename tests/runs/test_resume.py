"""A run that was stopped anywhere and goes on ends as if nothing had happened."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import transfer
from transfer.storage import checkpoint
from transfer.system.signals import Interrupted
from transfer.training.experiment import Experiment
from transfer.training.optimizer import build_optimizer
from transfer.training.optimizer_state import group_options

TIMES = {"seconds", "examples_per_second", "waiting_for_data", "peak_memory_bytes"}


class Killed(BaseException):
    """Stands in for a signal that nothing can catch: nobody handles it, and nothing is written after it."""


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in TIMES}


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that a run ends with, but for times."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return {
        "metrics": [without_times(json.loads(line)) for line in text.splitlines()],
        "summary": without_times(json.loads((folder / "summary.json").read_text(encoding="utf-8"))),
        "model": {p.name: p.read_bytes() for p in sorted((folder / "model").iterdir())},
        "last": {
            p.name: p.read_bytes() for p in sorted((folder / "checkpoints" / "last").iterdir()) if p.suffix != ".json"
        },
    }


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it has written; flushing, which is slow, is for a loss of power."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def killed_at_save(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function after which the n-th checkpoint from then on is the last thing that a run does."""
    save = checkpoint.save

    def arm(number: int) -> None:
        count = 0

        def counting(*arguments: Any, **options: Any) -> None:
            nonlocal count
            save(*arguments, **options)
            count += 1
            if count == number:
                monkeypatch.setattr(checkpoint, "save", save)
                raise Killed

        monkeypatch.setattr(checkpoint, "save", counting)

    return arm


PHASES = "train.phases=[{epochs: 1, freeze: backbone}, {epochs: 2, freeze: {until: first}, lr: 0.02}]"
CASES = {
    "momentum": [],
    "adam, average, accumulation, clipping": [
        "train.optimizer={name: adamw, lr: 0.01}",
        "train.ema=0.9",
        "train.accumulate=2",
        "train.batch_size=12",
        "train.clip_norm=1.0",
        "train.scheduler={name: cosine}",
    ],
    "mixup, bf16, loader processes": [
        "train.mix={mixup: 0.4}",
        "train.precision=bf16",
        "train.workers=2",
        "train.scheduler={name: multisteplr, milestones: [1]}",
    ],
    "one cycle": ["train.scheduler={name: one_cycle}", "train.optimizer={name: adam}"],
    "cyclic": ["train.scheduler={name: cycliclr, base_lr: 0.001}"],
    "warm-up, plateau": ["train.scheduler={name: plateau, patience: 0}", "train.warmup_epochs=0.5"],
    "patience": ["train.phases=[{epochs: 9, patience: 1, lr: 1.0e-9}, {epochs: 1}]"],
    "batch norm that follows": ["train.phases=[{epochs: 3, freeze: backbone, batch_norm: train}]"],
    "batch norm eval, linear": ["train.phases=[{epochs: 3, batch_norm: eval}]", "train.scheduler={name: linear}"],
    "solved head": [
        "train.phases=[{epochs: 1, freeze: backbone, solver: lbfgs}, {epochs: 3, batch_norm: eval, lr: 0.02}]"
    ],
    "regression": ["data.target=number", "task={name: regression}"],
}


@pytest.mark.parametrize("case", CASES)
def test_it_ends_the_same_to_the_last_bit(
    case: str, config: dict[str, Any], tmp_path: Path, killed_at_save: Callable[[int], None]
) -> None:
    overrides = ["train.batch_size=27", PHASES, *CASES[case], "train.checkpoint.every_steps=1"]
    expected = outcome(transfer.run(config, overrides, output=tmp_path / "whole").folder)
    # Every process saves once or a few times, then it is killed: after steps, at the ends of epochs and of phases.
    killed_at_save(2)
    with pytest.raises(Killed):
        transfer.run(config, overrides, output=tmp_path / "killed")
    (folder,) = (tmp_path / "killed").iterdir()
    for saves in (2, 1, 3, 2, 1, 1):
        killed_at_save(saves)
        with pytest.raises(Killed):
            transfer.resume(folder)
    killed_at_save(0)
    transfer.resume(folder)
    found = outcome(folder)
    for part, value in expected.items():
        assert found[part] == value, part


def test_checkpoint_with_a_parameter_group_per_stage(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at_save: Callable[[int], None]
) -> None:
    """Older versions did not merge groups with the same options."""
    overrides = ["train.scheduler={name: cosine}", "train.checkpoint.every_steps=1"]
    expected = outcome(transfer.run(config, overrides, output=tmp_path / "complete").folder)
    groups: list[list[dict[str, Any]]] = []

    def old_options(optimizer: Any) -> list[dict[str, Any]]:
        options = group_options(optimizer)
        groups.append([{"name": group.pop("stages")[0], **group} for group in options])
        return groups[-1]

    with monkeypatch.context() as patch:
        patch.setattr("transfer.training.engine.build_optimizer", separate_groups)
        patch.setattr("transfer.training.optimizer_state.group_options", old_options)
        killed_at_save(2)
        with pytest.raises(Killed):
            transfer.run(config, overrides, output=tmp_path / "killed")
    assert [group["name"] for group in groups[-1]] == ["first", "second", "third", "head"]
    (folder,) = (tmp_path / "killed").iterdir()
    transfer.resume(folder)
    assert outcome(folder) == expected


def separate_groups(*arguments: Any, **options: Any) -> Any:
    return build_optimizer(*arguments, **{**options, "trained_before": None})


def test_what_a_killed_process_left_of_the_model_is_no_part_of_it(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle of the weights leaves the file under the name that safetensors writes it to."""
    expected = outcome(transfer.run(config, output=tmp_path / "whole").folder)

    def half_write(path: Path, tensors: object) -> None:
        (path.parent / ".tmpqa1x1V").write_bytes(b"\x10")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("transfer.models.saved_model.write_tensors", half_write)
        with pytest.raises(Killed):
            transfer.run(config, output=tmp_path / "killed")
    (folder,) = (tmp_path / "killed").iterdir()
    transfer.resume(folder)
    assert outcome(folder)["model"] == expected["model"]


def test_short_epochs_do_not_each_end_with_a_checkpoint_but_training_does(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    save = checkpoint.save

    def counting(folder: Path, tensors: Any, state: Any, **options: Any) -> None:
        if folder.name == "last":
            written.append(len(state["progress"]["records"]))
        save(folder, tensors, state, **options)

    monkeypatch.setattr(checkpoint, "save", counting)
    phases = "train.phases=[{epochs: 3}, {epochs: 1, freeze: backbone}]"
    transfer.run(config, [phases], output=tmp_path)
    assert written == [4]
    written.clear()
    monkeypatch.setattr("transfer.training.engine.MIN_CHECKPOINT_SECONDS", 0.0)
    transfer.run(config, [phases], output=tmp_path)
    assert written == [1, 2, 3, 4]


def test_a_signal_while_the_cache_is_filled_for_the_next_phase(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epochs before were too short for a checkpoint each: what is saved is the end of their phase."""
    expected = outcome(transfer.run(config, [PHASES], output=tmp_path / "whole").folder)
    batches_for, asked = Experiment.batches_for, 0

    def interrupted_at_the_third(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise Interrupted(signal.SIGTERM)
        return batches_for(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "batches_for", interrupted_at_the_third)
        with pytest.raises(Interrupted):
            transfer.run(config, [PHASES], output=tmp_path / "stopped")
    (folder,) = (tmp_path / "stopped").iterdir()
    transfer.resume(folder)
    found = outcome(folder)
    for part, value in expected.items():
        assert found[part] == value, part


def test_run_into_starts_then_resumes_then_reports_complete_run(
    config: dict[str, Any], tmp_path: Path, killed_at_save: Callable[[int], None]
) -> None:
    whole = transfer.run(config, output=tmp_path / "whole").folder
    into = tmp_path / "runs" / "a"
    # A crash before the config was written leaves a folder that is not a run yet.
    into.mkdir(parents=True)
    (into / "environment.json").write_text("{}")
    killed_at_save(2)
    with pytest.raises(Killed):
        transfer.run(config, into=into)
    assert transfer.run(config, into=into).folder == into
    assert outcome(into) == outcome(whole)
    notes: list[Any] = []
    before = (into / "summary.json").read_bytes()
    transfer.run(config, into=into, observe=notes.append)
    assert [note.text for note in notes] == [f"{into} is already complete"]
    assert (into / "summary.json").read_bytes() == before


def test_run_into_refuses_another_config_and_other_folders(config: dict[str, Any], tmp_path: Path) -> None:
    into = transfer.run(config, into=tmp_path / "a", quick=True).folder
    with pytest.raises(transfer.UserError, match=r"contains a run of another config: .*--quick differ"):
        transfer.run(config, into=into)
    with pytest.raises(transfer.UserError, match="another config: seed differs"):
        transfer.run(config, ["seed=7"], into=into, quick=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").touch()
    with pytest.raises(transfer.UserError, match="is no run directory, and is not empty"):
        transfer.run(config, into=tmp_path / "b")


def test_run_into_accepts_settled_batch_size(config: dict[str, Any], tmp_path: Path) -> None:
    config["train"]["batch_size"] = "auto"
    into = transfer.run(config, into=tmp_path / "a", quick=True).folder
    assert transfer.run(config, into=into, quick=True).folder == into
