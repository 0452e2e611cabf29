"""Freezing, learning rates and recipes by layer inside the only stage of a network that is no chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import POINT_SIZE, Dense
from torch import Tensor, nn

import transfer
from transfer import Backbone, ConfigError, FeatureSpec, Preprocessing, register
from transfer.builtin.heads import Linear
from transfer.config.check import load_config
from transfer.config.train_settings import Until
from transfer.models.model import Model
from transfer.models.saved_model import read_model
from transfer.training.build import build
from transfer.training.events import ignore_events
from transfer.training.freezing import prefix_length, resolve
from transfer.training.optimizer import parameter_groups
from transfer.training.preflight import preflight


class Skipping(nn.Module):
    """A network whose output depends on all of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(6))
        self.embed = nn.Linear(POINT_SIZE, 6)
        self.body = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), "after": nn.ReLU()})
        self.norm = nn.LayerNorm(6)

    def forward(self, values: Tensor) -> Tensor:
        """Return (B, 6)."""
        values = self.embed(values) + self.token
        blocks: Any = self.body["blocks"]
        return self.norm(values + sum(self.body["after"](block(values)) for block in blocks))


class Unchained(Backbone):
    """A backbone of one stage."""

    field = "point"

    def __init__(self) -> None:
        super().__init__({"network": Skipping()})

    @property
    def features(self) -> FeatureSpec:
        return FeatureSpec("vector", 6)

    @property
    def preprocessing(self) -> Preprocessing:
        return Dense().preprocessing


LAYERS = ["network.embed", *(f"network.body.blocks.{number}" for number in range(3)), "network.norm"]


@pytest.fixture
def model() -> Model:
    backbone = Unchained()
    return Model(backbone, Linear(backbone.features, 2))


def test_layers_contain_every_parameter_once(model: Model) -> None:
    assert list(model.layers) == [*LAYERS, "head"]
    names = [name for names in model.layers.values() for name in names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert "network.token" in model.layers["network.embed"]


def test_chain_has_stages_as_layers() -> None:
    backbone = Dense()
    assert list(Model(backbone, Linear(backbone.features, 2)).layers) == ["first", "second", "third", "head"]


@pytest.mark.parametrize(
    ("policy", "trained"),
    [
        (Until(until="network.body.blocks.1"), ["network.body.blocks.2", "network.norm", "head"]),
        (("network.body", "head"), ["network.embed", "network.norm"]),
        (("network",), ["head"]),
        ("backbone", ["head"]),
    ],
    ids=["until", "group", "stage", "backbone"],
)
def test_layers_are_frozen_by_name(model: Model, policy: Any, trained: list[str]) -> None:
    frozen = resolve(model, policy)
    assert [layer for layer, names in model.layers.items() if frozen.parameters.isdisjoint(names)] == trained
    # The feature cache needs a complete frozen stage.
    assert prefix_length(model, frozen) == (1 if trained == ["head"] else 0)


def test_learning_rates_by_layer(model: Model) -> None:
    def rates(lr: dict[str, float]) -> dict[str, float]:
        return {group.stage: group.lr for group in parameter_groups(model, resolve(model, "none"), lr)}

    assert rates({"head": 1.0, "backbone": 0.1}) == {"network": 0.1, "head": 1.0}
    decayed = rates({"head": 1.0, "layer_decay": 0.5})
    assert decayed == {layer: 0.5**number for number, layer in enumerate(reversed([*LAYERS, "head"]))}
    mixed = rates({"head": 1.0, "network": 0.1, "network.body": 0.2, "network.body.blocks.2": 0.3})
    assert mixed == dict(zip([*LAYERS, "head"], [0.1, 0.2, 0.2, 0.3, 0.1, 1.0], strict=True))
    with pytest.raises(ConfigError, match=r"lr names 'network\.body\.blocks\.9'"):
        rates({"head": 1.0, "backbone": 0.1, "network.body.blocks.9": 0.1})


def test_gradual_run_unfreezes_layer_by_layer(config: dict[str, Any], tmp_path: Path) -> None:
    register("backbone", "unchained")(Unchained)
    overrides = ["backbone={name: unchained}", "train.phases=null", "train.recipe={name: gradual, epochs: 6}"]
    phases = preflight(load_config(config, overrides)).phases
    trained = [{name for group in phase.groups for name in group.parameters} for phase in phases]
    assert [len(names) for names in trained] == [2, 4, 6, 8, 10, 13]
    assert transfer.run(config, overrides, output=tmp_path).summary["best_epoch"] >= 1


def test_frozen_layers_are_bit_identical_after_training(config: dict[str, Any], tmp_path: Path) -> None:
    register("backbone", "unchained")(Unchained)
    overrides = [
        "backbone={name: unchained}",
        "train.phases=[{epochs: 1, freeze: {until: network.body.blocks.0}, lr: {head: 0.1, layer_decay: 0.5}}]",
    ]
    before = build(load_config(config, overrides), ignore_events).experiment.model.state_dict()
    run = transfer.run(config, overrides, output=tmp_path)
    after = read_model(run.folder / "model").model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    kept = ("network.token", "network.embed", "network.body.blocks.0")
    assert changed == {name for name in before if not name.startswith(kept)}
