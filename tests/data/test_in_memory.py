"""Tables in memory as the data of a run: their forms, their splits, and bad ones."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import transfer
from transfer import DataError, InMemoryTable, TransferError
from transfer.data.in_memory import ImageValues, InMemory

TEXTS = [f"{'good' if i % 2 else 'bad'} film number {i}" for i in range(24)]
LABELS = ["pos" if i % 2 else "neg" for i in range(24)]
ARRAYS = [np.full((6, 5, 3), 9 * i, dtype=np.uint8) for i in range(24)]


class Frame:
    """A data frame of pandas or polars, reduced to the parts that are read."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = list(columns)
        self._values = columns

    def __getitem__(self, name: str) -> Any:
        return self._values[name]


class Features:
    """The feature of a column of class indices of Hugging Face."""

    names = ("neg", "pos")


class HuggingFaceRows:
    """A dataset of Hugging Face, reduced to the parts that are read."""

    features = {"text": None, "label": Features()}

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self._columns = columns
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(TEXTS)

    def select_columns(self, names: list[str]) -> HuggingFaceRows:
        return HuggingFaceRows({name: self._columns[name] for name in names})

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {name: column[index] for name, column in self._columns.items()}


class Pairs(torch.utils.data.Dataset[tuple[Any, int]]):
    """Images of a plain dataset of torch, as tensors (C, H, W)."""

    def __init__(self, as_floats: bool) -> None:
        self.as_floats = as_floats

    def __len__(self) -> int:
        return len(ARRAYS)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = torch.tensor(ARRAYS[index]).permute(2, 0, 1)
        return (pixels / 255 if self.as_floats else pixels), index % 2


@pytest.mark.parametrize(
    "data",
    [
        {"text": TEXTS, "label": LABELS},
        Frame({"text": np.array(TEXTS, dtype=object), "label": np.array(LABELS, dtype=object), "unused": TEXTS}),
        [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)],
        list(zip(TEXTS, LABELS, strict=True)),
        HuggingFaceRows({"text": TEXTS, "label": [i % 2 for i in range(24)]}),
    ],
    ids=["dict of columns", "data frame", "list of rows", "list of pairs", "hugging face"],
)
def test_tables_of_every_form_are_the_same_data(data: Any) -> None:
    table, reference = transfer.table(data), transfer.table({"r": TEXTS, "s": LABELS}, text="r", label="s")
    assert table.digest == reference.digest
    assert table.data.spec == transfer.DataSpec(("text",), "class", ("neg", "pos"))
    assert list(table.data.splits["train"].column("text")) == TEXTS
    assert table.data.splits["train"].name(3) == "train[3]"


