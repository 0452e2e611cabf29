"""JSON Schema of a config for editors: the options of all installed plugins, selected by ``name``."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import models_json_schema

from transfer.config.check import block_base
from transfer.config.option_schema import options_model, summary
from transfer.config.run_config import RunConfigSchema
from transfer.config.torch_classes import OPTIMIZERS, RESERVED_OPTIONS, SCHEDULERS, options_set_by_framework
from transfer.config.torch_metrics import RESERVED_OPTIONS as RESERVED_METRIC_OPTIONS, torch_metrics
from transfer.config.train_settings import (
    OPTIMIZER,
    DataOptions,
    NamedBlock,
    OptimizerOptions,
    PhaseSettings,
    TaskOptions,
    TrainConfig,
)
from transfer.errors import PluginError, Problem
from transfer.interfaces import TargetKind
from transfer.registry import entry_points
from transfer.registry.entry_points import Kind

_SECTIONS: Mapping[str, tuple[Kind, type[NamedBlock]]] = {
    "data": ("dataset", DataOptions),
    "backbone": ("backbone", NamedBlock),
    "head": ("head", NamedBlock),
    "task": ("task", NamedBlock),
}
_VARIABLE = {"type": "string", "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}", "title": "from the environment"}
_NUMBERS = frozenset({"integer", "number", "boolean"})

Schema = dict[str, Any]
_Member = tuple[list[str], type[BaseModel], str]
"""Names of a plugin in a config, the model of its block, and its description."""


def config_schema() -> tuple[Schema, list[Problem]]:
    """Return the JSON Schema of a config with all installed plugins, and the problems of plugins that are left out."""
    problems: list[Problem] = []
    alternatives: dict[str, list[_Member]] = {
        section: _plugins(kind, base, problems) for section, (kind, base) in _SECTIONS.items()
    }
    alternatives["tracker"] = _plugins("tracker", NamedBlock, problems)
    alternatives["adapter"] = _plugins("adapter", NamedBlock, problems)
    alternatives["sampler"] = _plugins("sampler", NamedBlock, problems)
    alternatives["metric"] = _torch_metrics()
    torchmetrics_names = {name for names, _, _ in alternatives["metric"] for name in names}
    alternatives["metric"] += [
        member for member in _plugins("metric", NamedBlock, problems) if not torchmetrics_names & {*member[0]}
    ]
    alternatives["optimizer"] = [
        ([name], options_model(cls, OptimizerOptions, skip=RESERVED_OPTIONS), "") for name, cls in OPTIMIZERS.items()
    ]
    alternatives["optimizer"] += _plugins("optimizer", OptimizerOptions, problems, lambda _: RESERVED_OPTIONS)
    alternatives["scheduler"] = [
        (
            [name for name, other in SCHEDULERS.items() if other is cls],
            options_model(cls, NamedBlock, skip=options_set_by_framework(cls)),
            "",
        )
        for cls in dict.fromkeys(SCHEDULERS.values())
    ]
    alternatives["scheduler"] += _plugins("scheduler", NamedBlock, problems, options_set_by_framework)
    # One call for all models, so that nested blocks (PhaseSettings, Recipe) are defined once and shared.
    models: list[type[BaseModel]] = [RunConfigSchema, TrainConfig]
    models += [model for members in alternatives.values() for _, model, _ in members]
    with warnings.catch_warnings():
        # Such a default is left out of the schema, which is fine.
        warnings.filterwarnings("ignore", "Default value .* is not JSON serializable", UserWarning)
        references, shared = models_json_schema([(model, "validation") for model in models])
    definitions: Schema = shared["$defs"]
    for name, members in alternatives.items():
        choices = [(names, references[model, "validation"], description) for names, model, description in members]
        definitions[name] = _choice(definitions, choices)
    # A block without a name is that of the default optimizer.
    del definitions["optimizer"]["required"]
    for case in definitions["optimizer"]["allOf"]:
        if OPTIMIZER in case["if"]["properties"]["name"]["enum"]:
            del case["if"]["required"]
            definitions[case["then"]["$ref"].removeprefix("#/$defs/")]["required"].remove("name")
    top = _definition(definitions, references[RunConfigSchema, "validation"])
    train = _definition(definitions, references[TrainConfig, "validation"])
    phase = definitions[PhaseSettings.__name__]
    # The models declare these blocks as mappings of anything, because their options depend on the name in them.
    for block, keys in (
        (top, (*_SECTIONS, "adapter")),
        (train, ("optimizer", "scheduler", "sampler")),
        (phase, ("scheduler",)),
    ):
        for key in keys:
            block["properties"][key] = _refer(block["properties"][key], key)
    top["properties"]["trackers"]["items"] = _name_or_block(definitions, "tracker")
    for _, model, _ in alternatives["task"]:
        if issubclass(model, TaskOptions):
            task = definitions[references[model, "validation"]["$ref"].removeprefix("#/$defs/")]
            task["properties"]["metrics"]["items"] = _name_or_block(definitions, "metric")
    top["properties"]["train"] = _refer(top["properties"]["train"], TrainConfig.__name__)
    for definition in [top, *definitions.values()]:
        _allow_variables(definition)
    definitions["variable"] = _VARIABLE
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "title": "transfer config"}
    return {**head, "$defs": {name: definitions[name] for name in sorted(definitions)}}, problems


def _name_or_block(definitions: Schema, definition: str) -> Schema:
    """Return the schema of an item that is a name, or a block with options."""
    names: Schema = {"enum": definitions[definition]["properties"]["name"]["enum"]}
    return {"anyOf": [names, {"$ref": f"#/$defs/{definition}"}]}


def _torch_metrics() -> list[_Member]:
    """Return torchmetrics' metrics, each with the options that it has for any kind of target."""
    classes: dict[str, list[type[Any]]] = {}
    for target in get_args(TargetKind):
        for name, cls in torch_metrics(target).items():
            classes.setdefault(name, []).append(cls)
    members: list[_Member] = []
    for name, variants in classes.items():
        model: type[NamedBlock] = NamedBlock
        for cls in variants:
            model = options_model(cls, model, skip={*RESERVED_METRIC_OPTIONS, *model.model_fields})
        members.append(([name], model, ""))
    return members


