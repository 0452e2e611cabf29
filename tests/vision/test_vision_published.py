"""Torchvision's datasets, read from small files in their own layouts."""

from __future__ import annotations

import json
import logging
import pickle
import struct
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from transfer import ConfigError, DataError
from transfer_vision.data import torchvision_datasets as published
from transfer_vision.data.torchvision_datasets import Torchvision
from transfer_vision.preprocessing import ImagePreprocessing


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRANSFER_DATA", str(tmp_path))

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    return tmp_path


def draw(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (shade, 0, 0)).save(path)


@pytest.fixture
def food(root: Path) -> Path:
    folder = root / "food-101"
    names = {"train": 3, "test": 2}
    (folder / "meta").mkdir(parents=True)
    for split, count in names.items():
        listed = {name: [f"{name}/{split}{number}" for number in range(count)] for name in ("pie", "apple")}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for number, path in enumerate(path for paths in listed.values() for path in paths):
            draw(folder / "images" / f"{path}.jpg", number * 40)
    return folder


def test_food101(food: Path) -> None:
    data = Torchvision(dataset="food101").load()
    assert data.spec.classes == ("apple", "pie")
    assert {name: np.bincount(split.targets).tolist() for name, split in data.splits.items()} == {
        "train": [3, 3],
        "test": [2, 2],
    }
    split = data.splits["test"]
    assert split.name(0).startswith(f"{food}/images/")
    assert [data.spec.classes[target] for target in split.targets] == [name.split("/")[-2] for name in split.names]
    assert len(ImagePreprocessing(image_size=32).encode(list(split.fields["image"]))) == 4


def test_bad_files_of_a_published_dataset(food: Path) -> None:
    (food / "images" / "pie" / "train1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"food-101/images/pie/train1\.jpg  .*the file is empty"):
        Torchvision(dataset="food101").load()
    assert len(Torchvision(dataset="food101", bad_files="skip").load().splits["train"]) == 5


def test_oxford_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("trainval", 2), ("test", 1)):
        rows = []
        for label, name in enumerate(("Abyssinian", "american_bulldog"), 1):
            for number in range(count):
                draw(folder / "images" / f"{name}_{split}{number}.jpg", label * 50)
                rows.append(f"{name}_{split}{number} {label} {label} 1")
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(rows))
    data = Torchvision(dataset="oxford_pets").load()
    assert data.spec.classes == ("Abyssinian", "American Bulldog")
    assert {name: split.targets.tolist() for name, split in data.splits.items()} == {
        "train": [0, 0, 1, 1],
        "test": [0, 1],
    }


def test_mnist(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 6), ("t10k", 4)):
        images = np.arange(count * 28 * 28).reshape(count, 28, 28) % 256
        header = struct.pack(">IIII", 0x0803, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.astype(np.uint8).tobytes())
        labels = np.arange(count) % 10
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x0801, count) + labels.astype(np.uint8).tobytes()
        )
    data = Torchvision(dataset="mnist").load()
    assert len(data.spec.classes) == 10
    train = data.splits["train"]
    assert train.targets.tolist() == list(range(6))
    assert train.name(2) == "mnist/train/2"
    column = pickle.loads(pickle.dumps(train.fields["image"]))
    assert ImagePreprocessing(image_size=32).encode(column[:2])[0].shape == (3, 37, 37)
    assert train.fingerprint("image") == Torchvision(dataset="mnist").load().splits["train"].fingerprint("image")
    assert train.fingerprint("image") != data.splits["test"].fingerprint("image")


def test_a_dataset_without_published_splits(root: Path) -> None:
    for label, name in enumerate(("AnnualCrop", "Forest")):
        for number in range(10):
            draw(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", label * 90)
    data = Torchvision(dataset="eurosat", test_fraction=0.3).load()
    assert {name: np.bincount(split.targets).tolist() for name, split in data.splits.items()} == {
        "train": [7, 7],
        "test": [3, 3],
    }


def test_images_that_are_made_up_when_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = published._Entry("FakeData", {"train": {"size": 12, "image_size": (3, 20, 24), "num_classes": 3}})
    monkeypatch.setattr(
        torchvision.datasets, "FakeData", lambda root, **options: FAKE(random_offset=len(root) * 0, **options)
    )
    monkeypatch.setitem(published._ENTRIES, "mnist", entry)
    data = Torchvision(dataset="mnist").load()
    assert sum(map(len, data.splits.values())) == 12
    assert set(data.spec.classes) <= {"0", "1", "2"}
    split = data.splits["train"]
    assert split.fields["image"][0].size == (24, 20)
    assert split.fingerprint("image") == split.fingerprint("image")


FAKE = torchvision.datasets.FakeData


def test_missing_dataset_error_names_folder(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL), pytest.raises(DataError, match="no network here") as caught:
        Torchvision(dataset="cifar10").load()
    assert str(root) in str(caught.value)
    assert "torchvision.datasets.CIFAR10(FOLDER, download=True)" in str(caught.value)


def test_every_name_is_a_torchvision_class() -> None:
    import inspect

    for name in get_args(published.Name):
        entry = published._ENTRIES[name]
        known = inspect.signature(getattr(torchvision.datasets, entry.cls).__init__).parameters
        assert "download" in known
        for arguments in entry.splits.values():
            assert set(arguments) <= set(known)
        assert "train" in entry.splits


def test_a_release_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torchvision.datasets, "Imagenette")
    with pytest.raises(ConfigError, match="has no imagenette"):
        Torchvision(dataset="imagenette")
