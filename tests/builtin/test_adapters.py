"""LoRA: which parameters are trained, resume, saved models, merged exports, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import transfer
from transfer import ConfigError
from transfer.config.check import load_config
from transfer.models.saved_model import read_model
from transfer.storage import checkpoint
from transfer.storage.run_directory import RunDirectory
from transfer.storage.tensor_files import load_tensors
from transfer.training.build import build
from transfer.training.events import ignore_events
from transfer.training.preflight import preflight

pytest.importorskip("peft")

IMAGES: dict[str, Any] = {
    "data": {"name": "shapes", "per_class": 8},
    "backbone": {"name": "resnet18", "weights": None, "image_size": 32, "resize": 36},
    "adapter": {"name": "lora", "rank": 2, "stages": ["layer4"]},
    "train": {"phases": [{"epochs": 2}], "batch_size": 6, "augment": False, "optimizer": {"lr": 0.01}},
}
DORA: dict[str, Any] = {
    "data": {"name": "shapes", "per_class": 8},
    "backbone": {"name": "torchvision", "model": "swin_t", "weights": None, "image_size": 32, "resize": 36},
    "adapter": {
        "name": "lora",
        "rank": 2,
        "dora": True,
        "dropout": 0.1,
        "stages": ["stage4"],
        "targets": ["qkv", "mlp.0"],
    },
    "train": {"phases": [{"epochs": 1}], "batch_size": 12, "optimizer": {"lr": {"head": 0.01, "adapter": 0.001}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transfer.run(IMAGES, output=tmp_path_factory.mktemp("adapted")).folder


@pytest.mark.parametrize("config", [IMAGES, DORA], ids=["convolutions", "dora"])
def test_only_the_adapter_and_the_head_are_trained(config: dict[str, Any], tmp_path: Path) -> None:
    before = build(load_config(config), ignore_events).experiment.model
    run = transfer.run(config, output=tmp_path)
    after = read_model(run.folder / "model").model.state_dict()
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])}
    added = {name for name, _ in before.named_parameters() if "lora_" in name}
    assert added
    assert not {name for name in changed if "lora_" not in name and not name.startswith("head.")}
    assert changed & added
    sizes = {name: parameter.numel() for name, parameter in before.named_parameters()}
    trained = sum(size for name, size in sizes.items() if name in added or name.startswith("head."))
    assert run.summary["parameters"] == {"total": sum(sizes.values()), "trainable": trained}
    assert transfer.evaluate(run.folder) == run.summary["test"]


def test_stages_below_the_adapter_are_cached(folder: Path) -> None:
    caches = RunDirectory(folder).summary()["cache"]
    assert [cache["stages"] for cache in caches] == [["stem", "layer1", "layer2", "layer3"]] * 3


def test_checkpoint_contains_only_the_adapter_and_the_head(folder: Path) -> None:
    tensors = load_tensors(next((folder / "checkpoints" / "best").glob("model*.safetensors")))
    parameters = {name for name in tensors if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert parameters
    assert all("lora_" in name or name.startswith("head.") for name in parameters)


def test_resumed_run_ends_with_the_same_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = checkpoint.save, []

    def stopped_after_the_second(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stopped_after_the_second)
        with pytest.raises(KeyboardInterrupt):
            transfer.run(IMAGES, ["train.checkpoint.every_steps=1"], output=tmp_path)
    (stopped,) = tmp_path.iterdir()
    transfer.resume(stopped)
    weights = "model/weights.safetensors"
    assert (stopped / weights).read_bytes() == (folder / weights).read_bytes()


def test_export_is_merged(folder: Path, tmp_path: Path) -> None:
    """The export itself compares its outputs with those of the run."""
    exported = transfer.export(folder, "torchvision", tmp_path / "export")
    assert exported.deviation is not None
    names = load_tensors(next((tmp_path / "export").glob("*.safetensors")))
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    assert "peft" not in exported.modules


def test_run_starts_from_an_adapted_run(folder: Path) -> None:
    config = {**IMAGES, "backbone": {**IMAGES["backbone"], "weights": str(folder)}}
    del config["adapter"]
    started = build(load_config(config), ignore_events).experiment.model.state_dict()
    merged = read_model(folder / "model", merged=True).model.state_dict()
    backbone = [name for name in merged if not name.startswith("head.")]
    assert all(torch.equal(started[name], merged[name]) for name in backbone)


def test_adapter_has_no_warning_about_its_learning_rate(folder: Path) -> None:
    adapted = {**IMAGES, "backbone": {**IMAGES["backbone"], "weights": str(folder)}}
    assert build(load_config(adapted), ignore_events).experiment.warnings == ()
    (warning,) = build(load_config({**adapted, "adapter": None}), ignore_events).experiment.warnings
    assert "learning rate of the pretrained stage" in warning


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"targets": ["qkv"]}, "'qkv', which matches no layer"),
        ({"stages": ["layer9"]}, "'layer9', which is not a stage"),
        ({"stages": ["pool"]}, "nothing to adapt"),
    ],
)
def test_wrong_options_are_refused(adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(load_config({**IMAGES, "adapter": {"name": "lora", **adapter}}))


def test_adapter_that_no_phase_trains_is_refused() -> None:
    with pytest.raises(ConfigError, match="the adapter is never trained"):
        preflight(load_config({**IMAGES, "train": {"recipe": {"name": "feature_extraction", "epochs": 1}}}))


def test_layers_that_are_not_called_are_refused() -> None:
    config = {"data": {"name": "mini_reviews"}, "backbone": {"name": "textcnn", "variant": "rand"}}
    with pytest.raises(ConfigError, match="the adapter does not fit stage 'convolution'") as caught:
        preflight(load_config({**config, "adapter": {"name": "lora"}}))
    assert "adapter.stages" in str(caught.value)


def test_layer_inside_of_attention_is_refused() -> None:
    vit = {"name": "torchvision", "model": "vit_b_32", "weights": None, "image_size": 64}
    with pytest.raises(ConfigError, match="'out_proj', which cannot be adapted"):
        preflight(load_config({**IMAGES, "backbone": vit, "adapter": {"name": "lora", "targets": ["out_proj"]}}))


def test_group_of_stages_is_adapted() -> None:
    parts = {"image": {**IMAGES["backbone"]}, "text": {"name": "textcnn", "variant": "rand"}}
    data = {"name": "multimodal_csv", "train": "a.csv", "image": "image", "text": "text", "label": "label"}
    config = {"data": data, "backbone": {"name": "fusion", "parts": parts}}
    model = preflight(load_config({**config, "adapter": {"name": "lora", "stages": ["image"]}})).model
    added = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert added
    assert all(name.startswith("image.") for name in added)