def _plugins(
    kind: Kind,
    base: type[NamedBlock],
    problems: list[Problem],
    skip: Callable[[type[Any]], Iterable[str]] = lambda _: (),
) -> list[_Member]:
    """Return the plugins of a kind that a config can name; plugins that cannot be loaded are left out.

    Args:
        kind: Kind of the plugins.
        base: Model of the framework's own options in a block of this kind.
        problems: Problems of plugins, to which those of this kind are added.
        skip: Function from a class to the parameters that a config may not set.
    """
    installed = entry_points.plugins(kind)
    claims = Counter(plugin.name for plugin in installed)
    members: list[_Member] = []
    for plugin in installed:
        if plugin.extras and plugin.unavailable:  # extras are optional: a missing one is not a problem
            continue
        # A name that two distributions claim is valid only with its distribution.
        names = [plugin.qualified_name] if claims[plugin.name] > 1 else [plugin.name, plugin.qualified_name]
        try:
            cls = entry_points.load(kind, plugin.qualified_name)
            model = options_model(cls, block_base(kind, cls, base), skip=skip(cls))
            model.model_json_schema()
        except PluginError as error:
            problems += error.problems
        except PydanticInvalidForJsonSchema as error:
            problems.append(Problem(f"the options of {kind} {plugin.name!r} have no JSON Schema: {error}"))
        else:
            members.append((names, model, summary(cls)))
    return members


def _definition(definitions: Schema, reference: Schema) -> Schema:
    """Return the definition that a reference points to, and remove it unless another schema refers to it."""
    name = reference["$ref"].removeprefix("#/$defs/")
    return definitions[name] if name == TrainConfig.__name__ else definitions.pop(name)  # type: ignore[no-any-return]


def _choice(definitions: Schema, members: list[tuple[list[str], Schema, str]]) -> Schema:
    """Return the schema of a block that is one of several, selected by its name.

    ``if``/``then`` by name, instead of ``oneOf``, makes editors report mistakes only for the block that is named.
    """
    all_names: list[str] = []
    cases: list[Schema] = []
    for names, reference, description in members:
        member = definitions[reference["$ref"].removeprefix("#/$defs/")]
        member["properties"]["name"] = {"enum": names}
        all_names += names
        cases.append({"if": {"properties": {"name": {"enum": names}}, "required": ["name"]}, "then": reference})
        member["title"] = names[0]
        if description:
            member["description"] = description
    block = {"type": "object", "required": ["name"], "properties": {"name": {"enum": all_names}}}
    return {**block, "allOf": cases} if cases else block  # JSON Schema allows no empty list there


def _refer(option: Schema, definition: str) -> Schema:
    """Return the schema of an option as a reference to a definition, with its description, default and null kept."""
    reference: Schema = {"$ref": f"#/$defs/{definition}"}
    optional = any(member.get("type") == "null" for member in option.get("anyOf", ()))
    annotations = {key: option[key] for key in ("description", "default") if key in option}
    return annotations | ({"anyOf": [reference, {"type": "null"}]} if optional else reference)


def _allow_variables(block: Schema) -> None:
    """Allow ``${NAME}`` and ``${NAME:-default}`` as the value of options that are numbers or booleans."""
    for name, option in block.get("properties", {}).items():
        members = option.get("anyOf", [option])
        # Constants (auto) are ignored: only options that accept any text accept a variable already.
        kinds = {None if {"const", "enum"} & member.keys() else member.get("type") for member in members}
        if kinds & _NUMBERS and kinds <= _NUMBERS | {"null", None}:
            annotations = {key: option[key] for key in ("title", "description", "default") if key in option}
            bare = [{k: v for k, v in member.items() if k not in annotations} for member in members]
            block["properties"][name] = annotations | {"anyOf": [*bare, {"$ref": "#/$defs/variable"}]}
