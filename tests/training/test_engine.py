"""The training loop in complete runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import POINT_SIZE, Points

import transfer
from transfer import ConfigError, Data, Split, TrainingError, register
from transfer.config.check import load_config
from transfer.models.saved_model import read_model
from transfer.training.events import EpochEnded, EpochStarted, Event, RunEnded, RunStarted


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_model(folder / "model").model.state_dict()


PHASES = "train.phases=[{epochs: 1, freeze: backbone}, {epochs: 2, freeze: {until: first}, lr: 0.02}]"


def test_metrics_file_has_one_line_per_epoch(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, [PHASES], output=tmp_path)
    found = lines(run.folder)
    assert [(line["phase"], line["epoch"]) for line in found] == [(1, 1), (2, 2), (2, 3)]
    assert found[0]["lr"] == {"head": 0.05}
    assert found[2]["lr"] == {"second": 0.02, "third": 0.02, "head": 0.02}
    for line in found:
        for part in ("train", "validation"):
            assert set(line[part]) == {"loss", "accuracy", "f1_macro"}
            assert math.isfinite(line[part]["loss"])
        assert line["seconds"] >= 0
        assert line["examples_per_second"] > 0
        assert 0 < line["waiting_for_data"] < 1


def test_best_epoch_is_selected_by_validation(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, ["train.phases=[{epochs: 6}]", "train.optimizer.lr=0.3"], output=tmp_path)
    found = lines(run.folder)
    highest = max(found, key=lambda line: line["validation"]["accuracy"])
    best = found[run.summary["best_epoch"] - 1]
    error = max(line["standard_error"] for line in (highest, best))
    assert highest["validation"]["accuracy"] - best["validation"]["accuracy"] <= error
    assert run.summary["validation"] == best["validation"]


def test_best_epoch_of_metric_to_minimize(config: dict[str, Any], tmp_path: Path) -> None:
    overrides = ["data.target=number", "task={name: regression}", "train.phases=[{epochs: 5}]"]
    run = transfer.run(config, overrides, output=tmp_path)
    found = lines(run.folder)
    best = min(found, key=lambda line: line["validation"]["mean_absolute_error"])
    assert run.summary["best_epoch"] == best["epoch"]
    assert run.summary["primary_metric"] == "mean_absolute_error"


def test_training_learns(config: dict[str, Any], tmp_path: Path) -> None:
    overrides = ["data.distance=4.0", "train.phases=[{epochs: 5}]"]
    assert transfer.run(config, overrides, output=tmp_path).summary["test"]["accuracy"] > 0.95


def test_same_seed_gives_identical_weights(config: dict[str, Any], tmp_path: Path) -> None:
    first = transfer.run(config, [PHASES], output=tmp_path)
    torch.manual_seed(12345)
    np.random.seed(1)
    second = transfer.run(config, [PHASES], output=tmp_path)
    ours, theirs = weights(first.folder), weights(second.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("validation", "test", "best_epoch", "parameters"):
        assert first.summary[name] == second.summary[name]
    assert [line["train"] for line in lines(first.folder)] == [line["train"] for line in lines(second.folder)]


def test_loader_workers_do_not_change_results(config: dict[str, Any], tmp_path: Path) -> None:
    first, second = (transfer.run(config, [f"train.workers={n}"], output=tmp_path) for n in (0, 2))
    ours, theirs = weights(first.folder), weights(second.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_different_seed_gives_different_weights(config: dict[str, Any], tmp_path: Path) -> None:
    first, second = (transfer.run(config, [f"seed={seed}"], output=tmp_path) for seed in (0, 1))
    assert not torch.equal(weights(first.folder)["head.output.weight"], weights(second.folder)["head.output.weight"])


def test_all_seeds_are_scored_on_the_same_examples(config: dict[str, Any]) -> None:
    from transfer.config.check import load_config
    from transfer.training.build import build

    first, second = (build(load_config(config, [f"seed={seed}"]), lambda event: None) for seed in (0, 1))
    ours, theirs = (built.experiment.validation.split.fields["point"] for built in (first, second))
    assert list(ours) == list(theirs)


def test_sequence_backbone_trains(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, ["backbone={name: steps}", "head={name: mean_of_steps}"], output=tmp_path)
    assert run.summary["status"] == "complete"


def test_loss_is_mean_over_examples(config: dict[str, Any], tmp_path: Path) -> None:
    """With a negligible learning rate, training and evaluation compute the same loss on every batch."""
    overrides = [
        "backbone.dropout=0.0",
        "train.optimizer={name: sgd, lr: 1.0e-30}",
        "train.phases=[{epochs: 1, freeze: backbone}]",
        "train.batch_size=7",
    ]
    run = transfer.run(config, overrides, output=tmp_path)
    (line,) = lines(run.folder)
    scored = transfer.evaluate(run.folder, "train")
    assert line["train"] == pytest.approx(scored, rel=1e-5)


def test_parameters_are_counted(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, ["train.phases=[{epochs: 1, freeze: backbone}]"], output=tmp_path)
    total = (4 * 8 + 8) + 16 + (8 * 8 + 8) + (8 * 8 + 8) + 16
    assert run.summary["parameters"] == {"total": total + 18, "trainable": 18}


def halves(split: Split) -> dict[str, Split]:
    """Return the first half of a split as validation, and the second half as test."""
    validation, test = np.split(np.arange(len(split)), 2)
    return {"validation": split.select(validation), "test": split.select(test)}


class Faulty(Points):
    """Points with an infinite one in the split ``where``."""

    def __init__(self, *, where: str = "train", count: int = 160) -> None:
        super().__init__(count=count)
        self.where = where

    def load(self) -> Data:
        """Make the first point infinite."""
        data = super().load()
        splits = dict(data.splits)
        points = list(splits[self.where].fields["point"])
        points[0] = [math.inf] * POINT_SIZE
        splits[self.where] = Split({"point": points}, splits[self.where].targets)
        if self.where == "train":
            splits |= halves(splits["test"])
        return Data(data.spec, splits)


def test_loss_that_is_not_finite_stops_the_run(config: dict[str, Any], tmp_path: Path) -> None:
    register("dataset", "faulty")(Faulty)
    with pytest.raises(TrainingError, match=r"the loss of epoch 1, step \d+ is nan: learning rates .*examples \["):
        transfer.run(config, ["data.name=faulty"], output=tmp_path)
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "failed"
    assert summary["error"].startswith("TrainingError: the loss of epoch 1")
    assert not (folder / "model").exists()


def test_error_names_the_example_with_infinite_loss(config: dict[str, Any], tmp_path: Path) -> None:
    register("dataset", "faulty")(Faulty)
    with pytest.raises(TrainingError) as caught:
        transfer.run(config, ["data.name=faulty", "train.batch_size=8"], output=tmp_path)
    named = str(caught.value).partition("examples [")[2].partition("]")[0]
    assert 0 in map(int, named.split(","))


def test_observer_receives_events_in_order(config: dict[str, Any], tmp_path: Path) -> None:
    seen: list[Event] = []
    run = transfer.run(config, [PHASES], output=tmp_path, observe=seen.append)
    kinds = [type(event) for event in seen]
    assert kinds.index(RunStarted) < kinds.index(EpochStarted) < kinds.index(EpochEnded) < kinds.index(RunEnded)
    started = [event for event in seen if isinstance(event, EpochStarted)]
    assert [(e.epoch, e.epochs, e.phase, e.phases) for e in started] == [(1, 3, 1, 2), (2, 3, 2, 2), (3, 3, 2, 2)]
    ended = [event for event in seen if isinstance(event, EpochEnded)]
    assert [event.record for event in ended] == lines(run.folder)
    assert [e.record["epoch"] for e in ended if e.best][-1] == run.summary["best_epoch"]
    assert isinstance(seen[-1], RunEnded)
    assert seen[-1].summary == run.summary


def test_run_with_plateau_scheduler(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, ["train.scheduler={name: plateau, patience: 0}"], output=tmp_path)
    assert run.summary["status"] == "complete"


def test_runs_of_different_precision_in_one_process(config: dict[str, Any], tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        transfer.run(config, [f"train.precision={precision}"], output=tmp_path)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_that_is_not_finite_raises_training_error(
    config: dict[str, Any], tmp_path: Path, split: str
) -> None:

    class Spoiled(Faulty):
        def load(self) -> Data:
            data = super().load()
            splits = dict(data.splits)
            if split == "validation":
                splits |= halves(splits["test"])
            return Data(data.spec, splits)

    register("dataset", "spoiled")(Spoiled)
    with pytest.raises(TrainingError, match=split):
        transfer.run(config, ["data={name: spoiled, where: test}"], output=tmp_path)


def test_conflicting_optimizer_options_raise_config_error(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="refuses its options"):
        transfer.run(config, ["train.optimizer={name: adam, fused: true, foreach: true}"], output=tmp_path)


def test_cyclic_scheduler_options(config: dict[str, Any]) -> None:
    load_config(config, ["train.scheduler={name: cycliclr, base_lr: 0.01, mode: triangular2}"])
    with pytest.raises(ConfigError, match="scale_fn"):
        load_config(config, ["train.scheduler={name: cycliclr, base_lr: 0.01, scale_fn: abs}"])
