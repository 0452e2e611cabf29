"""Checking of configs and the resulting RunConfig."""

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


def test_config_resolves_components(config: dict[str, Any]) -> None:
    checked = load_config(config)
    assert (checked.data.cls, checked.backbone.cls) == (Points, Dense)
    assert checked.head.plugin.qualified_name == "transferkit:linear"
    assert checked.backbone.options == {"width": 8, "dropout": 0.1}
    assert checked.data_options.validation == 0.1
    assert checked.optimizer.cls is torch.optim.SGD
    assert checked.optimizer.options == {"momentum": 0.9}
    assert [(phase.epochs, phase.freeze, phase.lr) for phase in checked.phases(STAGES)] == [(2, "none", 0.05)]


def test_config_fills_in_defaults(tiny: None) -> None:
    checked = load_config({"data": {"name": "points"}, "backbone": {"name": "dense", "width": 4}})
    resolved = checked.resolved
    assert resolved["seed"] == 0
    assert resolved["data"] == {
        "name": "points",
        "count": 160,
        "distance": 1.0,
        "target": "class",
        "validation": 0.1,
        "limit": None,
        "exclude": None,
        "fold": None,
    }
    assert resolved["backbone"] == {"name": "dense", "width": 4, "dropout": 0.1}
    assert resolved["head"] == {"name": "linear", "dropout": 0.0}
    assert resolved["task"]["name"] == "classification"
    assert resolved["train"]["batch_size"] == 32
    assert resolved["train"]["optimizer"] == {"name": "adam", "lr": 0.001}
    assert [(phase.epochs, phase.freeze, phase.lr) for phase in checked.phases(STAGES)] == [(5, "none", 0.001)]


def test_config_fills_in_default_learning_rate(config: dict[str, Any]) -> None:
    checked = load_config(config, ["train.optimizer={name: sgd}"])
    assert checked.resolved["train"]["optimizer"] == {"name": "sgd", "lr": 0.001}
    assert checked.phases(STAGES)[0].lr == 0.001


def test_resolved_config_resolves_to_itself(config: dict[str, Any], tmp_path: Path) -> None:
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
    resolved = load_config(config, overrides).resolved
    path = write(tmp_path / "again.yaml", yaml.safe_dump(resolved, sort_keys=False))
    assert load_config(path).resolved == resolved
    assert load_config(resolved).resolved == resolved


def test_problems_of_several_sections_are_reported_together(tiny: None, tmp_path: Path) -> None:
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
    problems = {(p.where.rpartition(":")[2], p.message) for p in problems_of(path)}
    assert problems == {
        ("1", "seed is invalid: expected a number >= 0, got -1"),
        ("2", 'data.count is invalid: expected an integer, got "5"'),
        ("5", "unknown option 'widht' of backbone 'dense'"),
        ("6", next(problem.message for problem in problems_of(path) if "'liner'" in problem.message)),
        ("9", "task.label_smoothing is invalid: expected a number < 1, got 1"),
        ("11", "train.batch_size is invalid: expected an integer of 1 or more, or auto, got 0"),
        ("12", "unknown option 'momentun' of optimizer 'sgd'"),
        ("13", "unknown option 'bukcet' of train"),
        (
            "15",
            "train.phases.0.freeze is invalid: expected none, backbone, {until: STAGE}, a list of stages, "
            "or {parameters: [REGEX, ...]}, got 7",
        ),
    }


def test_unknown_option_names_line_and_nearest(config_file: Path) -> None:
    text = config_file.read_text(encoding="utf-8").replace("batch_size", "batch_sise")
    (problem,) = problems_of(write(config_file, text))
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "batch_sise" in line)
    assert problem.where == f"{config_file}:{line}"
    assert problem.fix == "did you mean 'batch_size'?"


def test_unknown_section_names_nearest(config: dict[str, Any]) -> None:
    (problem,) = problems_of({**config, "tarin": {}})
    assert problem.message == "unknown option 'tarin' of the config"
    assert problem.fix == "did you mean 'train'?"


@pytest.mark.parametrize("section", ["data", "backbone"])
def test_missing_section_is_reported(config: dict[str, Any], section: str) -> None:
    del config[section]
    (problem,) = problems_of(config)
    assert problem.message == f"required option {section!r} of the config is missing"


