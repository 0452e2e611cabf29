"""The same examples in two splits, and labels that contradict each other, on the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from transfer import DataError, check
from transfer.cli.app import app
from transfer.data.inspection import inspect_data
from transfer.data.splits import complete
from transfer.runs.check import check_data
from transfer_vision.data.datasets import ImageFolder
from transfer_vision.images.image_sources import ImageSource

TEXT: dict[str, Any] = {
    "backbone": {"name": "textcnn"},
    "head": {"name": "linear"},
    "task": {"name": "classification"},
    "train": {"phases": [{"epochs": 1, "freeze": "none"}]},
}


def table(folder: Path, name: str, rows: str) -> str:
    (folder / name).write_text("text,label\n" + "".join(f"{row}\n" for row in rows.split("|")))
    return str(folder / name)


def images(root: Path, **colors: tuple[int, ...]) -> Path:
    """Write images of given shades of gray to class folders, named by the keys ``split_class``."""
    for key, shades in colors.items():
        folder = root / key.replace("_", "/")
        folder.mkdir(parents=True)
        for shade in shades:
            Image.new("L", (8, 8), shade).save(folder / f"{key}{shade}.png")
    return root


def image_warnings(root: Path) -> dict[str, str]:
    data = ImageFolder(root=str(root)).load()
    return inspect_data(data, complete(data, validation=0.3, limit=None), ("image",))


def test_validation_and_test_from_one_table(tmp_path: Path) -> None:
    train = table(tmp_path, "train.csv", "a,x|b,y|c,x|d,y")
    test = table(tmp_path, "test.csv", "e,x|f,y")
    copy = table(tmp_path, "copy.csv", "f,y|e,x")
    for held_out in (test, copy):
        with pytest.raises(DataError, match="the validation and test splits contain the same 2 examples"):
            check_data(
                *check({**TEXT, "data": {"name": "text_csv", "train": train, "val": test, "test": held_out}}),
            )


def test_check_with_data_prints_one_table_of_warnings(tmp_path: Path) -> None:
    train = table(tmp_path, "train.csv", "a,True|b,true|c,True|d,true|a,true")
    test = table(tmp_path, "test.csv", "b,True|f,true")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{name: text_csv, train: {train}, test: {test}}}\nbackbone: {{name: textcnn}}\nhead: {{name: linear}}\n"
        "task: {name: classification}\ntrain: {phases: [{epochs: 1, freeze: none}]}\n"
    )
    runner = CliRunner(env={"COLUMNS": "200"})
    assert "possible problems" not in runner.invoke(app, ["check", str(config)]).stdout
    printed = runner.invoke(app, ["check", str(config), "--data"]).stdout
    for subject in ("similar classes", "test in train", "contradictory labels"):
        assert subject in printed
    assert "True 1, true 1" in printed


def test_relabeled_image_in_two_splits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    root = images(tmp_path / "images", train_a=(1, 2, 3), train_b=(4, 5, 6), test_a=(7,), test_b=(8,))
    shutil.copy(root / "train/a/train_a1.png", root / "test/b/other name.png")
    for _ in range(2):
        warnings = image_warnings(root)
        assert warnings["test in train"] == (
            f"1 of 3 examples of test are also in train ({root}/test/b/other name.png = {root}/train/a/train_a1.png)"
        )
        assert "contradictory labels" in warnings
        # The digests are recorded with the results of the first decoding.
        monkeypatch.setattr(ImageSource, "digest", lambda source, path: source.digests[path])


def test_copied_folder_is_refused_as_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    root = images(tmp_path / "images", train_a=(1, 2), train_b=(3, 4))
    shutil.copytree(root / "train", root / "test")
    with pytest.raises(DataError, match="the train and test splits contain the same 4 examples"):
        image_warnings(root)
