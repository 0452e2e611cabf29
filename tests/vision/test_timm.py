"""Contracts and stages of the models of timm; weights from a file."""

import copy
import json
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import transfer
from transfer.cli.plugin_commands import show
from transfer.config.train_settings import Until
from transfer.models.model import Model
from transfer.testing import contracts
from transfer.training.freezing import resolve
from transfer.training.optimizer import parameter_groups
from transfer_vision.preprocessing import ImagePreprocessing

timm = pytest.importorskip("timm", reason="timm is not installed")
from transfer_vision.models.timm_model import Timm, preprocessing_of  # noqa: E402 - it imports timm

SMALL = {"weights": None}
MODELS = [
    {"model": "test_resnet", "image_size": 32, **SMALL},
    {"model": "test_vit", "image_size": 32, "augmentation": "none", **SMALL},
    {"model": "eva02_tiny_patch14_224", "image_size": 28, **SMALL},
]
WEIGHTS = Path(tempfile.mkdtemp()) / "test_resnet.safetensors"
BACKBONES = {"timm": [*MODELS, {"model": "test_resnet", "image_size": 32, "weights": str(WEIGHTS)}]}
# The contracts of the other plugins of this distribution have their own tests.
CONTRACTS = [contract for contract in contracts("transferkit", BACKBONES) if "timm" in str(contract)]


@pytest.fixture(scope="module", autouse=True)
def _weights():
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), WEIGHTS)
    yield
    shutil.rmtree(WEIGHTS.parent)


@pytest.mark.parametrize("contract", CONTRACTS, ids=str)
def test_contract(contract):
    contract.check()


BLOCKS = [f"stage{number}" for number in range(1, 13)]


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        ("resnet18", [f"stage{group}.{index}" for group in (1, 2, 3, 4) for index in (0, 1)]),
        ("convnext_atto", [f"stage{g}.{i}" for g, size in enumerate((2, 2, 6, 2), 1) for i in range(size)]),
        ("swin_tiny_patch4_window7_224", [f"stage{g}.{i}" for g, n in enumerate((2, 2, 6, 2), 1) for i in range(n)]),
        ("vit_tiny_patch16_224", BLOCKS),
        ("vit_small_patch14_reg4_dinov2", BLOCKS),
        ("vit_small_patch16_dinov3", BLOCKS),
        ("eva02_tiny_patch14_224", BLOCKS),
        ("beitv2_base_patch16_224", BLOCKS),
        ("vit_base_patch16_siglip_224", BLOCKS),
    ],
)
def test_blocks_are_stages(model, blocks):
    with torch.device("meta"):
        assert list(Timm(model=model, weights=None).stage_names) == ["stem", *blocks, "pool"]


@pytest.mark.parametrize("model", ["hiera_tiny_224", "caformer_s18"])
def test_model_without_chain_has_one_stage(model):
    with torch.device("meta"):
        assert Timm(model=model, weights=None).stage_names == ("network",)


def test_model_that_cannot_be_built_on_the_meta_device_is_built_on_the_cpu(monkeypatch):
    """As NaFlexViT, whose constructor computes with values of tensors."""
    create = timm.create_model

    def on_the_cpu(*arguments, **options):
        torch.zeros(1).item()
        return create(*arguments, **options)

    monkeypatch.setattr(timm, "create_model", on_the_cpu)
    with torch.device("meta"):
        backbone = Timm(model="test_vit", weights=None)
    assert all(parameter.is_meta for parameter in backbone.parameters())
    assert len(backbone.stage_names) > 2


