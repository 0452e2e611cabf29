"""Warnings about splits: the same split twice, duplicates, contradictory labels, similar class names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfer import Data, DataError, DataSpec, Split
from transfer.data.inspection import inspect_data
from transfer.data.splits import complete

CLASSES = ("bad", "good")


class Drawn(Sequence[Any]):
    """A column that refuses to be read, and may have a fingerprint."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("the column is read")


class Fingerprinted(Drawn):
    def fingerprint(self) -> str:
        return str(self.count)


def texts(*values: Any, targets: Sequence[int] = (), column: Any = None) -> Split:
    return Split(
        {"x": list(values) if column is None else column}, list(targets) or [i % 2 for i in range(len(values))]
    )


def inspect(classes: tuple[str, ...] = CLASSES, **splits: Split) -> dict[str, str]:
    data = Data(DataSpec(("x",), "class", classes), splits)
    return inspect_data(data, complete(data, validation=0.5, limit=None), ("x",))


def test_distinct_splits_give_no_warning() -> None:
    assert inspect(train=texts("a", "b"), validation=texts("c", "d"), test=texts("e", "f")) == {}


@pytest.mark.parametrize(
    "column",
    [
        ["a", "b", "c", "d"],
        np.arange(8.0).reshape(4, 2),
        torch.arange(8).reshape(4, 2),
        [Image.new("L", (2, 2), i) for i in range(4)],
        [{"row": i} for i in range(4)],
        Drawn(4),
        Fingerprinted(4),
    ],
    ids=lambda column: type(column).__name__,
)
@pytest.mark.parametrize("pair", [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_split_used_twice_is_refused(column: Any, pair: tuple[str, str]) -> None:
    splits = {name: texts(*(f"{name} {i}" for i in range(4))) for name in ("train", "validation", "test")}
    splits |= dict.fromkeys(pair, texts(column=column, targets=[0, 1, 0, 1]))
    message = f"the {pair[0]} and {pair[1]} splits contain the same 4 examples"
    with pytest.raises(DataError, match=message) as caught:
        inspect(**splits)
    option = "val" if "validation" in pair else "test"
    assert f"set {option} to other data, or remove it" in (caught.value.problems[0].fix or "")


def test_split_used_twice_in_another_order_is_refused() -> None:
    with pytest.raises(DataError, match="the same 3 examples"):
        inspect(train=texts("x", "y"), validation=texts("a", "b", "b"), test=texts("b", "a", "b\n"))


@pytest.mark.parametrize(("inner", "outer"), [("test", "validation"), ("train", "validation"), ("validation", "train")])
def test_split_contained_in_another_is_refused(inner: str, outer: str) -> None:
    splits = {name: texts(*(f"{name} {i}" for i in range(12))) for name in ("train", "validation", "test")}
    splits[outer] = texts(*splits[inner].fields["x"], *(f"{outer} {i}" for i in range(30)))
    with pytest.raises(DataError, match=f"all 12 examples of {inner} are also in {outer}") as caught:
        inspect(**splits)
    assert "set val to other data" in (caught.value.problems[0].fix or "")


def test_contained_split_warns_if_small_or_repeated() -> None:
    train, other = texts(*(f"{i}" for i in range(40))), texts("x", "y")
    assert list(inspect(train=train, validation=other, test=texts("6", "7"))) == ["test in train"]
    repeated = texts(*(f"{i % 15}" for i in range(40)))
    warnings = inspect(train=repeated, validation=other, test=texts(*(f"{i % 15}" for i in range(20))))
    assert warnings["test in train"].startswith("20 of 20 examples of test are also in train")


def test_multimodal_examples_are_equal_if_all_fields_are() -> None:
    data = Data(
        DataSpec(("x", "y"), "class", CLASSES),
        {
            "train": Split({"x": ["a", "b"], "y": ["1", "2"]}, [0, 1]),
            "test": Split({"x": ["a", "b"], "y": ["1", "3"]}, [0, 1]),
        },
    )
    assert inspect_data(data, data.splits, ("x", "y")) == {
        "test in train": "1 of 2 examples of test are also in train (example 0 = example 0)"
    }
    with pytest.raises(DataError, match="the train and test splits contain the same 2 examples"):
        inspect_data(data, data.splits, ("x",))


def test_columns_that_would_be_read_are_not_compared() -> None:
    drawn = {name: texts(column=Drawn(4), targets=[0, 1, 0, 1]) for name in ("train", "validation", "test")}
    assert inspect(**drawn) == {}


def test_duplicates_and_overlap_are_counted_and_named() -> None:
    warnings = inspect(
        train=texts("a", "b", "c", "b", targets=[0, 1, 0, 1]),
        validation=texts("d", "c", targets=[0, 0]),
        test=texts("e", "b ", targets=[0, 1]),
    )
    assert warnings == {
        "classes without validation": "no validation example of 'good'",
        "duplicates in train": "1 of 4 examples repeat another one (example 3 = example 1)",
        "validation in train": "1 of 2 examples of validation are also in train (example 1 = example 2)",
        "test in train": "1 of 2 examples of test are also in train (example 1 = example 1)",
    }


def test_contradictory_labels_are_named() -> None:
    warnings = inspect(
        train=texts("a", "b", "c", "a", targets=[0, 1, 0, 1]),
        validation=texts("g", "h"),
        test=texts("b", "e", targets=[0, 1]),
    )
    assert warnings["contradictory labels"] == (
        "4 examples have another label than an equal one (example 0 is bad and example 3 is good)"
    )


def test_contradictory_label_sets_but_not_numbers() -> None:
    train = Split({"x": ["a", "a"]}, np.array([[0, 1], [1, 1]], dtype=np.float32))
    for target, count in (("labels", 1), ("number", 0)):
        data = Data(DataSpec(("x",), target, CLASSES), {"train": train})  # type: ignore[arg-type]
        assert ("contradictory labels" in inspect_data(data, {"train": train}, ("x",))) == count


@pytest.mark.parametrize(
    ("classes", "similar"),
    [
        (("True", "true"), True),
        (("0", "0.0"), True),
        (("New York", "new-york"), True),
        (("1", "-1"), False),
        (("a", "A"), False),
        (("A", "A-"), False),
        (("C", "C++"), False),
        (("1", "10"), False),
    ],
)
def test_similar_class_names(classes: tuple[str, str], similar: bool) -> None:
    warnings = inspect(classes, train=texts("a", "b"), validation=texts("c", "d"), test=texts("e", "f"))
    assert list(warnings) == ["similar classes"] * similar


def test_warning_names_validation_split_used_as_test() -> None:
    assert list(inspect(train=texts("a", "b", "c", "d"), validation=texts("e", "f"))) == ["test split"]
