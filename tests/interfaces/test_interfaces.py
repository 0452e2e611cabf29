"""Contracts of plugins."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Dense, PointPreprocessing, Points, Steps
from torch import nn

import transfer
from transfer import Backbone, ConfigError, Data, DataSpec, FeatureSpec, Preprocessing, Split, register


class Counting(Sequence[int]):
    """A column that counts how often it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return range(10)[index]


def test_split_refuses_columns_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Split({"x": [1, 2, 3]}, [0, 1])
    with pytest.raises(ValueError, match="differ in length"):
        Split({"x": [1, 2]}, [0, 1], ["a"])


class Labelled:
    """A shuffled pandas Series in short: ``series[i]`` is the value with the label ``i``."""

    def __init__(self, values: Sequence[Any], labels: Sequence[int]) -> None:
        self.by_label = dict(zip(labels, values, strict=True))

    def __len__(self) -> int:
        return len(self.by_label)

    def __getitem__(self, label: int) -> Any:
        return self.by_label[label]

    def to_numpy(self) -> np.ndarray[Any, Any]:
        return np.array(list(self.by_label.values()))


class Listable(Labelled):
    """A labelled column that converts only to a list."""

    to_numpy = None  # type: ignore[assignment]

    def tolist(self) -> list[Any]:
        return list(self.by_label.values())


@pytest.mark.parametrize("series", [Labelled, Listable])
def test_split_reads_labelled_columns_by_position(series: type[Labelled]) -> None:
    labels = [2, 0, 1]
    split = Split(
        {"x": series(["c", "a", "b"], labels)},
        series([20, 0, 10], labels),
        series(["third", "first", "second"], labels),
        series([7, 8, 9], labels),
    )
    assert list(split.fields["x"]) == ["c", "a", "b"]
    assert [split.name(i) for i in range(3)] == ["third", "first", "second"]
    assert (split.targets.tolist(), split.groups.tolist()) == ([20, 0, 10], [7, 8, 9])
    part = split.select(np.array([2, 0]))
    assert (list(part.fields["x"]), part.targets.tolist(), part.name(0)) == (["b", "c"], [10, 20], "second")


@pytest.mark.parametrize("column", [{0: "a", 1: "b"}, {"a", "b"}, iter(["a", "b"])])
def test_split_refuses_columns_without_positions(column: Any) -> None:
    with pytest.raises(ValueError, match="field 'x' is of the wrong type: expected a sequence"):
        Split({"x": column}, [0, 1])


