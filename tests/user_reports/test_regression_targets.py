"""Regression on targets in their own units, such as prices, years or milligrams."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Dense, Points

import transfer
from transfer import DataSpec, FeatureSpec
from transfer.builtin.heads import Linear
from transfer.builtin.tasks import Regression
from transfer.errors import RunError
from transfer.models.model import Model
from transfer.models.saved_model import read_model
from transfer.registry import entry_points as registry

PRICES = DataSpec(("x",), "number", ("price", "constant"))


class Prices(Points):
    """Points with a price of about 275,000 that depends on the first coordinate."""

    @property
    def spec(self) -> DataSpec:
        """One number."""
        return DataSpec(("point",), "number", ("price",))

    def load(self) -> transfer.Data:
        """Compute the prices."""
        splits = Points(count=self.count, target="number").load().splits
        prices = {
            name: transfer.Split(split.fields, 275_000 + 30_000 * split.targets) for name, split in splits.items()
        }
        return transfer.Data(self.spec, prices)


@pytest.fixture
def prices(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a regression of prices."""
    registry.register("dataset", "prices")(Prices)
    config["train"] |= {"phases": [{"epochs": 5}], "report": False}
    return config | {"data": {"name": "prices"}, "task": {"name": "regression"}}


def mean_error(config: dict[str, Any]) -> float:
    """Return the mean absolute error of the mean of the training targets on the test split."""
    splits = Prices().load().splits
    return float(np.abs(splits["test"].targets - splits["train"].targets.mean()).mean())


def test_metrics_are_in_units_of_targets(prices: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(prices, output=tmp_path)
    assert run.summary["test"]["mean_absolute_error"] < 0.7 * mean_error(prices)
    assert run.summary["test"]["loss"] < 1
    assert transfer.evaluate(run.folder) == run.summary["test"]
    (answer,) = transfer.predict(run.folder, ["0,0,0,0"])
    assert 200_000 < answer["price"] < 350_000


def test_raw_targets_can_be_kept(prices: dict[str, Any], tmp_path: Path) -> None:
    prices["task"]["standardize"] = False
    run = transfer.run(prices, ["train.optimizer.lr=1e-9"], output=tmp_path)
    assert run.summary["test"]["mean_absolute_error"] > 200_000
    assert json.loads((run.folder / "model" / "model.json").read_text())["task_state"] == {}


def test_older_run_keeps_raw_targets(prices: dict[str, Any], tmp_path: Path) -> None:
    prices["task"]["standardize"] = False
    run = transfer.run(prices, ["train.optimizer.lr=1e-9"], output=tmp_path)
    # Older versions had neither the option nor the state of the task.
    described = json.loads((run.folder / "model" / "model.json").read_text())
    del described["task"]["standardize"], described["task_state"]
    (run.folder / "model" / "model.json").write_text(json.dumps(described))
    plain = yaml.safe_load((run.folder / "config.yaml").read_text())
    del plain["task"]["standardize"]
    (run.folder / "config.yaml").write_text(yaml.safe_dump(plain))
    assert transfer.evaluate(run.folder) == run.summary["test"]
    (run.folder / "summary.json").unlink()
    assert transfer.resume(run.folder).summary["test"] == run.summary["test"]


def test_older_seeds_keep_raw_targets(prices: dict[str, Any], tmp_path: Path) -> None:
    prices["train"] |= {"report": False, "phases": [{"epochs": 1}], "optimizer": {"name": "sgd", "lr": 1e-9}}
    prices["task"]["standardize"] = False
    run = transfer.run_seeds(prices, seeds=2, output=tmp_path)
    manifest = json.loads((run.folder / "seeds.json").read_text())
    del manifest["config"]["task"]["standardize"]
    (run.folder / "seeds.json").write_text(json.dumps(manifest))
    (run.folder / "summary.json").unlink()
    shutil.rmtree(run.folder / "seed-4")
    values = run.summary["test"]["mean_absolute_error"]["values"]
    assert transfer.resume_seeds(run.folder).summary["test"]["mean_absolute_error"]["values"] == values


def test_damaged_state_of_the_task_is_refused(prices: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(prices, output=tmp_path)
    file = run.folder / "model" / "model.json"
    described = json.loads(file.read_text())
    for value in (["275000"], [1.0, 2.0], None, [float("inf")]):
        file.write_text(json.dumps(described | {"task_state": {"mean": value, "deviation": [1.0]}}))
        with pytest.raises(RunError, match=r"model\.json"):
            read_model(run.folder / "model")


def test_scaling_is_folded_into_a_linear_layer() -> None:
    model = Model(Dense(), Linear(FeatureSpec("vector", 8), 2)).eval()
    features = torch.randn(3, 8)
    unscaled = model.stages["head"](features)
    names = list(model.state_dict())
    model.scale_outputs((torch.tensor([10.0, -5.0]), torch.tensor([2.0, 3.0])))
    expected = torch.tensor([10.0, -5.0]) + torch.tensor([2.0, 3.0]) * unscaled
    linear = model.head_as_linear()
    assert linear is not None
    assert torch.allclose(model.stages["head"](features), expected)
    assert torch.allclose(linear(features), expected, atol=1e-5)
    assert list(model.state_dict()) == names
    # The scaling is part of exported programs.
    program = torch.export.export(model.stages["head"], (features,), strict=False).module()
    assert torch.allclose(program(features), expected)


def test_constant_number_is_not_scaled() -> None:
    task = Regression(PRICES)
    task.prepare(np.array([[100, 0.1], [300, 0.1], [500, 0.1]], dtype=np.float32))
    assert task.scaling is not None
    assert task.scaling[0].tolist() == pytest.approx([300, 0.1])
    assert task.scaling[1].tolist() == pytest.approx([np.std([100, 300, 500]), 1])
    restored = Regression(PRICES)
    restored.load_state(json.loads(json.dumps(task.state())))
    assert restored.state() == task.state()


def test_balanced_loss_is_equal_in_later_evaluation(config: dict[str, Any], tmp_path: Path) -> None:
    config["task"] = {"name": "classification", "class_weights": "balanced"}
    # An uneven split: with equal counts, all weights are 1.
    config["train"]["report"] = False
    registry.register("dataset", "uneven")(Uneven)
    run = transfer.run(config | {"data": {"name": "uneven"}}, output=tmp_path)
    assert transfer.evaluate(run.folder) == run.summary["test"]


class Uneven(Points):
    """Points of which a quarter are near."""

    def load(self) -> transfer.Data:
        """Leave out most near points of the training split."""
        data = super().load()
        train = data.splits["train"]
        kept = np.flatnonzero((train.targets == 1) | (np.arange(len(train)) % 6 == 0))
        return transfer.Data(data.spec, {**data.splits, "train": train.select(kept)})
