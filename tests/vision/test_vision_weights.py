"""What a backbone takes of weights: from torchvision's files, old and new, and from an earlier run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

import transfer
from transfer import WeightsError
from transfer_vision.models.architectures import adapt_input_weight
from transfer_vision.models.backbones import Torchvision
from transfer_vision.models.resnet import ResNet18

SMALL = {"image_size": 32, "weights": None}


def by_torchvisions_names(backbone: Torchvision) -> dict[str, Tensor]:
    names = backbone.foreign_models(2)["torchvision"].names
    return {names[name]: value for name, value in backbone.state_dict().items()}


def saved(tensors: dict[str, Tensor], path: Path) -> str:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


def test_prefix_of_names_is_named_with_the_fix(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18().state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in theirs.items()}
    backbone = ResNet18(weights=saved(wrapped, tmp_path / "wrapped.safetensors"), image_size=32)
    with pytest.raises(WeightsError, match=r"missing: conv1\.weight.* and \d+ more; unknown: module\.bn1") as caught:
        backbone.load_pretrained()
    assert caught.value.problems[0].fix == "remove the prefix 'module.' from their names"


def test_saved_model_file_suggests_its_run(tmp_path: Path) -> None:
    trained = ResNet18(**SMALL)
    tensors = {name.removeprefix("stages."): tensor for name, tensor in trained.state_dict().items()}
    tensors["head.output.weight"] = torch.zeros(2, 512)
    with pytest.raises(WeightsError, match=r"unknown: .*stem\.") as caught:
        ResNet18(weights=saved(tensors, tmp_path / "weights.safetensors"), image_size=32).load_pretrained()
    assert "name its run instead" in str(caught.value.problems[0].fix)


def test_names_of_old_densenet_files_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.densenet121().state_dict()
    old = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in name else name: value
        for name, value in theirs.items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    backbone = Torchvision(model="densenet121", weights=saved(old, tmp_path / "old.safetensors"), image_size=32)
    report = backbone.load_pretrained()
    assert report["left_out"] == ["classifier.bias", "classifier.weight"]
    assert all(torch.equal(value, theirs[name]) for name, value in by_torchvisions_names(backbone).items())


def test_vision_transformer_reads_old_names_and_positions(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.vit_b_32(image_size=96, num_classes=3).state_dict()
    theirs = {name: torch.full(value.shape, float(number)) for number, (name, value) in enumerate(shapes.items())}
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for n, v in theirs.items()}
    file = saved(old, tmp_path / "old.safetensors")
    backbone = Torchvision(model="vit_b_32", weights=file, image_size=64)
    report = backbone.load_pretrained()
    assert report["adapted"] == {"encoder.pos_embedding": "from 3 x 3 to 2 x 2 patches"}
    assert report["left_out"] == ["heads.head.bias", "heads.head.weight"]
    got = by_torchvisions_names(backbone)
    assert torch.equal(got.pop("encoder.pos_embedding")[:, 0], theirs["encoder.pos_embedding"][:, 0])
    assert all(torch.equal(value, theirs[name]) for name, value in got.items())


def test_auxiliary_classifiers_are_left_out_and_said_so(tmp_path: Path) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.googlenet(init_weights=False, aux_logits=True)
    theirs.to_empty(device="cpu")
    tensors = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    file = saved(tensors, tmp_path / "googlenet.safetensors")
    report = Torchvision(model="googlenet", weights=file, image_size=32).load_pretrained()
    assert {name.split(".")[0] for name in report["left_out"]} == {"aux1", "aux2", "fc"}
    assert report["tensors"] + len(report["left_out"]) == len(tensors)


@pytest.mark.parametrize("channels", [1, 4])
def test_the_first_convolution_is_adapted_to_other_channels(tmp_path: Path, channels: int) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.shufflenet_v2_x0_5().state_dict()
    file = saved(theirs, tmp_path / "own.safetensors")
    backbone = Torchvision(model="shufflenet_v2_x0_5", weights=file, image_size=32, in_channels=channels)
    report = backbone.load_pretrained()
    assert report["adapted"] == {"conv1.0.weight": f"from 3 to {channels} channels"}
    expected = adapt_input_weight(theirs["conv1.0.weight"], channels)
    assert torch.equal(backbone.stages.stem.conv1[0].weight, expected)


# ------------------------------------------------------------------------------------------------------ an earlier run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: dict[str, Any] = {
        "data": {"name": "shapes", "image_size": 32, "per_class": 6},
        "backbone": {"name": "torchvision", "model": "shufflenet_v2_x0_5", **SMALL, "mean": [0.1, 0.2, 0.3]},
        "train": {"batch_size": 4, "phases": [{"epochs": 1}]},
    }
    return transfer.run(config, output=tmp_path_factory.mktemp("runs")).folder


def test_weights_and_preprocessing_of_earlier_run(run: Path) -> None:
    backbone = Torchvision(model="shufflenet_v2_x0_5", weights=str(run))
    report = backbone.load_pretrained()
    trained, head = transfer.saved_backbone(run).tensors()
    assert report["left_out"] == head == ["head.output.bias", "head.output.weight"]
    assert report["source"] == str(run / "model/weights.safetensors")
    assert {f"stages.{name}" for name in trained} == backbone.state_dict().keys()
    assert all(torch.equal(value, trained[name[7:]]) for name, value in backbone.state_dict().items())
    described = backbone.preprocessing.describe()
    assert (described["image_size"], described["mean"]) == (32, [0.1, 0.2, 0.3])


def test_model_predicts_without_its_source_run(run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(run, base)
    config = {
        "data": {"name": "shapes", "image_size": 32, "per_class": 6},
        "backbone": {"name": "torchvision", "model": "shufflenet_v2_x0_5", "weights": str(base)},
        "train": {"batch_size": 4, "phases": [{"epochs": 1, "freeze": "backbone"}]},
    }
    second = transfer.run(config, output=tmp_path / "runs")
    assert second.summary["pretrained"]["weights"] == str(base)
    shutil.rmtree(base)
    image = tmp_path / "image.png"
    Torchvision(model="shufflenet_v2_x0_5", **SMALL).preprocessing.example().save(image)
    (answer,) = transfer.predict(second.folder, [str(image)])
    assert answer["label"] in ("circle", "square", "triangle")
    kept = json.loads((second.folder / "model/preprocessing.json").read_text())
    assert (kept["image_size"], kept["mean"]) == (32, [0.1, 0.2, 0.3])


def test_a_run_of_another_backbone_is_refused(run: Path) -> None:
    with pytest.raises(WeightsError, match="expected 'resnet18', got 'shufflenet_v2_x0_5'"):
        ResNet18(weights=str(run)).load_pretrained()


def test_run_of_other_backbone_is_refused(run: Path) -> None:
    with torch.device("meta"), pytest.raises(WeightsError, match="wrong backbone in this run"):
        ResNet18(weights=str(run))


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_of_other_channels_say_how_many(tmp_path: Path, channels: int) -> None:
    theirs = torchvision.models.shufflenet_v2_x0_5().state_dict()
    theirs["conv1.0.weight"] = torch.zeros(24, channels, 3, 3)
    file = saved(theirs, tmp_path / "other.safetensors")
    own = Torchvision(model="shufflenet_v2_x0_5", weights=file, image_size=32)
    with pytest.raises(WeightsError, match="of another shape") as caught:
        own.load_pretrained()
    assert caught.value.problems[0].fix == f"set in_channels: {channels}, the number of channels in the file"


@pytest.mark.parametrize("what", ["runs/absent", "folder"])
def test_folder_that_is_no_run_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with torch.device("meta"), pytest.raises(WeightsError, match=f"there is no run with a model at {what}"):
        ResNet18(weights=what)


def test_a_run_with_damaged_tensors_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    (tmp_path / "model/weights.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(WeightsError, match="cannot be read"):
        Torchvision(model="shufflenet_v2_x0_5", weights=str(tmp_path)).load_pretrained()
