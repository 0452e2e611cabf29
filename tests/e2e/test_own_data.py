"""The README's two ways to bring data: a folder of images, a table of texts; and what is wrong with some."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import transfer

SMALL = {"batch_size": 8, "phases": [{"epochs": 2}], "optimizer": {"name": "adam", "lr": 0.003}}


def draw(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shade).integers(0, 60, size=(40, 50, 3))
    Image.fromarray((noise + shade % 200).astype(np.uint8)).save(path)


@pytest.fixture
def images(tmp_path):
    for split, count in (("train", 12), ("val", 4)):
        for offset, name in ((0, "dark"), (150, "light")):
            for number in range(count):
                draw(tmp_path / "images" / split / name / f"{number}.png", offset + number)
    return tmp_path / "images"


@pytest.fixture
def reviews(tmp_path):
    def write(name: str, count: int) -> str:
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["review", "sentiment"])
            for number in range(count):
                good = number % 2 == 0
                table.writerow([f"a {'good' if good else 'bad'} film, number {number}", "pos" if good else "neg"])
        return str(tmp_path / name)

    return {"train": write("reviews.csv", 60), "test": write("held_out.csv", 20)}


def config_of_images(root: Path) -> dict[str, object]:
    backbone = {"name": "resnet18", "weights": None, "image_size": 32}
    return {"data": {"name": "image_folder", "root": str(root)}, "backbone": backbone, "train": SMALL}


def config_of_texts(reviews: dict[str, str]) -> dict[str, object]:
    data = {"name": "text_csv", "text": "review", "label": "sentiment", "validation": 0.2, **reviews}
    backbone = {"name": "textcnn", "filters": 8, "dimensions": 16}
    return {"data": data, "backbone": backbone, "train": SMALL | {"phases": [{"epochs": 6}]}}


def test_a_folder_of_images(images, tmp_path):
    run = transfer.run(config_of_images(images), output=tmp_path / "runs")
    # The val folder is scored once at the end, and what picks the best epoch is cut from train.
    assert run.summary["data"] == {
        "train": {"dark": 11, "light": 11},
        "validation": {"dark": 1, "light": 1},
        "test": {"dark": 4, "light": 4},
    }
    (answer,) = transfer.predict(run.folder, [str(images / "val" / "dark" / "0.png")])
    assert answer["label"] in ("dark", "light")
    assert len(list(transfer.predict(run.folder, [images / "val"]))) == 8


def test_a_table_of_texts(reviews, tmp_path):
    run = transfer.run(config_of_texts(reviews), output=tmp_path / "runs")
    assert run.summary["data"]["test"] == {"neg": 10, "pos": 10}
    assert run.summary["test"]["accuracy"] == 1.0  # one word decides
    answers = list(transfer.predict(run.folder, ["a good film", "a bad film"]))
    assert [answer["label"] for answer in answers] == ["pos", "neg"]


def test_unreadable_image_is_named(images, tmp_path):
    broken = images / "train" / "dark" / "3.png"
    broken.write_text("not a picture")
    with pytest.raises(transfer.DataError) as caught:
        transfer.run(config_of_images(images), output=tmp_path / "runs")
    assert "train/dark/3.png  not an image" in str(caught.value)
    assert caught.value.problems[0].where == str(images)


def test_one_class_only(tmp_path):
    for number in range(6):
        draw(tmp_path / "images" / "train" / "dark" / f"{number}.png", number)
    with pytest.raises(transfer.DataError, match="dark"):
        transfer.run(config_of_images(tmp_path / "images"), output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_an_empty_folder(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(transfer.DataError) as caught:
        transfer.run(config_of_images(tmp_path / "images"), output=tmp_path / "runs")
    assert caught.value.problems[0].fix


def test_a_column_that_is_not_there(reviews, tmp_path):
    config = config_of_texts(reviews)
    with pytest.raises(transfer.UserError) as caught:
        transfer.run(config, ["data.text=reviews"], output=tmp_path / "runs")
    assert "review" in str(caught.value)


def test_vectors_of_another_width_than_asked_for(reviews, tmp_path):
    vectors = tmp_path / "three.txt"
    vectors.write_text("good 1 2 3\nbad 3 2 1\nfilm 1 2\n")
    with pytest.raises(transfer.UserError, match="has width 3"):
        transfer.run(config_of_texts(reviews), [f"backbone.vectors={vectors}"], output=tmp_path / "runs")
    overrides = [f"backbone.vectors={vectors}", "backbone.dimensions=null"]
    with pytest.raises(transfer.WeightsError) as caught:
        transfer.run(config_of_texts(reviews), overrides, output=tmp_path / "runs")
    assert f"{vectors}:3" in str(caught.value)