@pytest.mark.parametrize("value", ["points", 5, None, ["points"]])
def test_section_refuses_other_types(config: dict[str, Any], value: Any) -> None:
    (problem,) = problems_of({**config, "data": value})
    assert problem.message.startswith("data is invalid: expected a mapping, got ")


def test_component_without_name_lists_plugins(config: dict[str, Any]) -> None:
    (problem,) = problems_of({**config, "head": {"dropout": 0.5}})
    assert problem.message == "head has no name"
    assert {"linear", "mlp"} <= set(problem.available)


def test_unknown_plugin_names_nearest(config_file: Path) -> None:
    (problem,) = problems_of(config_file, "backbone.name=denes")
    assert "'denes'" in problem.message
    assert problem.fix == "did you mean 'dense'?"
    assert problem.where == "override 'backbone.name=denes'"


def test_plugin_with_reserved_option_names_config_line(config: dict[str, Any]) -> None:
    @register("head", "greedy")
    class Greedy(type("Base", (__import__("transfer").Head,), {})):  # type: ignore[misc]
        def __init__(self, features: Any, out_features: int, *, name: str = "") -> None: ...

    (problem,) = problems_of(config, "head.name=greedy")
    assert problem.where.startswith("override 'head.name=greedy' -> ")
    assert "option 'name' of Greedy has a reserved name" in problem.message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer={name: sgdd}", "unknown optimizer 'sgdd'"),
        ("train.optimizer={name: lbfgs}", "unknown optimizer 'lbfgs'"),
        ("train.scheduler={gamma: 0.1}", "scheduler has no name"),
        ("train.optimizer={name: sgd, betas: [0.9, 0.9]}", "unknown option 'betas' of optimizer 'sgd'"),
        ("train.optimizer={name: sgd, params: []}", "unknown option 'params' of optimizer 'sgd'"),
        ("train.optimizer.momentum=high", 'train.optimizer.momentum is invalid: expected a number, got "high"'),
        ("train.optimizer={name: adam, betas: 0.9}", "train.optimizer.betas is invalid: expected a list, got 0.9"),
        ("train.scheduler={name: stpe}", "unknown scheduler 'stpe'"),
        ("train.scheduler={name: lambdalr}", "unknown scheduler 'lambdalr'"),
        ("train.scheduler={name: step}", "required option 'step_size' of scheduler 'step' is missing"),
        (
            "train.scheduler={name: step, step_size: 1.5}",
            "train.scheduler.step_size is invalid: expected an integer, got 1.5",
        ),
        ("train.scheduler={name: cosine, T_max: 5}", "unknown option 'T_max' of scheduler 'cosine'"),
        (
            "train.phases=[{epochs: 1, scheduler: {name: step}}]",
            "required option 'step_size' of scheduler 'step' is missing",
        ),
    ],
)
def test_torch_classes_refuse_wrong_options(config: dict[str, Any], override: str, message: str) -> None:
    (problem,) = problems_of(config, override)
    assert problem.message == message
    assert problem.where == f"override {override!r}"


def test_wrong_scheduler_of_several_phases_is_reported_once(config: dict[str, Any]) -> None:
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
def test_freeze_policy_variants(config: dict[str, Any], text: str, freeze: Any) -> None:
    assert load_config(config, [f"train.phases.0.freeze={text}"]).phases(STAGES)[0].freeze == freeze


@pytest.mark.parametrize(
    "text", ["layer1", "true", "5", "[1]", "{untl: x}", "{until: 5}", "{parameters: []}", "{parameters: bias}", "null"]
)
def test_wrong_freeze_policy_lists_variants(config: dict[str, Any], text: str) -> None:
    (problem,) = problems_of(config, f"train.phases.0.freeze={text}")
    assert "expected none, backbone, {until: STAGE}, a list of stages, or {parameters: [REGEX, ...]}" in str(problem)


@pytest.mark.parametrize("text", ["0", "-1", ".inf", ".nan", "high", "[1]", "{}", "{head: 0}", "{head: x}", "true"])
@pytest.mark.parametrize("key", ["train.optimizer.lr", "train.phases.0.lr"])
def test_wrong_learning_rate_lists_variants(config: dict[str, Any], key: str, text: str) -> None:
    (problem,) = problems_of(config, f"{key}={text}")
    assert problem.message.startswith(f"{key} is ")
    assert (
        "expected a positive number, or positive numbers by group: head, backbone, a stage, or layer_decay"
        in problem.message
    )


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "mps"])
def test_device_accepts_device_names(config: dict[str, Any], device: str) -> None:
    assert load_config(config, [f"train.device={device}"]).train.device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "CPU", "0", "null"])
