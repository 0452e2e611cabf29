"""Compatibility of datasets, backbones, heads and tasks by their declarations, without data, weights or memory."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from transfer.config.option_schema import Block, options_model
from transfer.errors import ConfigError, PluginError, Problem, UserError
from transfer.interfaces import Backbone
from transfer.registry import entry_points
from transfer.registry.entry_points import Kind

Variants = Mapping[str, Any]
"""Declaration of a plugin by variant: its defaults (``""``), or another value of one option (``readout: sequence``)."""


MAX_OPTIONS = 3
"""Maximum number of options that a message names."""


@dataclass(frozen=True)
class Table:
    """Compatibility of the plugins of two kinds.

    Args:
        title: Title of the table.
        cells: Compatibility by the names of both plugins: ``yes``, the option that makes them compatible, or an empty
            string.
    """

    title: str
    cells: Mapping[str, Mapping[str, str]]


def compatibility_tables() -> tuple[list[Table], list[Problem]]:
    """Return the tables of all installed plugins, and the problems of plugins that are left out."""
    problems: list[Problem] = []
    datasets = _declared("dataset", lambda cls: _variants(cls, lambda dataset: dataset.spec), problems)
    backbones = _declared(
        "backbone", lambda cls: _variants(cls, lambda backbone: (backbone.fields, backbone.features.layout)), problems
    )
    heads = _declared("head", lambda cls: {"": cls.layouts}, problems)
    tasks = _declared("task", lambda cls: {"": cls.targets}, problems)
    tables = [
        _table(
            "datasets and the backbones that take their fields",
            datasets,
            backbones,
            lambda data, backbone: set(backbone[0]) <= set(data.fields),
        ),
        _table(
            "datasets and the tasks that learn their target",
            datasets,
            tasks,
            lambda data, targets: data.target in targets,
        ),
        _table(
            "backbones and the heads that take their layout of features",
            backbones,
            heads,
            lambda backbone, layouts: backbone[1] in layouts,
        ),
    ]
    return tables, problems


def _declared(kind: Kind, declare: Callable[[type[Any]], Variants], problems: list[Problem]) -> dict[str, Variants]:
    """Return the declarations of all plugins of a kind by name."""
    declarations = {}
    installed = entry_points.plugins(kind)
    names = [plugin.name for plugin in installed]
    for plugin in installed:
        name = plugin.name if names.count(plugin.name) == 1 else plugin.qualified_name
        try:
            declarations[name] = declare(entry_points.load(kind, plugin.qualified_name))
        except UserError as error:
            problems += (replace(problem, where=problem.where or f"{kind} {name!r}") for problem in error.problems)
        except Exception as error:  # a plugin's constructor may raise anything, which must not hide the other plugins
            problems.append(Problem(f"{kind} {name!r} cannot be built: {type(error).__name__}: {error}"))
    return declarations


def _variants(cls: type[Any], declare: Callable[[Any], Any]) -> Variants:
    """Build each variant of a plugin on the meta device, and return their declarations."""
    variants = {}
    with torch.device("meta"):  # no memory is allocated for weights
        for label, options in _options(cls):
            try:
                variants[label] = declare(cls(**options))
            except Exception as error:  # a constructor may raise anything for a placeholder
                if not label and options:
                    raise _depends_on_options(options) from error
                if not label and isinstance(error, ConfigError):  # none is required, but one of several must be set
                    raise _depends_on_options(options_model(cls, Block).model_fields) from error
                # A variant that is refused is left out: its value may need other options as well.
                if not (label and isinstance(error, UserError | ValueError | TypeError)):
                    raise
    return variants


def _options(cls: type[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the options of each variant: the defaults, and every other value of each option that is a choice.

    Required options get a placeholder. The constructor of a dataset reads nothing, so that any file name is accepted.
    A text in the options of a backbone usually names an architecture, which its constructor may look up in a network.
    """
    fields = options_model(cls, Block).model_fields
    is_backbone = issubclass(cls, Backbone)
    required = {
        name: _placeholder(name, field.annotation, text=not is_backbone)
        for name, field in fields.items()
        if field.is_required()
    }
    yield "", required
    for name, field in fields.items():
        for value in _choices(field.annotation):
            if value != field.default:
                yield f"{name}: {value if isinstance(value, str) else json.dumps(value)}", {**required, name: value}


def _placeholder(name: str, annotation: Any, *, text: bool) -> Any:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    if text and str in (typing.get_args(annotation) if is_union else (annotation,)):
        return name
    choices = list(_choices(annotation))
    if not choices:
        raise _depends_on_options([name])
    return choices[0]


def _depends_on_options(options: Iterable[str]) -> PluginError:
    names = list(map(repr, options))
    what = f"option {' and '.join(names)}" if len(names) <= MAX_OPTIONS else "its options"
    return PluginError(f"the declaration depends on {what}", fix="check a config: transfer check CONFIG")


def _choices(annotation: Any) -> Iterator[Any]:
    """Yield the values of all literals in an annotation."""
    if typing.get_origin(annotation) is Literal:
        yield from typing.get_args(annotation)
    else:
        for member in typing.get_args(annotation):
            yield from _choices(member)


def _table(
    title: str, rows: Mapping[str, Variants], columns: Mapping[str, Variants], fits: Callable[[Any, Any], bool]
) -> Table:
    cells = {row: {column: _cell(rows[row], columns[column], fits) for column in columns} for row in rows}
    return Table(title, cells)


def _cell(row: Variants, column: Variants, fits: Callable[[Any, Any], bool]) -> str:
    """Return ``yes``, the first options that make the two compatible, or an empty string."""
    for row_label, row_declaration in row.items():
        for column_label, column_declaration in column.items():
            if fits(row_declaration, column_declaration):
                return ", ".join(filter(None, (row_label, column_label))) or "yes"
    return ""
