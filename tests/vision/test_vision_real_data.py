from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from transfer_vision.data.datasets import Hymenoptera
from transfer_vision.models.resnet import ResNet18

FOLDER = Path(os.environ.get("TRANSFER_DATA", ""))
IMAGES = FOLDER / "hymenoptera_data.zip"
WEIGHTS = "weights/resnet18-tiny-imagenet.safetensors"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif("TRANSFER_DATA" not in os.environ, reason="TRANSFER_DATA is not set"),
]


@pytest.mark.skipif(not IMAGES.is_file(), reason="hymenoptera_data.zip is not there")
def test_hymenoptera_is_complete_and_readable() -> None:
    data = Hymenoptera().load()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 244, "test": 153}
    preprocessing = ResNet18(weights=None, image_size=64).preprocessing
    for split in data.splits.values():
        encoded = preprocessing.encode(split.fields["image"])
        assert {min(value.shape[1:]) for value in encoded} == {73}


@pytest.mark.skipif(not (FOLDER / WEIGHTS).is_file(), reason="the weights are not there")
def test_weights_of_another_classifier_width_are_read() -> None:
    backbone = ResNet18(weights=WEIGHTS, image_size=64)
    before = backbone.stages.layer4[1].conv2.weight.clone()
    report = backbone.load_pretrained()
    assert report["left_out"] == ["fc.bias", "fc.weight"]
    assert not torch.equal(backbone.stages.layer4[1].conv2.weight, before)


@pytest.mark.skipif(not (IMAGES.is_file() and (FOLDER / WEIGHTS).is_file()), reason="images or weights are not there")
def test_pretrained_features_beat_random_ones() -> None:
    data = Hymenoptera().load()
    torch.manual_seed(0)
    accuracy = {}
    for weights in (WEIGHTS, None):
        backbone = ResNet18(weights=weights, image_size=64).eval()
        backbone.load_pretrained()
        preprocessing = backbone.preprocessing
        features = {}
        with torch.no_grad():
            for name, split in data.splits.items():
                features[name] = backbone(preprocessing.model_inputs(preprocessing.encode(split.fields["image"])))
        mean, std = features["train"].mean(0), features["train"].std(0) + 1e-6
        train, test = ((features[name] - mean) / std for name in ("train", "test"))
        signs = torch.as_tensor(data.splits["train"].targets).float() * 2 - 1
        ridge = torch.linalg.solve(train.T @ train + 1000 * torch.eye(train.shape[1]), train.T @ signs)
        guesses = (test @ ridge > 0).long()
        accuracy[weights] = (guesses == torch.as_tensor(data.splits["test"].targets)).float().mean().item()
    assert accuracy[WEIGHTS] > 0.66
    assert accuracy[WEIGHTS] > accuracy[None]
