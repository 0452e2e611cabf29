"""Options that name classes, for datasets whose classes are known only after reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Points

import transfer
from transfer import ConfigError, DataSpec
from transfer.models.saved_model import read_model
from transfer.registry import entry_points as registry


class UnknownPoints(Points):
    """Points whose classes are known only after reading."""

    @property
    def spec(self) -> DataSpec:
        """Only the field and the kind of target."""
        return DataSpec(("point",), "class")

    def load(self) -> transfer.Data:
        """Add the names of the classes."""
        splits = super().load().splits
        return transfer.Data(DataSpec(("point",), "class", ("near", "far")), splits)


@pytest.fixture
def unknown(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a run on classes that are known only after reading."""
    registry.register("dataset", "unknown_points")(UnknownPoints)
    return config | {"data": {"name": "unknown_points"}}


def test_class_weights_by_name(unknown: dict[str, Any], tmp_path: Path) -> None:
    unknown["task"] = {"name": "classification", "class_weights": {"far": 3, "near": 1}}
    transfer.check(unknown)
    run = transfer.run(unknown, ["train.report=false"], output=tmp_path)
    task = read_model(run.folder / "model").task
    assert task.classes == ("near", "far")  # type: ignore[attr-defined]
    assert task.weights.tolist() == [1, 3]  # type: ignore[attr-defined]


def test_class_weights_of_unknown_names_are_refused(unknown: dict[str, Any]) -> None:
    unknown["task"] = {"name": "classification", "class_weights": {"far": 3, "nera": 1}}
    transfer.check(unknown)  # the names are not known yet
    with pytest.raises(ConfigError, match="class_weights names other classes") as caught:
        transfer.run(unknown)
    assert caught.value.problems[0].available == ("near", "far")


def test_class_weights_determine_outputs_before_data(unknown: dict[str, Any]) -> None:
    unknown["task"] = {"name": "classification", "class_weights": {"a": 1, "b": 2, "c": 1}}
    _, parts = transfer.check(unknown)
    assert parts.task.out_features == 3
