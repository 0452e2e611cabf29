"""Every contract for a convolutional network, a vision transformer and a network without a chain; weights from files."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transfer
from PIL import Image
from safetensors.torch import save_file
from transfer.testing import contracts

from transfer_timm import Timm

ROOT = Path(__file__).parents[1]
SMALL = {"weights": None}
MODELS = [
    {"model": "test_resnet", "image_size": 32, **SMALL},
    {"model": "test_vit", "image_size": 32, "augmentation": "none", **SMALL},
    {"model": "eva02_tiny_patch14_224", "image_size": 28, **SMALL},
]
CONTRACTS = contracts("transfer-timm", {"timm": MODELS}, configs=[ROOT / "shapes.yaml"])


@pytest.mark.parametrize("contract", CONTRACTS, ids=str)
def test_contract(contract):
    contract.check()


@pytest.mark.parametrize(
    ("model", "stages"),
    [
        ("resnet18", ["stem", "stage1", "stage2", "stage3", "stage4", "pool"]),
        ("convnext_atto", ["stem", "stage1", "stage2", "stage3", "stage4", "pool"]),
        ("vit_tiny_patch16_224", ["stem", *(f"stage{number}" for number in range(1, 13)), "pool"]),
        ("mobilenetv3_small_050", ["stem", *(f"stage{number}" for number in range(1, 7)), "pool"]),
        ("swin_tiny_patch4_window7_224", ["stem", *(f"stage{number}" for number in range(1, 6)), "pool"]),
        ("eva02_tiny_patch14_224", ["network"]),
    ],
)
def test_stages_are_timm_layer_groups(model, stages):
    with torch.device("meta"):
        assert list(Timm(model=model, weights=None).stage_names) == stages


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_weights_from_file_match_timm(model, tmp_path):
    torch.manual_seed(1)
    network = timm.create_model(model, num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    backbone = Timm(model=model, weights=str(tmp_path / "model.safetensors"))
    assert backbone.load_pretrained()["weights"]
    inputs = backbone.preprocessing.collate(backbone.preprocessing.encode([backbone.preprocessing.example()]))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(inputs), pre_logits=True)
        torch.testing.assert_close(backbone.eval()(inputs), expected)


@pytest.mark.parametrize("model", ["test_resnet", "resnet50.a1_in1k", "vit_small_patch16_224.augreg_in21k"])
def test_preprocessing_matches_timm_evaluation(model):
    y, x = np.mgrid[:300, :420]
    pixels = 127 + 60 * np.sin(
        np.stack([x / 17, y / 23, (x + y) / 31], axis=-1)
    )  # smooth as a photograph, without noise
    image = Image.fromarray(pixels.astype(np.uint8))
    with torch.device("meta"):
        preprocessing = Timm(model=model, weights=None).preprocessing
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())
    expected = timm.data.create_transform(**config, is_training=False)(image)
    encoded = preprocessing.collate(preprocessing.encode([image]))[0]
    std = torch.tensor(config["std"]).view(3, 1, 1)
    assert ((encoded - expected) * std).abs().max() * 255 <= 3  # Pillow and torch round differently


def test_saved_model_keeps_preprocessing():
    backbone = Timm(model="test_resnet", weights=None, image_size=48)
    settings = backbone.preprocessing.describe() | {"mean": [0.1, 0.2, 0.3]}
    del settings["augmentation"]
    restored = Timm.from_assets({"preprocessing.json": json.dumps(settings)}, model="test_resnet", image_size=48)
    assert restored.preprocessing.describe()["mean"] == [0.1, 0.2, 0.3]


def test_missing_model_and_weights_are_reported(tmp_path):
    with pytest.raises(transfer.ConfigError, match="timm has no model called 'resnet19'"):
        Timm(model="resnet19")
    with pytest.raises(transfer.WeightsError, match="there are no weights"):
        Timm(model="test_resnet", weights=str(tmp_path / "absent.pth")).load_pretrained()
