"""The data of a run that has changed since the training: classes and splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transfer
from transfer.registry import entry_points as registry
from transfer.training.events import Note

Change = Callable[[transfer.Data], transfer.Data]


@pytest.fixture
def run(config: dict[str, Any], tmp_path: Path) -> transfer.Run:
    config["train"]["report"] = False
    return transfer.run(config, output=tmp_path)


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Return a function that changes the data of the dataset from now on."""
    dataset = registry._registered["dataset", "points"]
    load = dataset.load  # type: ignore[attr-defined]
    return lambda function: monkeypatch.setattr(dataset, "load", lambda self: function(load(self)))


def with_classes(*classes: str, targets: tuple[int, int] = (0, 1)) -> Change:
    """Return a change that renames the two classes and maps their indices."""

    def function(data: transfer.Data) -> transfer.Data:
        splits = {n: replace(s, targets=np.array(targets)[s.targets]) for n, s in data.splits.items()}
        return transfer.Data(replace(data.spec, classes=classes), splits)

    return function


def test_renamed_class_is_refused_with_the_names(run: transfer.Run, change: Any, call: Any) -> None:
    change(with_classes("close", "far"))
    for use in (transfer.evaluate, transfer.preview_predictions):
        with pytest.raises(
            transfer.DataError, match=r"the model has no class 'close' .80 examples, .*; the data has no class 'near'"
        ) as e:
            use(run.folder)
        assert e.value.problems[0].available == ("near", "far")
    assert call("evaluate", run.folder)[0] == 2
    assert "the classes of the data are not those of the model" in transfer.report(run.folder).read_text("utf-8")


def test_added_class_is_refused(run: transfer.Run, change: Any) -> None:
    change(with_classes("beyond", "near", "far", targets=(1, 2)))
    with pytest.raises(transfer.DataError, match="the model has no class 'beyond'"):
        transfer.evaluate(run.folder)


def test_classes_in_another_order_are_mapped_by_name(run: transfer.Run, change: Any) -> None:
    change(with_classes("far", "near", targets=(1, 0)))
    notes: list[Any] = []
    assert transfer.evaluate(run.folder, observe=notes.append) == run.summary["test"]
    assert not [note for note in notes if isinstance(note, Note)]


def test_removed_class_keeps_the_meaning_of_the_others(run: transfer.Run, change: Any) -> None:
    def without_near(data: transfer.Data) -> transfer.Data:
        far = {name: split.select(np.flatnonzero(split.targets == 1)) for name, split in data.splits.items()}
        # The training split needs two classes, the tested one does not.
        splits = {"train": data.splits["train"], "test": far["test"]}
        return transfer.Data(data.spec, splits)

    change(without_near)
    notes: list[Any] = []
    transfer.evaluate(run.folder, observe=notes.append)
    (note,) = [note.text for note in notes if isinstance(note, Note)]
    assert note.startswith("the test split has changed since the training (40 examples then, 20 now)")


def test_changed_test_split_is_reported_by_the_command(run: transfer.Run, change: Any, call: Any) -> None:
    def shorter(data: transfer.Data) -> transfer.Data:
        return transfer.Data(data.spec, {**data.splits, "test": data.splits["test"].select(np.arange(30))})

    change(shorter)
    status, _, err = call("evaluate", run.folder, "--json")
    assert status == 0
    assert "the test split has changed since the training (40 examples then, 30 now)" in err
    assert "changed" not in call("evaluate", run.folder, "--split", "validation", "--json")[2]


def test_missing_label_column_is_zeros_and_missing_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer.runs import data as module

    def read(target: Any) -> Any:
        split = transfer.Split({"x": ["a", "b"]}, np.array([[1.0, 0.0], [0.0, 1.0]]))
        read_data = transfer.Data(transfer.DataSpec(("x",), target, ("c", "a")), {"train": split})
        monkeypatch.setattr(module, "read_data", lambda _: (read_data, dict(read_data.splits)))
        trained = transfer.DataSpec(("x",), target, ("a", "b", "c"))
        return module.read_splits(None, trained, Path())  # type: ignore[arg-type]

    assert read("labels")["train"].targets.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    with pytest.raises(transfer.DataError, match="the data has no class 'b'"):
        read("number")