def test_layers_of_the_only_stage_are_frozen_by_name():
    with torch.device("meta"):
        backbone = Timm(model="hiera_tiny_224", weights=None)
        model = Model(backbone, nn.Linear(768, 2))
    frozen = resolve(model, Until(until="network.blocks.9"))
    groups = parameter_groups(model, frozen, {"head": 0.1, "layer_decay": 0.5})
    rates = {"network.blocks.10": 0.0125, "network.blocks.11": 0.025, "network.head": 0.05, "head": 0.1}
    assert {group.stage: group.lr for group in groups} == rates
    assert len(model.layers) == 15


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("test_resnet", 32),
        ("test_efficientnet", 32),
        ("test_convnext", 32),
        ("test_vit", 48),
        ("test_vit4", 64),
        ("vit_small_patch16_dinov3", 32),
        ("eva02_tiny_patch14_224", 28),
        ("vit_small_patch16_rope_mixed_224", 32),
    ],
)
def test_stages_return_the_features_of_timm(model, size):
    torch.manual_seed(0)
    backbone = Timm(model=model, weights=None, image_size=size).eval()
    fixed = timm.get_pretrained_cfg(model).fixed_input_size
    network = timm.create_model(model, num_classes=0, **({"img_size": size} if fixed else {})).eval()
    named = {name: tensor for stage in backbone.stages for name, tensor in stage.state_dict().items()}
    network.load_state_dict(named, strict=True)
    images = torch.randn(2, 3, size, size)
    # A copy, such as the average of the weights, must not refer to modules of the original.
    copied = copy.deepcopy(backbone)
    for parameter in backbone.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
        torch.testing.assert_close(copied(images), expected)


def test_frozen_stem_freezes_rotary_tables():
    backbone = Timm(model="vit_small_patch16_rope_mixed_224", weights=None, image_size=32)
    names = [name for name, _ in backbone.named_parameters() if "rope" in name]
    assert names == ["stages.stem.rope.freqs"]
    backbone.stages.stem.requires_grad_(False)
    backbone(torch.randn(1, 3, 32, 32)).sum().backward()
    assert backbone.get_parameter(names[0]).grad is None


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_pooling_is_that_of_timm(pooling):
    torch.manual_seed(0)
    with torch.no_grad():
        backbone = Timm(model="test_vit", weights=None, image_size=32, pooling=pooling).eval()
        images = torch.randn(2, 3, 32, 32)
        tokens = backbone.stages[:-1](images)
        expected = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "max": tokens[:, 1:].amax(1)}[pooling]
        assert torch.equal(backbone(images), backbone.stages.pool.fc_norm(expected))


def test_unsupported_pooling_is_refused():
    with pytest.raises(transfer.ConfigError, match="test_resnet does not support pooling: cls"):
        Timm(model="test_resnet", weights=None, image_size=32, pooling="cls")


def test_parameters_have_the_names_of_timm():
    backbone = Timm(model="test_resnet", weights=None, image_size=32)
    stages = {f"{stage}.{name}" for stage, module in backbone.stages.named_children() for name in module.state_dict()}
    assert {name.partition(".")[2] for name in stages} == backbone_names("test_resnet")
    assert {"stem.bn1.weight", "stage1.layer1.0.conv1.weight"} <= stages
    assert sorted(name for name in stages if re.search(r"^stem.*bn", name) and name.endswith(("weight", "bias"))) == [
        "stem.bn1.bias",
        "stem.bn1.weight",
    ]


def old_names(backbone):
    """Return the state dict of a backbone under the names of version 0.1.0 of this package."""
    old = {}
    for stage, module in backbone.stages.named_children():
        paths = getattr(module, "paths", None)
        for name, tensor in module.state_dict().items():
            if paths is None:
                old[f"stages.{stage}.network.{name}"] = tensor
            else:
                number = next(n for n, path in enumerate(paths) if name.startswith(f"{path}."))
                old[f"stages.{stage}.{number}.{name.removeprefix(f'{paths[number]}.')}"] = tensor
    return old


@pytest.mark.parametrize(("model", "size"), [("test_resnet", 32), ("test_vit", 32), ("eva02_tiny_patch14_224", 28)])
def test_weights_with_old_names_are_loaded(model, size):
    one, other = (Timm(model=model, weights=None, image_size=size) for _ in range(2))
    names = old_names(one)
    assert names.keys() != one.state_dict().keys()
    other.load_state_dict(names)
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def shapes(**backbone):
    return {
        "data": {"name": "shapes", "per_class": 8, "image_size": 32},
        "backbone": {"name": "timm", "model": "test_resnet", **backbone},
        "train": {"phases": [{"epochs": 1}], "report": False},
    }


