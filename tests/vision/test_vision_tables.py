"""Images that a table lists: labels of every kind, and the three ways to splits."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfer import ConfigError, Data, DataError
from transfer_vision.data.tables import ImageCSV, MultimodalCSV


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(24):
        Image.new("RGB", (8, 6), (number * 10, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def table(folder: Path, header: str, rows: list[tuple[object, ...]], name: str = "table.csv") -> str:
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([tuple(header.split(",")), *rows])
    return str(folder / name)


def paths(data: Data, split: str) -> list[str]:
    names = [f"images/{number}.png" for number in range(24)]
    red = [image.getpixel((0, 0))[0] for image in data.splits[split].fields["image"]]
    return [names[value // 10] for value in red]


ROWS = [(f"images/{number}.png", "ab"[number % 2]) for number in range(24)]


def test_paths_are_relative_to_table(folder: Path) -> None:
    data = ImageCSV(train=table(folder, "path,label", ROWS)).load()
    assert data.spec.classes == ("a", "b")
    assert data.spec.fields == ("image",)
    assert paths(data, "train") == [path for path, _ in ROWS]
    assert data.splits["train"].name(3) == f"{folder}/table.csv:5"


def test_paths_are_relative_to_root_or_absolute(folder: Path) -> None:
    rows = [(f"{number}.png", "ab"[number % 2]) for number in range(3)] + [(folder / "images" / "3.png", "a")]
    written = table(folder, "file,kind", rows)
    data = ImageCSV(train=written, root=str(folder / "images"), path="file", label="kind").load()
    assert paths(data, "train") == [f"images/{number}.png" for number in range(4)]


def test_several_label_columns_and_numbers(folder: Path) -> None:
    rows = [(path, number % 2, 1, number / 2) for number, (path, _) in enumerate(ROWS)]
    written = table(folder, "path,red,round,weight", rows)
    labels = ImageCSV(train=written, label=("red", "round"), target="labels").load()
    assert (labels.spec.target, labels.spec.classes) == ("labels", ("red", "round"))
    assert labels.splits["train"].targets[:2].tolist() == [[0, 1], [1, 1]]
    numbers = ImageCSV(train=written, label="weight", target="number")
    assert numbers.spec.classes == ("weight",)
    assert numbers.load().splits["train"].targets[:3, 0].tolist() == [0, 0.5, 1]


def test_json_lines_with_lists_of_labels(folder: Path) -> None:
    path = folder / "table.jsonl"
    path.write_text('{"path": "images/0.png", "tags": ["red", "big"]}\n{"path": "images/1.png", "tags": []}\n', "utf-8")
    data = ImageCSV(train=str(path), label="tags", target="label_list").load()
    assert data.spec.classes == ("big", "red")
    assert data.splits["train"].targets.tolist() == [[1, 1], [0, 0]]


def test_split_column(folder: Path) -> None:
    rows = [(path, label, ("train", "val", "Test")[number // 8]) for number, (path, label) in enumerate(ROWS)]
    data = ImageCSV(train=table(folder, "path,label,part", rows), split="part").load()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 8, "validation": 8, "test": 8}
    assert paths(data, "test") == [path for path, _ in ROWS[16:]]


def test_test_fraction_is_stratified(folder: Path) -> None:
    data = ImageCSV(train=table(folder, "path,label", ROWS), test_fraction=0.25).load()
    assert {name: np.bincount(split.targets).tolist() for name, split in data.splits.items()} == {
        "train": [9, 9],
        "test": [3, 3],
    }


def test_no_group_is_torn_apart(folder: Path) -> None:
    rows = [(path, label, f"patient {number // 4}") for number, (path, label) in enumerate(ROWS)]
    data = ImageCSV(train=table(folder, "path,label,patient", rows), group="patient", test_fraction=0.33).load()
    groups = {name: set(split.groups.tolist()) for name, split in data.splits.items()}  # type: ignore[union-attr]
    assert len(groups["test"]) == 2
    assert not groups["train"] & groups["test"]
    assert np.bincount(data.splits["test"].targets).tolist() == [4, 4]


def test_a_group_in_two_given_splits_is_refused(folder: Path) -> None:
    rows = [(path, label, "p1" if number in (3, 20) else str(number)) for number, (path, label) in enumerate(ROWS)]
    train, test = table(folder, "path,label,who", rows[:12]), table(folder, "path,label,who", rows[12:], "test.csv")
    with pytest.raises(DataError, match="the group 'p1' is in train and in test") as caught:
        ImageCSV(train=train, test=test, group="who").load()
    assert caught.value.problems[0].where == f"{folder}/test.csv:10"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "part", "test": "test.csv"}, "takes all splits from one table"),
        ({"test_fraction": 0.2, "test": "test.csv"}, "but there is a test split"),
        ({"path": "label"}, "path 'label' and label 'label' do not name different columns"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageCSV(train="table.csv", **options)  # type: ignore[arg-type]


def test_what_is_wrong_with_a_table_is_named(folder: Path) -> None:
    rows = [*ROWS, ("images/absent.png", "a")]
    with pytest.raises(DataError, match=r"images/absent\.png  there is no such file"):
        ImageCSV(train=table(folder, "path,label", rows)).load()
    data = ImageCSV(train=table(folder, "path,label", rows), bad_files="skip").load()
    assert len(data.splits["train"]) == 24
    with pytest.raises(DataError, match="unknown column 'path'") as caught:
        ImageCSV(train=table(folder, "paths,label", ROWS)).load()
    assert "did you mean 'paths'" in str(caught.value)
    rows = [(path, label, "never") for path, label in ROWS]
    with pytest.raises(DataError, match="unknown split 'never' of column 'part'"):
        ImageCSV(train=table(folder, "path,label,part", rows), split="part").load()


def test_a_split_without_a_good_image_is_refused(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"")
    test = table(folder, "path,label", [("bad.png", "a")], "test.csv")
    with pytest.raises(DataError, match="the test split has no good image"):
        ImageCSV(train=table(folder, "path,label", ROWS), test=test, bad_files="skip").load()


def test_multimodal_table_has_text_and_image(folder: Path) -> None:
    rows = [(path, f"number {number}", label, number // 2) for number, (path, label) in enumerate(ROWS)]
    rows[5] = ("images/absent.png", "nothing", "b", 2)
    written = table(folder, "image,caption,label,camera", rows)
    dataset = MultimodalCSV(train=written, text="caption", group="camera", test_fraction=0.25, bad_files="skip")
    assert dataset.spec.fields == ("image", "text")
    data = dataset.load()
    assert (data.spec.fields, data.spec.classes) == (("image", "text"), ("a", "b"))
    for name, split in data.splits.items():
        numbers = [int(text.removeprefix("number ")) for text in split.fields["text"]]
        assert paths(data, name) == [f"images/{number}.png" for number in numbers]
        assert split.targets.tolist() == [number % 2 for number in numbers]
    assert sum(map(len, data.splits.values())) == 23


def test_a_row_without_a_text_is_refused(folder: Path) -> None:
    rows = [(path, "" if number == 2 else "a text", label) for number, (path, label) in enumerate(ROWS)]
    with pytest.raises(DataError, match="column 'text' is empty") as caught:
        MultimodalCSV(train=table(folder, "image,text,label", rows)).load()
    assert caught.value.problems[0].where == f"{folder}/table.csv:4"
    with pytest.raises(ConfigError, match="image 'image', text 'image' and label 'label' do not name different"):
        MultimodalCSV(train="table.csv", text="image")


# ------------------------------------------------------------------------------------------- notations of paths


@pytest.mark.parametrize(
    "write",
    [
        lambda number: str(number),
        lambda number: f"images/{number}",
        lambda number: f"images\\{number}.png",
        lambda number: f"./images//{number}.png",
        lambda number: f"Images/{number}.PNG",
        lambda number: f" images/{number}.png ",
    ],
    ids=["id", "id in a folder", "backslashes", "dots", "other case", "blanks"],
)
@pytest.mark.parametrize("archive", [False, True], ids=["folder", "archive"])
def test_paths_are_found_in_every_notation(folder: Path, write: Callable[[int], str], archive: bool) -> None:
    rows = [(write(number), "ab"[number % 2]) for number in range(24)]
    root = folder / "images" if write(0) == "0" else folder
    if archive:
        with zipfile.ZipFile(folder / "all.zip", "w") as file:
            for number in range(24):
                file.write(folder / "images" / f"{number}.png", f"{'' if write(0) == '0' else 'images/'}{number}.png")
            file.writestr("readme", "read me")  # otherwise the only folder would be the root
        root = folder / "all.zip"
    data = ImageCSV(train=table(folder, "path,label", rows), root=str(root)).load()
    assert paths(data, "train") == [f"images/{number}.png" for number in range(24)]


def test_json_numbers_are_ids(folder: Path) -> None:
    rows = [json.dumps({"path": number, "label": "ab"[number % 2]}) for number in range(4)]
    (folder / "table.jsonl").write_text("\n".join(rows))
    data = ImageCSV(train=str(folder / "table.jsonl"), root=str(folder / "images")).load()
    assert paths(data, "train") == [f"images/{number}.png" for number in range(4)]


def test_existing_path_wins_over_a_similar_one(folder: Path) -> None:
    for name, red in (("a", 0), ("A", 10), ("a.png", 20)):
        Image.new("RGB", (8, 6), (red, 0, 0)).save(folder / name, format="png")
    data = ImageCSV(train=table(folder, "path,label", [("a", "x"), ("A", "y"), ("a.png", "x")])).load()
    assert paths(data, "train") == [f"images/{number}.png" for number in range(3)]


def test_id_of_two_files_is_refused(folder: Path) -> None:
    Image.new("RGB", (8, 6)).save(folder / "images" / "3.jpg")
    with pytest.raises(DataError, match="'images/3' is ambiguous: 2 files fit") as caught:
        ImageCSV(train=table(folder, "path,label", [*ROWS, ("images/3", "a")])).load()
    problem = caught.value.problems[0]
    assert (problem.where, problem.available) == (f"{folder}/table.csv:26", ("images/3.jpg", "images/3.png"))


@pytest.mark.parametrize("url", ["https://example.org/1.png", "s3://bucket/1.png", "file:///1.png"])
def test_urls_are_refused(folder: Path, url: str) -> None:
    with pytest.raises(DataError, match="1 of the images are URLs") as caught:
        ImageCSV(train=table(folder, "path,label", [*ROWS, (url, "a")]), bad_files="skip").load()
    problem = caught.value.problems[0]
    assert problem.where == f"{folder}/table.csv:26"
    assert "download the images" in str(problem.fix)