def test_unknown_device_lists_the_choices(config: dict[str, Any], device: str) -> None:
    (problem,) = problems_of(config, f"train.device={device}")
    assert problem.message.startswith("train.device is ")
    assert "auto, cpu, cuda, cuda:N (the GPU with index N) or mps" in problem.message


def test_phases_inherit_settings_of_run(config: dict[str, Any]) -> None:
    checked = load_config(
        config,
        [
            "train.scheduler={name: step, step_size: 1}",
            "train.phases=[{epochs: 1}, {epochs: 2, lr: {head: 0.1}, scheduler: {name: plateau}}]",
        ],
    )
    first, second = checked.phases(STAGES)
    assert (first.lr, second.lr) == (0.05, {"head": 0.1})
    schedulers = [checked.phase_scheduler(index) for index in range(2)]
    assert [scheduler and scheduler.cls for scheduler in schedulers] == [
        lr_scheduler.StepLR,
        lr_scheduler.ReduceLROnPlateau,
    ]


def test_run_name_is_stem_of_file(config_file: Path, config: dict[str, Any]) -> None:
    assert load_config(config_file).name == "tiny"
    assert load_config(config).name == "run"


def test_quick_run_has_one_epoch_and_few_examples(config: dict[str, Any]) -> None:
    quick = load_config(config, ["train.phases=[{epochs: 5}, {epochs: 9}]"]).quick()
    assert [phase.epochs for phase in quick.phases(STAGES)] == [1, 1]
    assert quick.data_options.limit == 64
    assert quick.resolved["data"]["limit"] == 64
    assert load_config(config, ["data.limit=3"]).quick().data_options.limit == 3


def test_error_location_is_added_to_errors(config_file: Path) -> None:
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


def test_constructor_error_names_line_of_block(config_file: Path) -> None:
    checked = load_config(config_file, ["task.class_weights={near: 1}"])
    with pytest.raises(ConfigError, match="class_weights names") as caught:
        checked.task.make(Points().spec)
    text = config_file.read_text(encoding="utf-8").splitlines()
    assert caught.value.problems[0].where == f"{config_file}:{text.index('task:') + 1}"


def test_load_component_checks_options(tiny: None) -> None:
    component = load_component("backbone", {"name": "dense", "width": 4}, "model.json")
    assert component.options == {"width": 4, "dropout": 0.1}
    with pytest.raises(ConfigError, match="unknown option 'x' of backbone"):
        load_component("backbone", {"name": "dense", "x": 4}, "model.json")


@pytest.mark.parametrize("block", ["dense", None, ["dense"], {}])
def test_load_component_refuses_other_blocks(tiny: None, block: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_component("backbone", block, "model.json")
    assert caught.value.problems[0].where == "model.json"


def test_optimizer_without_a_name_is_the_default(config: dict[str, Any]) -> None:
    del config["train"]["optimizer"]
    checked = load_config(config, ["train.optimizer.lr=0.02"])
    assert (checked.optimizer.name, checked.optimizer_options.lr) == ("adam", 0.02)
    assert checked.resolved["train"]["optimizer"] == {"name": "adam", "lr": 0.02}
    (problem,) = problems_of(config, "train.optimizer.rate=0.02")
    assert problem.message == "unknown option 'rate' of optimizer 'adam'"


def test_epochs_without_phases(config: dict[str, Any]) -> None:
    del config["train"]["phases"]
    for overrides, epochs in ([], 5), (["train.epochs=3"], 3):
        assert [phase.epochs for phase in load_config(config, overrides).phases(STAGES)] == [epochs]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "set the epochs of each phase (train.phases.0.epochs), not train.epochs"),
        (["train.phases=null", "train.recipe={name: lp_ft, epochs: 2}"], "set train.recipe.epochs, not train.epochs"),
    ],
)
def test_epochs_with_phases_or_recipe_are_refused(config: dict[str, Any], overrides: list[str], message: str) -> None:
    (problem,) = problems_of(config, "train.epochs=3", *overrides)
    assert message in problem.message
