"""From YAML to a RunConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Dense, Points
from torch.optim import lr_scheduler

from transfer import ConfigError, PluginError, RunError, register
from transfer.config.check import load_component, load_config
from transfer.config.component import error_location
from transfer.config.train_settings import Parameters, Until
from transfer.errors import Problem

STAGES = ("first", "second", "third")


def problems_of(config: Any, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    return caught.value.problems


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_config_names_its_parts(config: dict[str, Any]) -> None:
    checked = load_config(config)
    assert (checked.data.cls, checked.backbone.cls) == (Points, Dense)
    assert checked.head.plugin.qualified_name == "transfer:linear"
    assert checked.backbone.options == {"width": 8, "dropout": 0.1}
    assert checked.data_options.validation == 0.1
    assert checked.optimizer.cls is torch.optim.SGD
    assert checked.optimizer.options == {"momentum": 0.9}
    assert [(phase.epochs, phase.freeze, phase.lr) for phase in checked.phases(STAGES)] == [(2, "none", 0.05)]


def test_defaults_are_filled_in(tiny: None) -> None:
    checked = load_config({"data": {"name": "points"}, "backbone": {"name": "dense", "width": 4}})
    plain = checked.plain
    assert plain["seed"] == 0
    assert plain["data"] == {
        "name": "points",
        "count": 160,
        "distance": 1.0,
        "target": "class",
        "validation": 0.1,
        "limit": None,
    }
    assert plain["backbone"] == {"name": "dense", "width": 4, "dropout": 0.1}
    assert plain["head"] == {"name": "linear", "dropout": 0.0}
    assert plain["task"]["name"] == "classification"
    assert plain["train"]["batch_size"] == 32
    assert plain["train"]["optimizer"] == {"name": "adam", "lr": 0.001}
    assert [(phase.epochs, phase.freeze, phase.lr) for phase in checked.phases(STAGES)] == [(5, "none", 0.001)]


def test_the_default_learning_rate_is_filled_in(config: dict[str, Any]) -> None:
    checked = load_config(config, ["train.optimizer={name: sgd}"])
    assert checked.plain["train"]["optimizer"] == {"name": "sgd", "lr": 0.001}
    assert checked.phases(STAGES)[0].lr == 0.001


def test_a_resolved_config_resolves_to_itself(config: dict[str, Any], tmp_path: Path) -> None:
    overrides = [
        "train.scheduler={name: step, step_size: 2}",
        "train.optimizer={name: adamw, lr: {head: 1.0e-5, layer_decay: 0.8}, betas: [0.8, 0.9]}",
        "train.phases=[{epochs: 1, freeze: backbone}, {epochs: 1, freeze: {until: first}, lr: 1e-7}, "
        "{epochs: 2, freeze: {parameters: ['^second', bias]}}, "
        "{epochs: 1, freeze: [third], scheduler: {name: cosine}}]",
        "head={name: mlp, hidden: [4, 2]}",
        "task.class_weights={near: 1, far: 2.5}",
        "data.limit=7",
    ]
    plain = load_config(config, overrides).plain
    path = write(tmp_path / "again.yaml", yaml.safe_dump(plain, sort_keys=False))
    assert load_config(path).plain == plain
    assert load_config(plain).plain == plain


def test_problems_in_several_sections_are_reported_at_once(tiny: None, tmp_path: Path) -> None:
    path = write(
        tmp_path / "wrong.yaml",
        """\
seed: -1
data: {name: points, count: "5"}
backbone:
  name: dense
  widht: 4
head: {name: liner}
task:
  name: classification
  label_smoothing: 1
train:
  batch_size: 0
  optimizer: {name: sgd, momentun: 0.9}
  bukcet: true
  phases:
    - {epochs: 1, freeze: 7}
