"""The JSON Schema of a config: what is right passes, what is wrong does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from jsonschema.exceptions import best_match

from transfer import Head, register
from transfer.config.json_schema import config_schema
from transfer.config.option_schema import describe_options
from transfer.config.torch_classes import OPTIMIZERS, SCHEDULERS
from transfer.registry import entry_points as registry

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
BUILT_IN = [p for p in registry.plugins() if p.distribution == "transferkit" and not (p.extras and p.unavailable)]


@pytest.fixture(scope="module")
def schema() -> Any:
    whole, _ = config_schema()
    jsonschema.Draft202012Validator.check_schema(whole)
    return whole


@pytest.fixture(scope="module")
def validator(schema: Any) -> Any:
    return jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))


def blocks(schema: Any, name: str) -> list[Any]:
    """Return the blocks that a part of a config chooses from."""
    cases = schema["$defs"][name]["allOf"]
    return [schema["$defs"][case["then"]["$ref"].removeprefix("#/$defs/")] for case in cases]


def config(**changes: Any) -> dict[str, Any]:
    return {"data": {"name": "mini_reviews"}, "backbone": {"name": "textcnn"}, **changes}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_valid(validator: Any, path: Path) -> None:
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert "# yaml-language-server: $schema=schema.json" in path.read_text(encoding="utf-8").splitlines()[:3]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_that_is_broken_is_not(validator: Any, path: Path) -> None:
    def changed(change: Callable[[Any], Any]) -> Any:
        whole = yaml.safe_load(path.read_text(encoding="utf-8"))
        change(whole)
        return whole

    mistakes: list[Callable[[Any], Any]] = [
        lambda whole: whole.update(trian={}),
        lambda whole: whole.pop("data"),
        lambda whole: whole.update(seed="one"),
        lambda whole: whole["data"].update(validaton=0.1),
        lambda whole: whole["data"].update(validation=2),
        lambda whole: whole["backbone"].update(name="nothing"),
        lambda whole: whole["backbone"].update(wieghts=None),
        lambda whole: whole["head"].update(dropout="half"),
        lambda whole: whole["train"].update(batch_size=0),
        lambda whole: whole["train"]["optimizer"].update(name="adamm"),
        lambda whole: whole["train"]["optimizer"].update(weight_dekay=0.1),
        lambda whole: whole["train"]["phases"][0].update(freeze=3),
        lambda whole: whole["train"]["phases"][0].update(scheduler={"name": "nothing"}),
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
def test_what_a_config_may_say_is_valid(validator: Any, right: dict[str, Any]) -> None:
    validator.validate(right)


def test_a_mistake_is_named(validator: Any) -> None:
    error = best_match(validator.iter_errors(config(backbone={"name": "textcnn", "filter": 3})))
    assert "'filter' was unexpected" in error.message


@pytest.mark.parametrize("plugin", BUILT_IN, ids=lambda plugin: f"{plugin.kind}-{plugin.name}")
def test_every_plugin_is_there_with_its_options(schema: Any, plugin: registry.Plugin) -> None:
    section = "data" if plugin.kind == "dataset" else plugin.kind
    if section not in schema["$defs"]:
        pytest.skip("no block of a config names it")
    (block,) = [block for block in blocks(schema, section) if plugin.name in block["properties"]["name"]["enum"]]
    assert block["description"]
    for option in describe_options(registry.load(plugin.kind, plugin.name)):
        found = block["properties"][option.name]
        assert found["description"] == option.description
        assert ("default" in found) == (option.default != "required")
        assert (option.name in block["required"]) == (option.default == "required")


def test_all_of_torchs_parts_are_there(schema: Any) -> None:
    for name, known in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        names = [name for block in blocks(schema, name) for name in block["properties"]["name"]["enum"]]
        assert sorted(names) == sorted(known)


def test_core_s_own_options_are_described(schema: Any) -> None:
    for name in ("TrainConfig", "PhaseSettings", "Recipe", "MixupCutmix"):
        block = schema["$defs"][name]
        assert "Args" not in block["description"]
        assert all(option.get("description") for option in block["properties"].values()), name


def test_a_plugin_without_a_schema_is_left_out_and_named() -> None:
    class Untyped(Head):
        def __init__(self, features, out_features, *, size=1) -> None: ...  # type: ignore[no-untyped-def]

    class Odd(Head):
        def __init__(self, features: Any, out_features: int, *, shape: Callable[[], int] | None = None) -> None: ...

    register("head", "untyped")(Untyped)
    register("head", "odd")(Odd)
    whole, problems = config_schema()
    assert sorted(problem.message.partition(":")[0] for problem in problems) == [
        "option 'size' of Untyped has no type",
        "the options of head 'odd' have no JSON Schema",
    ]
    assert jsonschema.Draft202012Validator(whole).is_valid(config())


def test_the_command_writes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "transfer", "schema", "--output", "schema.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("schema.json\n", "")
    jsonschema.Draft202012Validator.check_schema(json.loads((tmp_path / "schema.json").read_text(encoding="utf-8")))
