"""The contracts between the parts."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Dense, PointPreprocessing, Steps
from torch import nn

from transfer import Backbone, FeatureSpec, Preprocessing, Split


class Counting(Sequence[int]):
    """A column that counts how often it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return range(10)[index]


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Split({"x": [1, 2, 3]}, np.zeros(2))
    with pytest.raises(ValueError, match="differ in length"):
        Split({"x": [1, 2]}, np.zeros(2), ["a"])


def test_a_selection_reads_nothing() -> None:
    column = Counting()
    split = Split({"x": column}, np.arange(10), [f"n{i}" for i in range(10)])
    part = split.select(np.array([7, 2, 5])).select(np.array([2, 0]))
    assert column.reads == 0
    assert list(part.fields["x"]) == [5, 7]
    assert part.fields["x"][0:2] == [5, 7]
    assert part.targets.tolist() == [5, 7]
    assert [part.name(i) for i in range(len(part))] == ["n5", "n7"]


def test_an_example_without_a_name_is_called_by_its_index() -> None:
    assert Split({"x": [1, 2]}, np.zeros(2)).name(1) == "example 1"


def test_a_selection_can_be_sent_to_a_loader_process() -> None:
    part = Split({"x": ["a", "b", "c"]}, np.arange(3)).select(np.array([2, 0]))
    back = pickle.loads(pickle.dumps(part))
    assert list(back.fields["x"]) == ["c", "a"]


def test_a_backbone_is_the_chain_of_its_stages() -> None:
    backbone = Dense(width=5).eval()
    inputs = torch.randn(3, 4)
    expected = inputs
    for stage in backbone.stages:
        expected = stage(expected)
    assert torch.equal(backbone(inputs), expected)
    assert [name for name, _ in backbone.stages.named_children()] == ["first", "second", "third"]


def test_a_sequence_has_a_mask() -> None:
    steps, mask = Steps()(torch.randn(2, 4))
    assert (steps.shape, mask.shape, mask.dtype) == ((2, 4, 3), (2, 4), torch.bool)


@pytest.mark.parametrize("names", [[], ["a."], ["head"], ["head.a"], [""]])
def test_stages_have_proper_names(names: list[str]) -> None:
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

    with pytest.raises(ValueError, match="stages need names"):
        Misnamed()


def test_what_a_backbone_does_by_default() -> None:
    backbone = Dense.from_data([[1, 2, 3, 4]], width=3)
    assert backbone.width == 3
    assert Dense.from_assets({}, width=3).width == 3
    assert (backbone.assets(), backbone.load_pretrained()) == ({}, {})
    preprocessing = backbone.preprocessing
    assert preprocessing.augment("same") == "same"
    assert preprocessing.length("anything") == 1


def test_encoded_values_of_one_shape_are_stacked() -> None:
    class Pairs(Preprocessing):
        def encode(self, values: Sequence[Any]) -> list[Any]:
            return [(torch.tensor([float(value)]), torch.tensor(int(value))) for value in values]

        def read(self, source: str) -> Any:
            return source

    pairs = Pairs()
    numbers, places = pairs.collate(pairs.encode(["1", "2"]))
    assert (numbers.tolist(), places.tolist()) == ([[1.0], [2.0]], [1, 2])
    assert pairs.collate([torch.zeros(3), torch.ones(3)]).tolist() == [[0] * 3, [1] * 3]