""",
    )
    found = {(p.where.rpartition(":")[2], p.message) for p in problems_of(path)}
    assert found == {
        ("1", "seed is -1: it should be greater than or equal to 0"),
        ("2", 'data.count is "5": it should be a valid integer'),
        ("5", "backbone 'dense' has no option 'widht'"),
        ("6", "unknown head 'liner'"),
        ("9", "task.label_smoothing is 1: it should be less than 1"),
        ("11", "train.batch_size is 0: it should be a whole number, 1 or more, or auto"),
        ("12", "optimizer 'sgd' has no option 'momentun'"),
        ("13", "train has no option 'bukcet'"),
        (
            "15",
            "train.phases.0.freeze is 7: it should be none, backbone, {until: STAGE}, a list of stages, "
            "or {parameters: [REGEX, ...]}",
        ),
    }


def test_an_unknown_key_has_its_line_and_the_nearest_key(config_file: Path) -> None:
    text = config_file.read_text(encoding="utf-8").replace("batch_size", "batch_sise")
    (problem,) = problems_of(write(config_file, text))
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "batch_sise" in line)
    assert problem.where == f"{config_file}:{line}"
    assert problem.fix == "did you mean 'batch_size'?"


def test_an_unknown_section_names_the_nearest(config: dict[str, Any]) -> None:
    (problem,) = problems_of({**config, "tarin": {}})
    assert problem.message == "the config has no option 'tarin'"
    assert problem.fix == "did you mean 'train'?"


@pytest.mark.parametrize("section", ["data", "backbone"])
def test_a_section_that_is_missing_is_asked_for(config: dict[str, Any], section: str) -> None:
    del config[section]
    (problem,) = problems_of(config)
    assert problem.message == f"the config needs {section!r}"


@pytest.mark.parametrize("value", ["points", 5, None, ["points"]])
def test_a_section_is_a_mapping(config: dict[str, Any], value: Any) -> None:
    (problem,) = problems_of({**config, "data": value})
    assert problem.message.endswith("it should be a mapping")


def test_a_component_without_a_name_lists_the_names(config: dict[str, Any]) -> None:
    (problem,) = problems_of({**config, "head": {"dropout": 0.5}})
    assert problem.message == "head needs a name"
    assert {"linear", "mlp"} <= set(problem.available)


def test_an_unknown_plugin_names_the_nearest(config_file: Path) -> None:
    (problem,) = problems_of(config_file, "backbone.name=denes")
    assert problem.message == "unknown backbone 'denes'"
    assert problem.fix == "did you mean 'dense'?"
    assert problem.where == "override 'backbone.name=denes'"


def test_a_plugin_with_unusable_options_is_a_problem_of_the_line_that_names_it(config: dict[str, Any]) -> None:
    @register("head", "greedy")
    class Greedy(type("Base", (__import__("transfer").Head,), {})):  # type: ignore[misc]
        def __init__(self, features: Any, out_features: int, *, name: str = "") -> None: ...

    (problem,) = problems_of(config, "head.name=greedy")
    assert problem.where.startswith("override 'head.name=greedy' -> ")
    assert "an option called 'name'" in problem.message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer={name: sgdd}", "there is no optimizer called 'sgdd'"),
        ("train.optimizer={name: lbfgs}", "there is no optimizer called 'lbfgs'"),
        ("train.optimizer={lr: 0.1}", "optimizer needs a name"),
        ("train.optimizer={name: sgd, betas: [0.9, 0.9]}", "optimizer 'sgd' has no option 'betas'"),
        ("train.optimizer={name: sgd, params: []}", "optimizer 'sgd' has no option 'params'"),
        ("train.optimizer.momentum=high", 'train.optimizer.momentum is "high": it should be a valid number'),
        ("train.optimizer={name: adam, betas: 0.9}", "train.optimizer.betas is 0.9: it should be a list"),
        ("train.scheduler={name: stpe}", "there is no scheduler called 'stpe'"),
        ("train.scheduler={name: lambdalr}", "there is no scheduler called 'lambdalr'"),
        ("train.scheduler={name: step}", "scheduler 'step' needs 'step_size'"),
        (
            "train.scheduler={name: step, step_size: 1.5}",
            "train.scheduler.step_size is 1.5: it should be a valid integer",
        ),
        ("train.scheduler={name: cosine, T_max: 5}", "scheduler 'cosine' has no option 'T_max'"),
        (
            "train.phases=[{epochs: 1, scheduler: {name: step}}]",
            "scheduler 'step' needs 'step_size'",
        ),
    ],
)
def test_torch_s_parts_are_checked_against_their_signatures(
    config: dict[str, Any], override: str, message: str
) -> None:
    (problem,) = problems_of(config, override)
    assert problem.message == message
    assert problem.where == f"override {override!r}"


def test_a_wrong_scheduler_of_several_phases_is_reported_once(config: dict[str, Any]) -> None:
    phases = "train.phases=[{epochs: 1}, {epochs: 1}, {epochs: 1}]"
    assert len(problems_of(config, "train.scheduler={name: step}", phases)) == 1


@pytest.mark.parametrize(
    ("text", "freeze"),
    [
        ("none", "none"),
        ("backbone", "backbone"),
        ("{until: second}", Until(until="second")),
        ("[first, third]", ("first", "third")),
        ("[]", ()),
        ("{parameters: [bias$]}", Parameters(parameters=("bias$",))),
    ],
)
def test_freeze_policies(config: dict[str, Any], text: str, freeze: Any) -> None:
    assert load_config(config, [f"train.phases.0.freeze={text}"]).phases(STAGES)[0].freeze == freeze


@pytest.mark.parametrize(
    "text", ["layer1", "true", "5", "[1]", "{untl: x}", "{until: 5}", "{parameters: []}", "{parameters: bias}", "null"]
)
def test_a_wrong_freeze_policy_gets_one_readable_message(config: dict[str, Any], text: str) -> None:
    (problem,) = problems_of(config, f"train.phases.0.freeze={text}")
    assert "it should be none, backbone, {until: STAGE}, a list of stages, or {parameters: [REGEX, ...]}" in str(
        problem
    )


@pytest.mark.parametrize("text", ["0", "-1", ".inf", ".nan", "high", "[1]", "{}", "{head: 0}", "{head: x}", "true"])
@pytest.mark.parametrize("key", ["train.optimizer.lr", "train.phases.0.lr"])
def test_a_wrong_learning_rate_gets_one_readable_message(config: dict[str, Any], key: str, text: str) -> None:
    (problem,) = problems_of(config, f"{key}={text}")
    assert problem.message.startswith(f"{key} is ")
    assert "it should be a positive number, or a positive number for each of" in problem.message


def test_phases_inherit_what_they_do_not_set(config: dict[str, Any]) -> None:
    checked = load_config(
        config,
        [
            "train.scheduler={name: step, step_size: 1}",
            "train.phases=[{epochs: 1}, {epochs: 2, lr: {head: 0.1}, scheduler: {name: plateau}}]",
        ],
    )
    first, second = checked.phases(STAGES)
    assert (first.lr, second.lr) == (0.05, {"head": 0.1})
    assert first.scheduler is not None
    assert second.scheduler is not None
    assert (first.scheduler.cls, second.scheduler.cls) == (lr_scheduler.StepLR, lr_scheduler.ReduceLROnPlateau)


def test_a_run_is_called_after_its_file(config_file: Path, config: dict[str, Any]) -> None:
    assert load_config(config_file).name == "tiny"
    assert load_config(config).name == "run"


def test_a_quick_try_is_one_epoch_over_few_examples(config: dict[str, Any]) -> None:
    quick = load_config(config, ["train.phases=[{epochs: 5}, {epochs: 9}]"]).quick()
    assert [phase.epochs for phase in quick.phases(STAGES)] == [1, 1]
    assert quick.data_options.limit == 64
    assert quick.plain["data"]["limit"] == 64
    assert load_config(config, ["data.limit=3"]).quick().data_options.limit == 3


def test_an_error_inside_gets_the_place(config_file: Path) -> None:
    checked = load_config(config_file)
    with pytest.raises(ConfigError, match="too big") as caught, checked.at("train", "phases", 0):
        raise ValueError("too big")
    assert caught.value.problems[0].where.startswith(f"{config_file}:")
    with pytest.raises(PluginError) as kept, error_location("elsewhere"):
        raise PluginError("bad", where="here")
    assert kept.value.problems[0].where == "here"
    with pytest.raises(RunError) as placed, error_location("elsewhere"):
        raise RunError("bad")
    assert str(placed.value) == "elsewhere: bad"


def test_a_mistake_in_a_constructor_has_the_line_of_its_block(config_file: Path) -> None:
    checked = load_config(config_file, ["task.class_weights={near: 1}"])
    with pytest.raises(ConfigError, match="class_weights names") as caught:
        checked.task.make(Points().spec)
    text = config_file.read_text(encoding="utf-8").splitlines()
    assert caught.value.problems[0].where == f"{config_file}:{text.index('task:') + 1}"


def test_a_component_is_checked_on_its_own(tiny: None) -> None:
    component = load_component("backbone", {"name": "dense", "width": 4}, "model.json")
    assert component.options == {"width": 4, "dropout": 0.1}
    with pytest.raises(ConfigError, match="has no option 'x'"):
        load_component("backbone", {"name": "dense", "x": 4}, "model.json")


@pytest.mark.parametrize("block", ["dense", None, ["dense"], {}])
def test_a_component_s_block_is_a_mapping_with_a_name(tiny: None, block: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_component("backbone", block, "model.json")
    assert caught.value.problems[0].where == "model.json"
