"""Defaults of text models that are trained from words on small sets."""

from __future__ import annotations

from typing import Any

import pytest

from transfer.config.check import load_config


def _config(**sections: Any) -> dict[str, Any]:
    return {"data": {"name": "mini_reviews"}, "backbone": {"name": "textcnn"}, **sections}


@pytest.mark.parametrize("name", ["textcnn", "bilstm"])
def test_text_models_train_with_dropout_and_patience(name: str) -> None:
    config = load_config(_config(backbone={"name": name}))
    assert config.head.options["dropout"] == 0.5
    (phase,) = config.phases(["embedding"])
    assert (phase.epochs, phase.patience) == (20, 5)
    again = load_config(config.resolved)
    assert again.resolved == config.resolved


def test_values_that_a_config_names_are_kept() -> None:
    config = load_config(_config(head={"name": "linear"}, train={"phases": [{"epochs": 3}]}))
    assert config.head.options["dropout"] == 0.0
    (phase,) = config.phases(["embedding"])
    assert (phase.epochs, phase.patience) == (3, None)


def test_recipe_and_explicit_null_are_kept() -> None:
    config = load_config(_config(train={"recipe": {"name": "fine_tune", "epochs": 4}}))
    assert [phase.epochs for phase in config.phases(["embedding"])] == [4]
    # Configs of earlier runs contain the null.
    config = load_config(_config(train={"phases": None, "recipe": None}))
    assert [(phase.epochs, phase.patience) for phase in config.phases(["embedding"])] == [(5, None)]


def test_other_backbones_keep_their_defaults() -> None:
    config = load_config({"data": {"name": "shapes"}, "backbone": {"name": "resnet18", "weights": None}})
    assert config.head.options["dropout"] == 0.0
    (phase,) = config.phases(["stem"])
    assert (phase.epochs, phase.patience) == (5, None)