def test_split_keeps_lazy_columns() -> None:
    column, tensor, array = Counting(), torch.zeros(10, 2), np.zeros((10, 2))
    split = Split({"x": column, "y": tensor, "z": array}, np.arange(10))
    assert column.reads == 0
    assert (split.fields["x"], split.fields["y"], split.fields["z"]) == (column, tensor, array)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([1, 0], np.array([1, 0], dtype=np.int64)),
        (np.array([1, 0], dtype=np.uint8), np.array([1, 0], dtype=np.int64)),
        (torch.tensor([1, 0], dtype=torch.int32), np.array([1, 0], dtype=np.int64)),
        ([True, False], np.array([1, 0], dtype=np.int64)),
        ([[1, 0], [1, 1]], np.array([[1, 0], [1, 1]], dtype=np.float32)),
        (np.array([[0.5], [2.5]]), np.array([[0.5], [2.5]], dtype=np.float32)),
    ],
    ids=["list", "uint8", "tensor", "booleans", "labels", "float64"],
)
def test_split_converts_targets(targets: Any, expected: np.ndarray[Any, Any]) -> None:
    split = Split({"x": ["a", "b"]}, targets)
    assert split.targets.dtype == expected.dtype
    assert split.targets.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["dog", "cat"], "expected integers"),
        ([0.5, 1.5], r"type float64 and shape \(2,\)"),
        (np.zeros((2, 1, 1)), "expected integers"),
        ([0, -1], "the target of b.jpg is wrong: expected a class index of 0 or more, got -1"),
        ([[0.0], [float("nan")]], "the target of b.jpg is wrong: expected finite"),
        ([[0.0], [1e300]], "the target of b.jpg is wrong: expected finite float32 numbers"),
    ],
    ids=["names", "one-dimensional floats", "three dimensions", "negative", "not a number", "too large"],
)
def test_split_refuses_wrong_targets(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split({"x": ["a", "b"]}, targets, ["a.jpg", "b.jpg"])


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("class", [0, 2], "the train split: the target of example 1 is wrong: expected a class index below 2"),
        ("class", [[0.0, 1.0], [1.0, 0.0]], r"expected int64 \(N,\), got float32 \(2, 2\)"),
        ("labels", [0, 1], r"expected float32 \(N, 2\), got int64 \(2,\)"),
        ("labels", [[0.0, 1.0], [0.5, 0.0]], "the target of example 1 is wrong: expected zeros and ones"),
        ("number", [[0.0], [1.0]], r"expected float32 \(N, 2\)"),
    ],
)
def test_data_refuses_targets_of_other_kind(kind: Any, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data(DataSpec(("x",), kind, ("a", "b")), {"train": Split({"x": ["a", "b"]}, targets)})


@pytest.mark.usefixtures("tiny")
def test_run_reports_wrong_targets_with_location(config: dict[str, Any], tmp_path: Path) -> None:
    @register("dataset", "beyond")
    class Beyond(Points):
        """A dataset with a class index that has no name."""

        def load(self) -> Data:
            train = super().load().splits["train"]
            return Data(self.spec, {"train": Split(train.fields, train.targets + 1)})

    with pytest.raises(ConfigError, match="expected a class index below 2") as caught:
        transfer.run(config, ["data.name=beyond"], output=tmp_path)
    assert caught.value.problems[0].where == "config"


def test_selection_reads_no_values() -> None:
    column = Counting()
    split = Split({"x": column}, np.arange(10), [f"n{i}" for i in range(10)])
    part = split.select(np.array([7, 2, 5])).select(np.array([2, 0]))
    assert column.reads == 0
    assert list(part.fields["x"]) == [5, 7]
    assert part.fields["x"][0:2] == [5, 7]
    assert part.targets.tolist() == [5, 7]
    assert [part.name(i) for i in range(len(part))] == ["n5", "n7"]


def test_name_of_unnamed_example() -> None:
    assert Split({"x": [1, 2]}, [0, 1]).name(1) == "example 1"


def test_selection_can_be_pickled() -> None:
    part = Split({"x": ["a", "b", "c"]}, np.arange(3)).select(np.array([2, 0]))
    back = pickle.loads(pickle.dumps(part))
    assert list(back.fields["x"]) == ["c", "a"]


def test_backbone_runs_chain_of_stages() -> None:
    backbone = Dense(width=5).eval()
    inputs = torch.randn(3, 4)
    expected = inputs
    for stage in backbone.stages:
        expected = stage(expected)
    assert torch.equal(backbone(inputs), expected)
    assert [name for name, _ in backbone.stages.named_children()] == ["first", "second", "third"]


def test_sequence_features_have_mask() -> None:
    steps, mask = Steps()(torch.randn(2, 4))
    assert (steps.shape, mask.shape, mask.dtype) == ((2, 4, 3), (2, 4), torch.bool)


@pytest.mark.parametrize("names", [[], ["a."], ["head"], ["head.a"], [""]])
def test_backbone_refuses_stage_names(names: list[str]) -> None:
    class Misnamed(Backbone):
        field = "point"

        def __init__(self) -> None:
            super().__init__({name: nn.Identity() for name in names})

        @property
        def features(self) -> FeatureSpec:
            return FeatureSpec("vector", 4)

        @property
        def preprocessing(self) -> Preprocessing:
            return PointPreprocessing()

    with pytest.raises(ValueError, match="names of the stages are invalid"):
        Misnamed()


def test_backbone_defaults() -> None:
    backbone = Dense.from_data([[1, 2, 3, 4]], width=3)
    assert backbone.width == 3
    assert Dense.from_assets({}, width=3).width == 3
    assert (backbone.assets(), backbone.load_pretrained()) == ({}, {})
    preprocessing = backbone.preprocessing
    assert preprocessing.augment("same") == "same"
    assert preprocessing.length("anything") == 1


def test_collate_stacks_values() -> None:
    class Pairs(Preprocessing):
        def encode(self, values: Sequence[Any]) -> list[Any]:
            return [(torch.tensor([float(value)]), torch.tensor(int(value))) for value in values]

        def read(self, source: str) -> Any:
            return source

    pairs = Pairs()
    numbers, positions = pairs.collate(pairs.encode(["1", "2"]))
    assert (numbers.tolist(), positions.tolist()) == ([[1.0], [2.0]], [1, 2])
    assert pairs.collate([torch.zeros(3), torch.ones(3)]).tolist() == [[0] * 3, [1] * 3]
