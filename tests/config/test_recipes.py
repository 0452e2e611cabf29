"""Recipes and their phases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import Dense

import transfer
from transfer import ConfigError, register
from transfer.config.recipes import expand
from transfer.config.train_settings import LearningRate, PhaseSettings, Recipe, Until
from transfer.training.events import Note

STAGES = ("stem", "body", "top")


def phases(name: Any, epochs: int, lr: LearningRate = 0.1) -> list[tuple[int, Any, Any]]:
    """Return the epochs, freeze policy (or last frozen stage) and learning rate of each phase."""
    expanded = expand(Recipe(name=name, epochs=epochs), lr, STAGES)
    assert all(isinstance(phase, PhaseSettings) for phase in expanded)
    return [(p.epochs, p.freeze.until if isinstance(p.freeze, Until) else p.freeze, p.lr) for p in expanded]


def test_feature_extraction_trains_head() -> None:
    assert phases("feature_extraction", 7) == [(7, "backbone", 0.1)]


def test_fine_tuning_scales_learning_rate_of_backbone() -> None:
    ((epochs, frozen, lr),) = phases("fine_tune", 7)
    assert (epochs, frozen) == (7, "none")
    assert lr == pytest.approx({"head": 0.1, "backbone": 0.01})


def test_scratch_uses_one_learning_rate() -> None:
    assert phases("scratch", 7) == [(7, "none", 0.1)]


def test_lp_ft_probes_before_fine_tuning() -> None:
    first, second = phases("lp_ft", 7)
    assert first == (3, "backbone", 0.1)
    assert second[:2] == (4, "none")
    assert second[2] == pytest.approx({"head": 0.01, "backbone": 0.01})


def test_gradual_unfreezing_starts_at_output() -> None:
    gradual = phases("gradual", 10)
    assert [(epochs, frozen) for epochs, frozen, _ in gradual] == [(2, "top"), (2, "body"), (3, "stem"), (3, "none")]
    assert gradual[0][2] == 0.1
    for _, _, lr in gradual[1:]:
        assert lr == pytest.approx({"head": 0.1, "backbone": 0.01, "layer_decay": 1 / 2.6})


@pytest.mark.parametrize("name", ["feature_extraction", "fine_tune", "lp_ft", "gradual", "scratch"])
def test_learning_rates_by_group_in_every_phase(name: str) -> None:
    given = {"head": 0.3, "backbone": 0.02}
    assert all(lr == given for _, _, lr in phases(name, 8, given))


@pytest.mark.parametrize("name", ["lp_ft", "gradual"])
def test_recipes_of_several_phases_refuse_one_epoch(name: str) -> None:
    assert [epochs for epochs, _, _ in phases(name, 2)] == [1, 1]
    with pytest.raises(ConfigError, match=f"recipe '{name}' has 2 phases on this model and 1 epochs"):
        phases(name, 1)


@pytest.mark.parametrize(
    ("epochs", "frozen"), [(4, ["top", "body", "stem", "none"]), (3, ["top", "stem", "none"]), (2, ["top", "none"])]
)
def test_gradual_unfreezes_several_stages_with_few_epochs(epochs: int, frozen: list[str]) -> None:
    assert [policy for _, policy, _ in phases("gradual", epochs)] == frozen


@pytest.mark.parametrize(("count", "decay"), [(1, 1 / 2.6), (5, 1 / 2.6), (14, (1 / 2.6) ** (4 / 13))])
def test_gradual_decay_depends_on_the_number_of_stages(count: int, decay: float) -> None:
    last = expand(Recipe(name="gradual", epochs=count + 1), 0.1, [f"block{i}" for i in range(count)])[-1]
    assert isinstance(last.lr, dict)
    assert last.lr["layer_decay"] == pytest.approx(decay)
    # The first stage never trains at less than 1 / 46 of the rate of the last one.
    assert last.lr["layer_decay"] ** (count - 1) >= 0.99 / 2.6**4


def test_recipe_expands_to_stages_of_model(config: dict[str, Any]) -> None:
    del config["train"]["phases"]
    _, parts = transfer.check(config, ["train.recipe={name: gradual, epochs: 4}"])
    assert [sorted(phase.frozen.stages) for phase in parts.phases] == [
        ["first", "second", "third"],
        ["first", "second"],
        ["first"],
        [],
    ]
    rates = {group.stage: group.lr for group in parts.phases[-1].groups}
    assert rates == pytest.approx({"head": 0.05, "third": 0.005, "second": 0.005 / 2.6, "first": 0.005 / 2.6**2})
    assert [group.stage for group in parts.phases[0].groups] == ["head"]


def test_recipe_with_too_few_epochs_names_line(config: dict[str, Any]) -> None:
    del config["train"]["phases"]
    with pytest.raises(ConfigError, match="2 phases on this model and 1 epochs") as caught:
        transfer.check(config, ["train.recipe={name: gradual, epochs: 1}"])
    assert caught.value.problems[0].where == "override 'train.recipe={name: gradual, epochs: 1}'"


def test_phases_and_recipe_are_refused_together(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="phases or recipe, not both"):
        transfer.check(config, ["train.recipe={name: scratch, epochs: 3}"])


class Pretrained(Dense):
    """Dense stages with pretrained weights of ones."""

    fine_tuning_optimizer: ClassVar[dict[str, Any]] = {"name": "adamw", "lr": {"head": 0.01, "backbone": 0.002}}

    @classmethod
    def is_pretrained(cls, options: Mapping[str, Any]) -> bool:
        """Return True: the weights are always loaded."""
        return True

    def load_pretrained(self) -> dict[str, Any]:
        """Set the first weights to one."""
        self.stages[0][0].weight.data.fill_(1.0)
        return {"weights": "ones"}


@pytest.mark.parametrize(("name", "read"), [("feature_extraction", True), ("scratch", False)])
def test_scratch_loads_no_pretrained_weights(config: dict[str, Any], tmp_path: Path, name: str, read: bool) -> None:
    register("backbone", "pretrained")(Pretrained)
    del config["train"]["phases"]
    overrides = ["backbone.name=pretrained", f"train.recipe={{name: {name}, epochs: 1}}"]
    run = transfer.run(config, overrides, output=tmp_path)
    assert run.summary["pretrained"] == ({"weights": "ones"} if read else {})


@pytest.mark.parametrize(
    ("train", "rates"),
    [
        ({}, (0.002, 0.01)),
        ({"optimizer": {"name": "adamw"}}, (0.002, 0.01)),
        ({"optimizer": {"name": "sgd"}}, (0.0001, 0.001)),
        ({"optimizer": {"lr": 0.005}}, (0.005, 0.005)),
        ({"recipe": None}, (0.001, 0.001)),
    ],
    ids=["nothing", "optimizer", "other_optimizer", "rate", "null_of_earlier_run"],
)
def test_default_rates_of_pretrained_layers(
    config: dict[str, Any], train: dict[str, Any], rates: tuple[float, float]
) -> None:
    register("backbone", "pretrained")(Pretrained)
    checked, parts = transfer.check({**config, "train": {"epochs": 2, **train}}, ["backbone.name=pretrained"])
    (phase,) = parts.phases
    assert phase.epochs == 2
    assert (phase.groups[0].lr, phase.groups[-1].lr) == pytest.approx(rates)
    assert checked.is_fine_tuned_by_default is (rates[0] != rates[1])
    assert transfer.check(checked.resolved)[0].resolved == checked.resolved


def test_default_fine_tuning_is_noted(config: dict[str, Any], tmp_path: Path) -> None:
    register("backbone", "pretrained")(Pretrained)
    notes: list[str] = []
    transfer.run(
        {**config, "train": {"device": "cpu"}},
        ["backbone.name=pretrained"],
        output=tmp_path,
        quick=True,
        observe=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert "pretrained layers are fine-tuned by default: adamw at a rate of 0.002 (backbone) and 0.01 (head)" in notes


@pytest.mark.parametrize(("name", "count"), [("lp_ft", 2), ("gradual", 4)])
def test_recipes_train(config: dict[str, Any], tmp_path: Path, name: str, count: int) -> None:
    del config["train"]["phases"]
    run = transfer.run(config, [f"train.recipe={{name: {name}, epochs: {count}}}"], output=tmp_path)
    assert run.summary["epochs"] == count
    assert {report.get("phase") for report in run.summary["cache"]} == {*range(1, count + 1), None}
    assert transfer.evaluate(run.folder) == run.summary["test"]
