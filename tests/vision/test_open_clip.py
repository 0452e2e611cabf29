"""Image towers of OpenCLIP, and zero-shot classifiers of their text towers, with tiny random models."""

import contextlib
import json
import unittest

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import transfer
from transfer import ConfigError
from transfer.config.check import load_config
from transfer.runs.train import run
from transfer.testing import contracts
from transfer.training.build import build

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402

from transfer_vision.models.open_clip_model import OpenCLIP  # noqa: E402 - it imports open_clip

VISION = {
    "blocks": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None},
}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CLASSES = ("circle", "triangle")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return folders of tiny models with random weights, by the kind of image tower."""
    paths = {}
    for name, vision in VISION.items():
        path = paths[name] = tmp_path_factory.mktemp(name)
        config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}
        preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
        content = {"model_cfg": config, "preprocess_cfg": preprocess}
        (path / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{path}", load_weights=False)
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path / "model.safetensors")
    return {name: f"local-dir:{path}" for name, path in paths.items()}


@pytest.mark.parametrize(
    ("tower", "stages"), [("blocks", ["stem", "block.0", "block.1", "pool"]), ("resnet", ["network"])]
)
def test_zero_shot_logits_are_those_of_open_clip(folders, tower, stages):
    backbone = OpenCLIP(model=folders[tower])
    assert list(backbone.stage_names) == stages
    assert backbone.load_pretrained()["weights"] == "pretrained"
    model = open_clip.create_model(folders[tower], require_pretrained=True).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    templates = ["a photo of a {}.", "{}"]
    with torch.no_grad():
        features = backbone.eval()(images)
        texts = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(folders[tower]), CLASSES, templates)
        expected = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ texts
        weight, bias = backbone.zero_shot(CLASSES, templates)
    assert torch.allclose(F.linear(features, weight, bias), expected, atol=1e-5)


def test_preprocessing_is_that_of_the_model(folders):
    preprocessing = OpenCLIP(model=folders["blocks"]).preprocessing
    assert (preprocessing.image_size, preprocessing.crop_mode) == (32, "squash")
    assert (preprocessing.mean, preprocessing.std) == ((0.5,) * 3, (0.25,) * 3)
    transform = image_transform_v2(
        PreprocessCfg(size=32, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", resize_mode="squash"),
        is_train=False,
    )
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8))
    encoded = preprocessing.model_inputs(preprocessing.encode([image]), torch.device("cpu"))
    assert torch.allclose(encoded[0], transform(image), atol=0.02)  # resized as uint8 by both, rounded differently


def shapes(model, **backbone):
    return {
        "data": {"name": "shapes", "per_class": 8, "image_size": 32, "validation": 0.25},
        "backbone": {"name": "open_clip", "model": model, **backbone},
        "train": {"phases": [{"epochs": 1, "freeze": "backbone"}], "report": False},
    }


def test_head_starts_as_the_zero_shot_classifier(folders, tmp_path):
    config = shapes(folders["blocks"]) | {"head": {"name": "zero_shot", "templates": ["{} shape"]}}
    built = build(load_config(config), lambda _: None)
    weight, _ = built.backbone.zero_shot(built.data.classes, ["{} shape"])
    head = built.experiment.model.stages["head"].as_linear()
    assert torch.equal(head.weight, weight)
    trained = run(config, output=tmp_path)
    assert transfer.evaluate(trained.folder) == trained.summary["test"]
    config["backbone"]["weights"] = None
    with pytest.raises(ConfigError, match="needs a backbone with a pretrained text tower"):
        build(load_config(config), lambda _: None)


def test_probe_has_a_row_without_labels(folders):
    result = transfer.probe([shapes(folders["blocks"])], shots=["full"])
    assert [(row.labels, row.classifier) for row in result.rows[:2]] == [
        ("no labels", "zero shot"),
        (f"all {result.rows[1].examples[0]} labels", "logistic regression"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "ViT-B-99"}, "OpenCLIP has no model called 'ViT-B-99'"),
        ({"model": "local-dir:missing"}, r"OpenCLIP cannot create the model \(local-dir:missing\)"),
    ],
)
def test_unknown_model_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        OpenCLIP(**options)


def test_contracts(folders):
    chosen = contracts("transferkit", {"open_clip": [{"model": folders["blocks"], "weights": None}]})
    checked = 0
    for contract in chosen:
        if "open_clip" in str(contract):
            with contextlib.suppress(unittest.SkipTest):  # does not apply to this backbone
                contract.check()
                checked += 1
    assert checked > 5
