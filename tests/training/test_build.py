"""Preflight refuses wrong configs before anything is loaded, and its phases are those of the experiment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Dense

import transfer
from transfer import ConfigError, PluginError, register
from transfer.config.check import load_config
from transfer.training.build import build
from transfer.training.preflight import describe_preprocessing


def test_views_without_augmentation_are_refused(config: dict[str, Any]) -> None:
    overrides = ["train.views=2", "train.phases=[{epochs: 1, freeze: backbone}]"]
    with pytest.raises(ConfigError, match="nothing is augmented at random") as caught:
        transfer.check(config, overrides)
    assert caught.value.problems[0].where == "override 'train.views=2'"


def test_cutmix_of_non_image_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cutmix"):
        transfer.check(config, ["train.mix={cutmix: 1.0}"])


def test_trained_batch_norm_refuses_batch_size_one(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="batches of one"):
        transfer.check(config, ["train.batch_size=1"])
    transfer.check(config, ["train.batch_size=1", "train.phases=[{epochs: 1, freeze: backbone}]"])


def test_scheduler_error_names_its_config_line(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="OneCycleLR refuses") as caught:
        transfer.check(config, ["train.scheduler={name: one_cycle, pct_start: 3.0}"])
    assert "train.scheduler" in str(caught.value.problems[0].where)


def test_features_must_match_the_feature_spec(config: dict[str, Any]) -> None:
    class WrongSpec(Dense):
        """Backbone whose feature spec is wider than its features."""

        @property
        def features(self) -> Any:
            return type(super().features)("vector", super().features.size + 1)

    register("backbone", "wrong_spec")(WrongSpec)
    with pytest.raises(PluginError, match="returns"):
        transfer.check(config, ["backbone={name: wrong_spec}"])


def test_checked_model_is_on_the_meta_device(config: dict[str, Any]) -> None:
    _, parts = transfer.check(config)
    assert {parameter.device for parameter in parts.model.parameters()} == {torch.device("meta")}
    assert parts.shapes["head"] == "(B, 2)"


@pytest.mark.parametrize(("augment", "shown"), [("true", "default"), ("false", "none (train.augment: false)")])
def test_described_augmentation_follows_train_augment(config: dict[str, Any], augment: str, shown: str) -> None:
    settings = {"image_size": 32, "image": {"augmentation": "default"}}
    backbone: Any = SimpleNamespace(preprocessing=SimpleNamespace(describe=lambda: settings))
    described = describe_preprocessing(load_config(config, [f"train.augment={augment}"]), backbone)
    assert described == {"image_size": 32, "image": {"augmentation": shown}}


class Loaded(Dense):
    """Dense stages whose first stage has pretrained weights."""

    def load_pretrained(self) -> dict[str, Any]:
        """Set the first weights to one."""
        self.stages[0][0].weight.data.fill_(1.0)
        return {"weights": "ones"}


@pytest.mark.parametrize(
    ("phase", "warns"),
    [
        ("{epochs: 1, lr: 1.0e-3}", True),
        ("{epochs: 1, lr: {head: 1.0e-2, backbone: 1.0e-4}}", False),
        ("{epochs: 1, freeze: [first], lr: 1.0e-2}", False),
    ],
)
def test_high_rate_of_pretrained_stage_is_warned_about(config: dict[str, Any], phase: str, warns: bool) -> None:
    register("backbone", "loaded")(Loaded)
    notes: list[str] = []
    overrides = ["backbone.name=loaded", "train.optimizer={name: adamw}", f"train.phases=[{phase}]"]
    built = build(load_config(config, overrides), lambda event: notes.append(getattr(event, "text", "")))
    expected = ["warning: the learning rate of the pretrained stage first is 0.001"] if warns else []
    assert [note.split(",")[0] for note in notes if "pretrained stage" in note] == expected
    assert len(built.experiment.warnings) == warns
