"""Completion of splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from transfer import Data, DataError, DataSpec, Split, split_off
from transfer.data.splits import complete, count_classes


def split(targets: npt.ArrayLike, first: int = 0) -> Split:
    targets = np.asarray(targets)
    return Split({"x": list(range(first, first + len(targets)))}, targets)


def ids(part: Split) -> list[int]:
    return list(part.fields["x"])


def data(target: Any = "class", **splits: Split) -> Data:
    return Data(DataSpec(("x",), target, ("a", "b", "c")), splits)


HALVES = [0, 1] * 50


def test_complete_keeps_three_splits() -> None:
    given = data(train=split(HALVES), validation=split([0, 1], 100), test=split([1, 0, 1], 200))
    completed = complete(given, validation=0.5, limit=None)
    assert {name: ids(part) for name, part in completed.items()} == {
        name: ids(part) for name, part in given.splits.items()
    }


def test_complete_uses_validation_as_test_split() -> None:
    completed = complete(data(train=split(HALVES), validation=split([0, 1, 0], 500)), validation=0.1, limit=None)
    assert ids(completed["test"]) == [500, 501, 502]
    assert (len(completed["train"]), len(completed["validation"])) == (90, 10)
    assert sorted(ids(completed["train"]) + ids(completed["validation"])) == list(range(100))


def test_complete_cuts_validation_from_train() -> None:
    completed = complete(data(train=split(HALVES), test=split([0, 1], 500)), validation=0.2, limit=None)
    assert {name: len(part) for name, part in completed.items()} == {"train": 80, "validation": 20, "test": 2}


def test_complete_without_second_split_has_no_test() -> None:
    assert set(complete(data(train=split(HALVES)), validation=0.1, limit=None)) == {"train", "validation"}


def test_split_off_is_stratified() -> None:
    left, taken = split_off(split([0] * 70 + [1] * 20 + [2] * 10), 0.1)
    assert np.bincount(taken.targets).tolist() == [7, 2, 1]
    assert np.bincount(left.targets).tolist() == [63, 18, 9]


def test_split_off_is_deterministic_and_keeps_order() -> None:
    first, second = (split_off(split(HALVES), 0.3) for _ in range(2))
    assert [ids(part) for part in first] == [ids(part) for part in second]
    for part in first:
        assert ids(part) == sorted(ids(part))


def test_split_off_is_random() -> None:
    _, taken = split_off(split([0] * 100), 0.1)
    assert ids(taken) != list(range(10))


@pytest.mark.parametrize(("count", "fraction", "taken"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.99, 9), (10, 0.25, 2)])
def test_split_off_keeps_every_class_in_both_parts(count: int, fraction: float, taken: int) -> None:
    left, off = split_off(split([0] * count), fraction)
    assert (len(left), len(off)) == (count - taken, taken)


def test_split_off_leaves_class_of_one_example() -> None:
    left, taken = split_off(split([0] * 9 + [1]), 0.5)
    assert set(left.targets.tolist()) == {0, 1}
    assert set(taken.targets.tolist()) == {0}


@pytest.mark.parametrize("targets", [[0], [0, 1, 2]])
def test_split_off_refuses_single_examples(targets: list[int]) -> None:
    with pytest.raises(DataError, match="too few to cut"):
        split_off(split(targets), 0.5)


def test_split_off_refuses_empty_split() -> None:
    with pytest.raises(DataError, match="too few to cut"):
        split_off(split(np.zeros(0, dtype=np.int64)), 0.5)


def test_split_off_numbers_is_not_stratified() -> None:
    left, taken = split_off(split(np.arange(40, dtype=np.float32).reshape(20, 2)), 0.25)
    assert (len(left), len(taken)) == (15, 5)


def test_limit_takes_first_examples_per_class() -> None:
    given = data(train=split([0, 0, 0, 1, 1, 2]), validation=split([2, 1, 0, 0], 10), test=split([0, 0, 0], 20))
    completed = complete(given, validation=0.1, limit=2)
    assert ids(completed["train"]) == [0, 1, 3, 4, 5]
    assert ids(completed["validation"]) == [10, 11, 12, 13]
    assert ids(completed["test"]) == [20, 21, 22]
    quick = complete(given, validation=0.1, limit=2, limits_test=True)
    assert ids(quick["test"]) == [20, 21]


def test_limit_of_numbers_is_per_split() -> None:
    targets = np.zeros((9, 3), dtype=np.float32)
    completed = complete(data("number", train=split(targets), validation=split(targets)), validation=0.5, limit=4)
    assert {name: len(part) for name, part in completed.items()} == {"train": 4, "validation": 4, "test": 9}


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_complete_refuses_empty_split(name: str) -> None:
    splits = {part: split(HALVES) for part in ("train", "validation", "test")}
    splits[name] = split(np.zeros(0, dtype=np.int64))
    with pytest.raises(DataError, match=f"the {name} split is empty"):
        complete(data(**splits), validation=0.1, limit=None)


def test_complete_with_limit_refuses_empty_split() -> None:
    empty = split(np.zeros(0, dtype=np.int64))
    with pytest.raises(DataError, match="the test split is empty"):
        complete(data(train=split(HALVES), test=empty), validation=0.1, limit=3)


def test_complete_refuses_single_class() -> None:
    with pytest.raises(DataError, match="contains only the class 'b'"):
        complete(data(train=split([1] * 10)), validation=0.1, limit=None)


@pytest.mark.parametrize("splits", [{"test": [0, 1]}, {"train": [0, 1], "dev": [0, 1]}])
def test_complete_refuses_unknown_splits(splits: dict[str, list[int]]) -> None:
    with pytest.raises(DataError) as caught:
        complete(data(**{name: split(targets) for name, targets in splits.items()}), validation=0.1, limit=None)
    assert caught.value.problems[0].available == ("train", "validation", "test")


def test_count_classes_of_classes_labels_and_numbers() -> None:
    classes, labels, numbers = (DataSpec(("x",), kind, ("a", "b", "c")) for kind in ("class", "labels", "number"))
    rows = np.array([[1, 0, 1], [0, 0, 1]], dtype=np.float32)
    assert count_classes(split([0, 2, 2]), classes) == {"a": 1, "b": 0, "c": 2}
    assert count_classes(split(rows), labels) == {"a": 1, "b": 0, "c": 2}
    assert count_classes(split(rows), numbers) == {}


def grouped(targets: list[int], groups: list[int]) -> Split:
    return Split({"x": list(range(len(targets)))}, np.array(targets), (), np.array(groups))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.95])
def test_split_off_groups_is_stratified(fraction: float) -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), generator.integers(1, 8, 60))
    complete_split = grouped(generator.integers(0, 3, len(groups)).tolist(), groups.tolist())
    left, taken = split_off(complete_split, fraction)
    assert not set(left.groups.tolist()) & set(taken.groups.tolist())
    assert sorted(ids(left) + ids(taken)) == list(range(len(complete_split)))
    for target in range(3):
        part = (taken.targets == target).sum() / (complete_split.targets == target).sum()
        assert abs(part - fraction) < 0.05
    assert ids(split_off(complete_split, fraction)[1]) == ids(taken)


def test_split_off_large_groups_takes_and_leaves_one() -> None:
    for fraction in (0.01, 0.99):
        left, taken = split_off(grouped([0, 1] * 10, [0] * 12 + [1] * 8), fraction)
        assert {len(left), len(taken)} == {8, 12}


def test_split_off_refuses_single_group() -> None:
    with pytest.raises(DataError, match="all examples are of one group"):
        split_off(grouped([0, 1, 0, 1], [7, 7, 7, 7]), 0.5)


def test_complete_keeps_groups_together() -> None:
    completed = complete(data(train=grouped([0, 1] * 20, (np.arange(40) // 4).tolist())), validation=0.2, limit=None)
    assert len(completed["validation"]) == 8
    assert not set(completed["train"].groups.tolist()) & set(completed["validation"].groups.tolist())
