"""Named recipes: the phases they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Dense

import transfer
from transfer import ConfigError, register
from transfer.config.recipes import expand
from transfer.config.train_settings import LearningRate, PhaseSettings, Recipe, Until

STAGES = ("stem", "body", "top")


def phases(name: Any, epochs: int, lr: LearningRate = 0.1) -> list[tuple[int, Any, Any]]:
    """Return epochs, what is frozen (until which stage) and the learning rate of each phase."""
    found = expand(Recipe(name=name, epochs=epochs), lr, STAGES)
    assert all(isinstance(phase, PhaseSettings) for phase in found)
    return [(p.epochs, p.freeze.until if isinstance(p.freeze, Until) else p.freeze, p.lr) for p in found]


def test_feature_extraction_trains_the_head() -> None:
    assert phases("feature_extraction", 7) == [(7, "backbone", 0.1)]


def test_fine_tuning_trains_the_backbone_at_a_tenth() -> None:
    ((epochs, frozen, lr),) = phases("fine_tune", 7)
    assert (epochs, frozen) == (7, "none")
    assert lr == pytest.approx({"head": 0.1, "backbone": 0.01})


def test_scratch_trains_everything_at_one_rate() -> None:
    assert phases("scratch", 7) == [(7, "none", 0.1)]


def test_a_probe_comes_before_slow_tuning() -> None:
    first, second = phases("lp_ft", 7)
    assert first == (3, "backbone", 0.1)
    assert second[:2] == (4, "none")
    assert second[2] == pytest.approx({"head": 0.01, "backbone": 0.01})


def test_gradual_unfreezing_begins_at_the_top() -> None:
    found = phases("gradual", 10)
    assert [(epochs, frozen) for epochs, frozen, _ in found] == [(2, "top"), (2, "body"), (3, "stem"), (3, "none")]
    assert found[0][2] == 0.1
    for _, _, lr in found[1:]:
        assert lr == pytest.approx({"head": 0.1, "backbone": 0.01, "layer_decay": 1 / 2.6})


@pytest.mark.parametrize("name", ["feature_extraction", "fine_tune", "lp_ft", "gradual", "scratch"])
def test_rates_given_by_group_are_kept_in_every_phase(name: str) -> None:
    given = {"head": 0.3, "backbone": 0.02}
    assert all(lr == given for _, _, lr in phases(name, 8, given))


@pytest.mark.parametrize(("name", "count"), [("lp_ft", 2), ("gradual", 4)])
def test_fewer_epochs_than_phases_are_refused(name: str, count: int) -> None:
    assert [epochs for epochs, _, _ in phases(name, count)] == [1] * count
    with pytest.raises(ConfigError, match=f"recipe '{name}' has {count} phases on this model and {count - 1} epochs"):
        phases(name, count - 1)


def test_a_recipe_is_worked_out_for_the_model(config: dict[str, Any]) -> None:
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


def test_a_recipe_that_does_not_fit_has_its_line(config: dict[str, Any]) -> None:
    del config["train"]["phases"]
    with pytest.raises(ConfigError, match="4 phases on this model and 3 epochs") as caught:
        transfer.check(config, ["train.recipe={name: gradual, epochs: 3}"])
    assert caught.value.problems[0].where == "override 'train.recipe={name: gradual, epochs: 3}'"


def test_phases_and_a_recipe_exclude_each_other(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="phases or recipe, not both"):
        transfer.check(config, ["train.recipe={name: scratch, epochs: 3}"])


class Pretrained(Dense):
    """Dense stages that say when weights are read."""

    def load_pretrained(self) -> dict[str, Any]:
        """Set the first weights to one."""
        self.stages[0][0].weight.data.fill_(1.0)
        return {"weights": "ones"}


@pytest.mark.parametrize(("name", "read"), [("feature_extraction", True), ("scratch", False)])
def test_scratch_alone_reads_no_pretrained_weights(
    config: dict[str, Any], tmp_path: Path, name: str, read: bool
) -> None:
    register("backbone", "pretrained")(Pretrained)
    del config["train"]["phases"]
    overrides = ["backbone.name=pretrained", f"train.recipe={{name: {name}, epochs: 1}}"]
    run = transfer.run(config, overrides, output=tmp_path)
    assert run.summary["pretrained"] == ({"weights": "ones"} if read else {})


@pytest.mark.parametrize(("name", "count"), [("lp_ft", 2), ("gradual", 4)])
def test_recipes_train(config: dict[str, Any], tmp_path: Path, name: str, count: int) -> None:
    del config["train"]["phases"]
    run = transfer.run(config, [f"train.recipe={{name: {name}, epochs: {count}}}"], output=tmp_path)
    assert run.summary["epochs"] == count
    assert {report.get("phase") for report in run.summary["cache"]} == {*range(1, count + 1), None}
    assert transfer.evaluate(run.folder) == run.summary["test"]