def test_backbone_starts_from_an_earlier_run(tmp_path):
    first = transfer.run(shapes(weights=None, image_size=48), output=tmp_path)
    config = shapes(weights=str(first.folder))
    second = transfer.run(config, ["train.phases=[{epochs: 1, freeze: backbone}]"], output=tmp_path)
    assert second.summary["pretrained"]["left_out"] == ["head.output.bias", "head.output.weight"]
    before, after = (transfer.saved_backbone(run.folder) for run in (first, second))
    assert after.preprocessing["image_size"] == 48
    assert all(torch.equal(tensor, after.tensors()[0][name]) for name, tensor in before.tensors()[0].items())
    with pytest.raises(transfer.WeightsError, match="do not fit: missing"):
        transfer.run(shapes(model="test_vit", image_size=48, weights=str(first.folder)), output=tmp_path)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("resnet18.a1_in1kk", None, "timm has no weights 'a1_in1kk' for resnet18"),
        ("resnet19.a1_in1k", None, "timm has no model called 'resnet19'"),
        ("vit_tiny_patch16_224", 100, "expected a multiple of 16, got 100\n  fix: set image_size: 112 or 96"),
        ("test_vit", 30, "expected a multiple of 16, got 30"),
        ("mixer_b16_224", 100, "expected a multiple of 16, got 100"),
        ("xcit_nano_12_p16_224", 100, "does not support images of 100 x 100 pixels: `patch_size` should divide"),
        ("coatnet_0_rw_224", 100, "does not support images of 100 x 100 pixels"),
    ],
)
def test_unknown_tag_and_unsupported_size_are_refused(model, size, message):
    with torch.device("meta"), pytest.raises(transfer.ConfigError) as caught:
        Timm(model=model, weights=None, image_size=size)
    assert message in str(caught.value)
    if "weights" in message:
        assert "resnet18.a1_in1k" in caught.value.problems[0].available


def backbone_names(model):
    return set(timm.create_model(model, num_classes=0).state_dict())


@pytest.mark.parametrize("change", ["prefix", "missing", "left over", "saved model"])
def test_weights_that_do_not_fit_exactly_are_refused(change, tmp_path):
    tensors = timm.create_model("test_resnet", num_classes=7).state_dict()
    first = next(iter(tensors))
    if change == "prefix":
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        message = rf"0 of \d+ tensors of test_resnet were loaded; missing: {first}.*; left over: model\."
    elif change == "missing":
        del tensors[first]
        message = rf"missing: {first}$"
    elif change == "left over":
        tensors["extra.weight"] = torch.zeros(1)
        message = r"were loaded; left over: extra\.weight$"
    else:
        backbone = Timm(model="test_resnet", weights=None, image_size=32)
        tensors = {name.removeprefix("stages."): tensor for name, tensor in backbone.state_dict().items()}
        message = "0 of"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, tmp_path / "w.safetensors")
    with pytest.raises(transfer.WeightsError) as caught:
        Timm(model="test_resnet", weights=str(tmp_path / "w.safetensors"), image_size=32).load_pretrained()
    assert re.search(message, caught.value.problems[0].message), caught.value


def test_position_embeddings_are_interpolated_as_in_timm(tmp_path):
    """DINOv2 has tokens before the patches, and images of 1.5 times the size have more than twice as many patches."""
    from timm.layers import resample_abs_pos_embed

    options = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    name = "vit_small_patch14_reg4_dinov2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", partial(timm.create_model, **options))
        small = Timm(model=name, weights=None, image_size=56)
        weights = {key: value for stage in small.stages for key, value in stage.state_dict().items()}
        save_file(weights, tmp_path / "small.safetensors")
        large = Timm(model=name, weights=str(tmp_path / "small.safetensors"), image_size=84)
        large.load_pretrained()
    expected = resample_abs_pos_embed(weights["pos_embed"], [6, 6], num_prefix_tokens=0)
    torch.testing.assert_close(large.stages[0].pos_embed.data, expected)
    assert large(torch.randn(1, 3, 84, 84)).shape == (1, 24)


