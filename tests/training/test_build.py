"""What preflight refuses before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Dense

import transfer
from transfer import ConfigError, PluginError, register


def test_views_without_augmentation_are_refused(config: dict[str, Any]) -> None:
    overrides = ["train.views=2", "train.phases=[{epochs: 1, freeze: backbone}]"]
    with pytest.raises(ConfigError, match="nothing is augmented at random") as caught:
        transfer.check(config, overrides)
    assert caught.value.problems[0].where == "override 'train.views=2'"


def test_cutmix_of_what_is_no_picture_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cutmix"):
        transfer.check(config, ["train.mix={cutmix: 1.0}"])


def test_batches_of_one_are_refused_where_batch_norm_is_trained(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="batches of one"):
        transfer.check(config, ["train.batch_size=1"])
    transfer.check(config, ["train.batch_size=1", "train.phases=[{epochs: 1, freeze: backbone}]"])


def test_a_schedulers_mistake_is_found_at_its_line(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="OneCycleLR refuses") as caught:
        transfer.check(config, ["train.scheduler={name: one_cycle, pct_start: 3.0}"])
    assert "train.scheduler" in str(caught.value.problems[0].where)


def test_shapes_are_held_to_what_the_backbone_says(config: dict[str, Any]) -> None:
    class Boastful(Dense):
        """Says that its features are wider than they are."""

        @property
        def features(self) -> Any:
            return type(super().features)("vector", super().features.size + 1)

    register("backbone", "boastful")(Boastful)
    with pytest.raises(PluginError, match="returns"):
        transfer.check(config, ["backbone={name: boastful}"])


def test_everything_stays_on_the_meta_device(config: dict[str, Any]) -> None:
    _, parts = transfer.check(config)
    assert {parameter.device for parameter in parts.model.parameters()} == {torch.device("meta")}
    assert parts.shapes["head"] == "(B, 2)"
