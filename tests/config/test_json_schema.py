"""JSON Schema of a config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from jsonschema.exceptions import best_match

from transfer import DataSpec, Head, MeanOf, register
from transfer.config.json_schema import config_schema
from transfer.config.option_schema import describe_options
from transfer.config.torch_classes import OPTIMIZERS, SCHEDULERS
from transfer.registry import entry_points as registry

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
BUILT_IN = [p for p in registry.plugins() if p.distribution == "transferkit" and not (p.extras and p.unavailable)]


@pytest.fixture(scope="module")
def schema() -> Any:
    schema, _ = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


@pytest.fixture(scope="module")
def validator(schema: Any) -> Any:
    return jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))


def blocks(schema: Any, name: str) -> list[Any]:
    """Return the alternative blocks of a section."""
    cases = schema["$defs"][name]["allOf"]
    return [schema["$defs"][case["then"]["$ref"].removeprefix("#/$defs/")] for case in cases]


def config(**changes: Any) -> dict[str, Any]:
    return {"data": {"name": "mini_reviews"}, "backbone": {"name": "textcnn"}, **changes}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_valid(validator: Any, path: Path) -> None:
    extras = {"hymenoptera_efficientnet": "timm", "imdb_minilm": "transformers", "reviews_lora": "peft"}
    if path.stem in extras:
        pytest.importorskip(extras[path.stem], reason=f"{extras[path.stem]} is not installed")
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert "# yaml-language-server: $schema=schema.json" in path.read_text(encoding="utf-8").splitlines()[:3]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_broken_config_is_invalid(validator: Any, path: Path) -> None:
    def changed(change: Callable[[Any], Any]) -> Any:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config["train"].setdefault("optimizer", {"name": "adam"})
        config["train"].setdefault("phases", [{"epochs": 1}])
        change(config)
        return config

    mistakes: list[Callable[[Any], Any]] = [
        lambda config: config.update(trian={}),
        lambda config: config.pop("data"),
        lambda config: config.update(seed="one"),
        lambda config: config["data"].update(validaton=0.1),
        lambda config: config["data"].update(validation=2),
        lambda config: config["backbone"].update(name="nothing"),
        lambda config: config["backbone"].update(wieghts=None),
        lambda config: config["head"].update(dropout="half"),
        lambda config: config["train"].update(batch_size=0),
        lambda config: config["train"]["optimizer"].update(name="adamm"),
        lambda config: config["train"]["optimizer"].update(weight_dekay=0.1),
        lambda config: config["train"]["phases"][0].update(freeze=3),
        lambda config: config["train"]["phases"][0].update(scheduler={"name": "nothing"}),
    ]
    for number, mistake in enumerate(mistakes):
        assert not validator.is_valid(changed(mistake)), number


@pytest.mark.parametrize(
    "right",
    [
        config(seed="${SEED:-3}"),
        config(backbone={"name": "transferkit:textcnn", "kernel_sizes": [3, 4]}),
        config(head={"name": "mlp", "hidden": [8]}, task={"name": "classification", "class_weights": {"a": 1.0}}),
        config(train={"optimizer": {"name": "adamw", "lr": {"head": 1.0e-3, "backbone": 1.0e-4}}}),
        config(train={"scheduler": {"name": "plateau", "patience": 2}, "recipe": {"name": "lp_ft", "epochs": 4}}),
        config(train={"phases": [{"epochs": 1, "freeze": {"until": "embedding"}, "scheduler": None}]}),
        config(train={"phases": [{"epochs": "${EPOCHS}", "freeze": ["embedding"]}]}),
    ],
)
def test_config_variants_are_valid(validator: Any, right: dict[str, Any]) -> None:
    validator.validate(right)


def test_unknown_option_is_named(validator: Any) -> None:
    error = best_match(validator.iter_errors(config(backbone={"name": "textcnn", "filter": 3})))
    assert "'filter' was unexpected" in error.message


@pytest.mark.parametrize("plugin", BUILT_IN, ids=lambda plugin: f"{plugin.kind}-{plugin.name}")
def test_schema_contains_options_of_plugin(schema: Any, plugin: registry.Plugin) -> None:
    section = "data" if plugin.kind == "dataset" else plugin.kind
    if section not in schema["$defs"]:
        pytest.skip("no block of a config names it")
    (block,) = [block for block in blocks(schema, section) if plugin.name in block["properties"]["name"]["enum"]]
    assert block["description"]
    for option in describe_options(registry.load(plugin.kind, plugin.name)):
        schema_of_option = block["properties"][option.name]
        assert schema_of_option["description"] == option.description
        assert ("default" in schema_of_option) == (option.default != "required")
        assert (option.name in block["required"]) == (option.default == "required")


def test_schema_contains_optimizers_and_schedulers(schema: Any) -> None:
    for name, classes in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        names = [name for block in blocks(schema, name) for name in block["properties"]["name"]["enum"]]
        assert sorted(names) == sorted(classes)


def test_schema_contains_plugins_of_every_kind() -> None:
    @register("optimizer", "plain")
    class Plain(torch.optim.SGD):
        """Gradient descent."""

    @register("metric", "errors")
    class Errors(MeanOf):
        """Fraction of wrong predictions.

        Args:
            factor: Factor of the fraction.
        """

        def __init__(self, data: DataSpec, *, factor: float = 1.0) -> None: ...

    schema, _ = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))
    validator.validate(config(train={"optimizer": {"name": "plain", "momentum": 0.9}}))
    assert not validator.is_valid(config(train={"optimizer": {"name": "plain", "params": 1}}))
    for metrics, is_valid in ((["errors"], True), ([{"name": "errors", "factor": 2.0}], True), (["error"], False)):
        assert validator.is_valid(config(task={"name": "classification", "metrics": metrics})) == is_valid


def test_schema_describes_options_of_framework(schema: Any) -> None:
    for name in ("TrainConfig", "PhaseSettings", "Recipe", "MixupCutmix"):
        block = schema["$defs"][name]
        assert "Args" not in block["description"]
        assert all(option.get("description") for option in block["properties"].values()), name


def test_schema_leaves_out_plugin_without_types() -> None:
    class Untyped(Head):
        def __init__(self, features, out_features, *, size=1) -> None: ...  # type: ignore[no-untyped-def]

    class Odd(Head):
        def __init__(self, features: Any, out_features: int, *, shape: Callable[[], int] | None = None) -> None: ...

    register("head", "untyped")(Untyped)
    register("head", "odd")(Odd)
    schema, problems = config_schema()
    assert sorted(problem.message.partition(":")[0] for problem in problems) == [
        "option 'size' of Untyped has no type",
        "the options of head 'odd' have no JSON Schema",
    ]
    assert jsonschema.Draft202012Validator(schema).is_valid(config())


def test_schema_command_writes_file(tmp_path: Path, python: Any) -> None:
    done = python("-m", "transfer", "schema", "--output", "schema.json", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("schema.json\n", "")
    jsonschema.Draft202012Validator.check_schema(json.loads((tmp_path / "schema.json").read_text(encoding="utf-8")))


def test_schema_allows_an_optimizer_without_a_name(validator: Any) -> None:
    validator.validate(config(train={"optimizer": {"lr": 0.1, "amsgrad": True}}))
    assert not validator.is_valid(config(train={"optimizer": {"momentum": 0.9}}))
    assert validator.is_valid(config(train={"optimizer": {"name": "sgd", "momentum": 0.9}}))
