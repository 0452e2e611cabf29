"""Every contract on a convolutional network, a vision transformer and one that is no chain; weights from a file."""

from pathlib import Path

import pytest
import timm
import torch
import transfer
from safetensors.torch import save_file
from transfer.testing import contracts

from transfer_timm import Timm

ROOT = Path(__file__).parents[1]
SMALL = {"weights": None}
MODELS = [
    {"model": "test_resnet", "image_size": 32, **SMALL},
    {"model": "test_vit", "image_size": 32, "augmentation": False, **SMALL},
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
def test_stages_are_timms_groups(model, stages):
    with torch.device("meta"):
        assert list(Timm(model=model, weights=None).stage_names) == stages


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_weights_from_a_file_give_what_timm_gives(model, tmp_path):
    torch.manual_seed(1)
    network = timm.create_model(model, num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    backbone = Timm(model=model, weights=str(tmp_path / "model.safetensors"))
    assert backbone.load_pretrained()["weights"]
    inputs = backbone.preprocessing.collate(backbone.preprocessing.encode([backbone.preprocessing.example()]))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(inputs), pre_logits=True)
        torch.testing.assert_close(backbone.eval()(inputs), expected)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(transfer.ConfigError, match="timm has no model called 'resnet19'"):
        Timm(model="resnet19")
    with pytest.raises(transfer.WeightsError, match="there are no weights"):
        Timm(model="test_resnet", weights=str(tmp_path / "absent.pth")).load_pretrained()
