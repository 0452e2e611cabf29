"""On the real data, where it is there: small shares of it, so that every run of the tests can afford it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import transfer

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TRANSFER_DATA", "nowhere"))

pytestmark = pytest.mark.data


def need(*names: str) -> list[str]:
    paths = [DATA / name for name in names]
    if not all(path.exists() for path in paths):
        pytest.skip(f"TRANSFER_DATA lacks {names}")
    return [str(path) for path in paths]


def test_textcnn_learns_from_real_reviews(tmp_path):
    _, vectors = need("aclImdb_v1.tar.gz", "vectors/imdb.w2v.100d.txt.gz")
    run = transfer.run(
        ROOT / "configs/imdb_textcnn.yaml",
        [
            f"backbone.vectors={vectors}",
            "data.limit=750",
            "backbone.filters=50",
            "backbone.max_length=150",  # most of the time is for the 25,000 reviews of the test split
            "train.phases.0.epochs=3",
        ],
        output=tmp_path,
    )
    assert run.summary["data"]["test"] == {"negative": 12500, "positive": 12500}  # the limit does not apply
    assert run.summary["pretrained"]["tokens"] > 0.95
    assert run.summary["test"]["accuracy"] > 0.75
    assert transfer.evaluate(run.folder) == run.summary["test"]


def test_pretrained_features_tell_ants_from_bees(tmp_path):
    _, weights = need("hymenoptera_data.zip", "weights/resnet18-tiny-imagenet.safetensors")
    config = ROOT / "configs/hymenoptera_features.yaml"
    overrides = [f"backbone.weights={weights}", "backbone.image_size=64"]
    run = transfer.run(config, overrides, output=tmp_path)
    assert run.summary["data"]["test"] == {"ants": 70, "bees": 83}
    assert run.summary["parameters"] == {"total": 11_177_538, "trainable": 1026}
    assert run.summary["test"]["accuracy"] > 0.65
    assert transfer.evaluate(run.folder) == run.summary["test"]


@pytest.mark.parametrize(
    "model", ["shufflenet_v2_x0_5", "mobilenet_v3_small", pytest.param("swin_t", marks=pytest.mark.slow)]
)
def test_three_backbone_families_train_on_hymenoptera(tmp_path, model):
    need("hymenoptera_data.zip")
    backbone = f"backbone={{name: torchvision, model: {model}, weights: null, image_size: 32}}"
    overrides = [backbone, "data.limit=8", "train.batch_size=12", "train.phases.0.epochs=1"]
    run = transfer.run(ROOT / "configs/hymenoptera_finetune.yaml", overrides, output=tmp_path)
    assert run.summary["status"] == "complete"
    assert run.summary["data"]["test"] == {"ants": 70, "bees": 83}
    assert run.summary["parameters"]["trainable"] == run.summary["parameters"]["total"]
    assert transfer.evaluate(run.folder) == run.summary["test"]