def test_models_of_a_pattern_are_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    weights = tmp_path / "models--timm--convnext_atto.d2_in1k" / "snapshots" / "1" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (tmp_path / "models--timm--convnext_atto.d2_in1k" / "refs").mkdir()
    (tmp_path / "models--timm--convnext_atto.d2_in1k" / "refs" / "main").write_text("1")
    assert Timm.describe_model("convnext_atto")["weights"] == "in the cache"
    assert Timm.describe_model("convnext_femto")["weights"] == "to download"
    show("backbone", "timm", "test_res*")
    assert capsys.readouterr().out.split() == [
        *("model", "parameters", "image", "size", "weights"),
        *("test_resnet", "372,688", "160", "to", "download"),
        *("1", "of", "1", "models", "that", "match"),
    ]
    with pytest.raises(transfer.PluginError, match="no model of timm matches 'convnxt'") as caught:
        show("backbone", "timm", "convnxt")
    assert "convnext_tiny" in caught.value.problems[0].available
    with pytest.raises(transfer.PluginError, match="backbone 'textcnn' has no list of models"):
        show("backbone", "textcnn", "*")


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(300, 420), (420, 300)])
def test_images_are_cropped_as_in_timm(crop_mode, size):
    network = timm.create_model("test_resnet", num_classes=0)
    network.pretrained_cfg = {**network.pretrained_cfg, "crop_mode": crop_mode, "crop_pct": 0.9}
    image = smooth_image(*size)
    config = timm.data.resolve_data_config(pretrained_cfg=network.pretrained_cfg)
    expected = timm.data.create_transform(**config, is_training=False)(image)
    preprocessing = ImagePreprocessing(**preprocessing_of(network, None))
    assert preprocessing.describe()["crop_mode"] == crop_mode
    made = preprocessing.model_inputs(preprocessing.encode([image]))[0]
    std = torch.tensor(config["std"]).view(3, 1, 1)
    assert ((made - expected) * std).abs().max() * 255 <= 3  # Pillow and torch round differently


def smooth_image(height, width):
    y, x = np.mgrid[:height, :width]
    pixels = 127 + 60 * np.sin(np.stack([x / 17, y / 23, (x + y) / 31], axis=-1))  # without noise, like a photograph
    return Image.fromarray(pixels.astype(np.uint8))


def test_an_unsupported_interpolation_is_refused():
    network = timm.create_model("test_resnet", num_classes=0)
    network.pretrained_cfg = {**network.pretrained_cfg, "interpolation": "lanczos"}
    with pytest.raises(transfer.ConfigError, match="'lanczos', which is not supported"):
        preprocessing_of(network, None)


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_weights_from_a_file_give_what_timm_gives(model, tmp_path):
    torch.manual_seed(1)
    network = timm.create_model(model, num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    backbone = Timm(model=model, weights=str(tmp_path / "model.safetensors"))
    facts = backbone.load_pretrained()
    assert facts["tensors"] == len(backbone.state_dict())
    assert facts["left_out"] == sorted(name for name in network.state_dict() if name not in backbone_names(model))
    inputs = backbone.preprocessing.model_inputs(backbone.preprocessing.encode([backbone.preprocessing.example()]))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(inputs), pre_logits=True)
        torch.testing.assert_close(backbone.eval()(inputs), expected)


@pytest.mark.parametrize("model", ["test_resnet", "resnet50.a1_in1k", "vit_small_patch16_224.augreg_in21k"])
def test_images_are_prepared_as_timm_evaluates_the_model(model):
    image = smooth_image(300, 420)
    with torch.device("meta"):
        preprocessing = Timm(model=model, weights=None).preprocessing
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())
    expected = timm.data.create_transform(**config, is_training=False)(image)
    made = preprocessing.model_inputs(preprocessing.encode([image]))[0]
    std = torch.tensor(config["std"]).view(3, 1, 1)
    assert ((made - expected) * std).abs().max() * 255 <= 3  # Pillow and torch round differently


def test_a_saved_model_keeps_its_preprocessing():
    backbone = Timm(model="test_resnet", weights=None, image_size=48)
    settings = backbone.preprocessing.describe() | {"mean": [0.1, 0.2, 0.3]}
    del settings["augmentation"]
    again = Timm.from_assets({"preprocessing.json": json.dumps(settings)}, model="test_resnet", image_size=48)
    assert again.preprocessing.describe()["mean"] == [0.1, 0.2, 0.3]


def test_pretrained_weights_offline_without_cache_are_refused(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(transfer.WeightsError, match="timm cannot read weights of test_vit") as caught:
        Timm(model="test_vit", image_size=32).load_pretrained()
    assert "connect to the Hugging Face Hub once" in str(caught.value)


def test_missing_model_and_missing_file_are_refused(tmp_path):
    with pytest.raises(transfer.ConfigError, match="timm has no model called 'resnet19'"):
        Timm(model="resnet19")
    with pytest.raises(transfer.WeightsError, match="there is no file of weights"):
        Timm(model="test_resnet", weights=str(tmp_path / "absent.pth")).load_pretrained()
