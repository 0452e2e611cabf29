"""A trained model in a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from conftest import Dense

import transfer
from transfer import RunError, UserError, register
from transfer.models.saved_model import read_model
from transfer.registry import entry_points as registry


@pytest.fixture
def folder(config: dict[str, Any], tmp_path: Path) -> Path:
    run = transfer.run(config, ["train.phases=[{epochs: 1}]"], output=tmp_path)
    return run.folder / "model"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_saved_model_round_trip(folder: Path) -> None:
    loaded = read_model(folder)
    assert loaded.data.classes == ("near", "far")
    assert loaded.task.out_features == 2
    assert not any(module.training for module in loaded.model.modules())
    first, second = loaded.model(torch.ones(2, 4)), read_model(folder).model(torch.ones(2, 4))
    assert torch.equal(first, second)


def test_moved_model_folder(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(folder)
    assert read_model(moved).data.classes == ("near", "far")


def test_model_json_describes_the_model(folder: Path) -> None:
    content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    assert content["data"] == {"fields": ["point"], "target": "class", "classes": ["near", "far"]}
    assert content["features"] == {"layout": "vector", "size": 8}
    assert content["preprocessing"] == {"size": 4}
    assert content["plugins"]["head"]["distribution"] == "transferkit"


@pytest.mark.parametrize("key", ["format", "backbone", "head", "task", "data", "assets"])
def test_missing_key_is_refused(folder: Path, key: str) -> None:
    edit(folder, lambda content: content.pop(key))
    with pytest.raises(RunError) as caught:
        read_model(folder)
    assert caught.value.problems[0].where == str(folder / "model.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("backbone", None), ("backbone", "dense"), ("backbone", []), ("data", None), ("data", []), ("assets", 5)],
)
def test_key_of_another_type_is_refused(folder: Path, key: str, value: Any) -> None:
    edit(folder, lambda content: content.update({key: value}))
    with pytest.raises(UserError) as caught:
        read_model(folder)
    assert str(folder) in str(caught.value.problems[0].where)


def test_unknown_format_is_refused(folder: Path) -> None:
    edit(folder, lambda content: content.update(format=99))
    with pytest.raises(RunError, match="format 99") as caught:
        read_model(folder)
    assert caught.value.problems[0].available == ("1",)


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    with pytest.raises(RunError, match="tensors cannot be read") as caught:
        read_model(folder)
    assert caught.value.problems[0].where == str(folder / "weights.safetensors")


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match="tensors cannot be read"):
        read_model(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    edit(folder, lambda content: content["backbone"].update(width=4))
    with pytest.raises(RunError, match="do not fit the model"):
        read_model(folder)


def test_missing_model_json_is_refused(folder: Path) -> None:
    (folder / "model.json").unlink()
    with pytest.raises(RunError, match="no model here"):
        read_model(folder)


def test_edited_option_is_checked(folder: Path) -> None:
    edit(folder, lambda content: content["backbone"].update(width="wide"))
    with pytest.raises(UserError, match=r'backbone\.width is invalid: expected an integer, got "wide"') as caught:
        read_model(folder)
    assert caught.value.problems[0].where == str(folder / "model.json")


def test_asset_path_outside_of_the_folder_is_refused(folder: Path) -> None:
    (folder.parent / "secret.txt").write_text("secret", encoding="utf-8")
    edit(folder, lambda content: content.update(assets=["../secret.txt"]))
    with pytest.raises(RunError, match="incomplete"):
        read_model(folder)


class Learning(Dense):
    """Dense, with the mean of the training split's values as what it learned."""

    def __init__(self, *, width: int = 8, mean: float = 0.0) -> None:
        super().__init__(width=width)
        self.mean = mean

    @classmethod
    def from_data(cls, values: Sequence[Any], **options: Any) -> Self:
        """Take the mean."""
        return cls(**options | {"mean": sum(map(sum, values)) / (4 * len(values))})

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Take the mean back."""
        return cls(**options | {"mean": float(assets["mean.txt"])})

    def assets(self) -> Mapping[str, str]:
        """Give the mean."""
        return {"mean.txt": repr(self.mean)}


def test_learned_assets_round_trip(config: dict[str, Any], tmp_path: Path) -> None:
    register("backbone", "learning")(Learning)
    overrides = ["backbone={name: learning}", "train.phases=[{epochs: 1}]"]
    run = transfer.run(config, overrides, output=tmp_path)
    backbone = read_model(run.folder / "model").backbone
    assert isinstance(backbone, Learning)
    assert repr(backbone.mean) == (run.folder / "model" / "mean.txt").read_text(encoding="utf-8")
    assert backbone.mean != 0.0
    assert transfer.evaluate(run.folder) == run.summary["test"]
    (run.folder / "model" / "mean.txt").unlink()
    with pytest.raises(RunError, match="incomplete"):
        read_model(run.folder / "model")


def test_missing_plugin_names_its_package(folder: Path) -> None:
    del registry._registered["backbone", "dense"]
    edit(folder, lambda content: content["plugins"]["backbone"].update(distribution="dense-package", version="1.2"))
    with pytest.raises(UserError, match="unknown backbone 'dense'") as caught:
        read_model(folder)
    assert isinstance(caught.value, RunError)
    assert "dense-package==1.2" in str(caught.value.problems[0].fix)