def test_images_of_every_form_become_raw_values(tmp_path: Path) -> None:
    Image.fromarray(ARRAYS[1]).save(tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    tensor = torch.tensor(ARRAYS[1]).permute(2, 0, 1)
    column = [ARRAYS[1], Image.fromarray(ARRAYS[1]), tensor, tensor / 255, tmp_path / "one.png", content]
    values = ImageValues([*column, {"bytes": content, "path": None}])
    assert all((np.asarray(value) == ARRAYS[1]).all() for value in values)
    assert values.fingerprint() == pickle.loads(pickle.dumps(values)).fingerprint()
    with pytest.raises(ValueError, match="do not normalize the images"):
        ImageValues([tensor / 255 - 1])[0]
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        ImageValues([tmp_path / "two.png"])[0]


@pytest.mark.parametrize("as_floats", [False, True])
def test_dataset_of_torch_is_read_on_access(as_floats: bool) -> None:
    train = transfer.table(Pairs(as_floats)).data.splits["train"]
    assert train.targets.tolist() == [i % 2 for i in range(24)]
    assert (train.column("image")[7] == ARRAYS[7]).all()


def test_image_paths_are_the_names_of_the_examples(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, array in zip(paths, ARRAYS, strict=False):
        Image.fromarray(array).save(path)
    table = transfer.table({"file": paths, "y": [0, 1, 0, 1]}, image="file", label="y", test_fraction=0.5)
    assert table.data.splits["train"].name(0) in map(str, paths)
    assert {name: len(split) for name, split in table.data.splits.items()} == {"train": 2, "test": 2}


def test_splits_are_given_or_cut_by_group() -> None:
    columns = {"text": TEXTS, "label": LABELS, "author": [i // 4 for i in range(24)]}
    cut = transfer.table(columns, group="author", test_fraction=0.25).data.splits
    assert cut["train"].groups is not None
    assert cut["test"].groups is not None
    assert set(cut["train"].groups.tolist()).isdisjoint(cut["test"].groups.tolist())
    given = transfer.table(columns, validation=Frame(columns), test=columns).data.splits
    assert {name: len(split) for name, split in given.items()} == {"train": 24, "validation": 24, "test": 24}
    with pytest.raises(DataError, match="the group '0' is in train and in test"):
        transfer.table(columns, test=columns, group="author")


def test_labels_and_numbers_are_targets() -> None:
    lists = transfer.table({"text": TEXTS, "label": [("a",), ["a", "b"]] * 12}, target="label_list").data
    assert lists.spec == transfer.DataSpec(("text",), "labels", ("a", "b"))
    numbers = transfer.table({"text": TEXTS, "x": np.arange(24.0)}, label=["x"], target="number").data
    assert numbers.splits["train"].targets[:, 0].tolist() == list(range(24))


def make_bad(name: str) -> InMemoryTable:
    good: dict[str, Any] = {"text": TEXTS, "label": LABELS}
    bad: dict[str, Any] = {
        "empty": ({"text": [], "label": []}, {}),
        "no pairs": ([], {}),
        "missing column": (good, {"text": "reveiw"}),
        "missing label column": ({"text": TEXTS}, {}),
        "unequal lengths": (good | {"label": LABELS[:3]}, {}),
        "labels of another type": (good | {"label": [{"a": 1}] * 24}, {}),
        "no numbers": (good, {"target": "number"}),
        "none label": (good | {"label": [None, *LABELS[1:]]}, {}),
        "none image": ({"image": [None, *ARRAYS[1:]], "label": LABELS}, {}),
        "one class": (good | {"label": ["pos"] * 24}, {}),
        "triples": ([(1, 2, 3)], {}),
        "no table": (iter(TEXTS), {}),
        "no field": ({"review": TEXTS, "label": LABELS}, {}),
        "bad validation": (good, {"validation": 0.2}),
        "two labels of pairs": (list(zip(TEXTS, LABELS, strict=True)), {"label": ["a", "b"], "target": "labels"}),
    }
    data, options = bad[name]
    return transfer.table(data, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "the table contains no rows"),
        ("no pairs", "the table contains no rows"),
        ("missing column", "unknown column 'reveiw'"),
        ("missing label column", "unknown column 'label'"),
        ("unequal lengths", "the columns of the table differ in length: {'text': 24, 'label': 3}"),
        ("labels of another type", "column 'label' is wrong: expected one value, got dict"),
        ("no numbers", "column 'label' is wrong: expected a finite number, got 'neg'"),
        ("none label", "column 'label' is empty in 1 of 24 rows: row 0"),
        ("none image", "column 'image' is empty in 1 of 24 rows: row 0"),
        ("one class", "column 'label' contains only the class 'pos'"),
        ("triples", r"an item is wrong: expected a pair \(value, label\), got 3 values"),
        ("no table", "this is no table: expected a data frame"),
        ("no field", "the column of the examples is not named"),
        ("bad validation", "this is no table: expected a data frame"),
        ("two labels of pairs", "pairs have one value and one label"),
    ],
)
def test_bad_table_is_refused(name: str, message: str) -> None:
    with pytest.raises(TransferError, match=message) as caught:
        make_bad(name)
    assert len(caught.value.problems) == 1


def test_table_is_found_by_its_digest_as_long_as_it_exists() -> None:
    table = transfer.table({"text": TEXTS, "label": LABELS})
    dataset = InMemory(digest=table.digest, fields=("text",))
    assert dataset.load() is table.data
    assert dataset.spec.classes == ("neg", "pos")
    del table
    gc.collect()
    assert dataset.spec.classes == ()
    with pytest.raises(DataError, match="the data of this run is not stored"):
        dataset.load()
