"""Which datasets, backbones, heads and tasks fit together, by what they declare: no data, no weights, no memory."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from transfer.config.option_schema import Block, options_model
from transfer.errors import PluginError, Problem, UserError
from transfer.registry import entry_points
from transfer.registry.entry_points import Kind

Variants = Mapping[str, Any]
"""What a plugin declares with its defaults (``""``), and with another value of one option (``readout: sequence``)."""


@dataclass(frozen=True)
class Table:
    """Which of two kinds fit together.

    Args:
        title: What fits what.
        rows, columns: Names of plugins.
        cells: By row and column: ``yes``, the option that makes them fit, or nothing.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[str, Mapping[str, str]]


def compatibility_tables() -> tuple[list[Table], list[Problem]]:
    """Return what fits together of all that is installed, and what had to be left out and why."""
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
    """Ask every plugin of a kind what it declares."""
    found = {}
    installed = entry_points.plugins(kind)
    names = [plugin.name for plugin in installed]
    for plugin in installed:
        name = plugin.name if names.count(plugin.name) == 1 else plugin.qualified_name
        try:
            found[name] = declare(entry_points.load(kind, plugin.qualified_name))
        except UserError as error:
            problems += (replace(problem, where=problem.where or f"{kind} {name!r}") for problem in error.problems)
        except Exception as error:  # whatever a plugin's constructor raises must not hide the others
            problems.append(Problem(f"{kind} {name!r} cannot be built: {type(error).__name__}: {error}"))
    return found


def _variants(cls: type[Any], declared: Callable[[Any], Any]) -> Variants:
    """Build a plugin in every variant, under the meta device, and ask each what it declares."""
    found = {}
    with torch.device("meta"):
        for label, options in _options(cls):
            try:
                found[label] = declared(cls(**options))
            except Exception as error:  # whatever a constructor raises on what was filled in
                if not label and options:
                    raise _depends(options) from error
                if not (label and isinstance(error, UserError | ValueError | TypeError)):
                    raise  # another value may want other options beside it
    return found


def _options(cls: type[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a plugin's defaults, and its options with each other value of those that are a choice of a few.

    What is required is filled in: a constructor reads nothing, so that any name of a file will do.
    """
    fields = options_model(cls, Block).model_fields
    required = {name: _filler(name, field.annotation) for name, field in fields.items() if field.is_required()}
    yield "", required
    for name, field in fields.items():
        for value in _choices(field.annotation):
            if value != field.default:
                yield f"{name}: {value if isinstance(value, str) else json.dumps(value)}", {**required, name: value}


def _filler(name: str, annotation: Any) -> Any:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    if str in (typing.get_args(annotation) if is_union else (annotation,)):
        return name
    choices = list(_choices(annotation))
    if not choices:
        raise _depends([name])
    return choices[0]


def _depends(options: Iterable[str]) -> PluginError:
    names = " and ".join(map(repr, options))
    return PluginError(f"what it declares depends on its option {names}", fix="transfer check CONFIG tells what fits")


def _choices(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Literal:
        yield from typing.get_args(annotation)
    else:
        for member in typing.get_args(annotation):
            yield from _choices(member)


def _table(
    title: str, rows: Mapping[str, Variants], columns: Mapping[str, Variants], fits: Callable[[Any, Any], bool]
) -> Table:
    cells = {row: {column: _cell(rows[row], columns[column], fits) for column in columns} for row in rows}
    return Table(title, tuple(rows), tuple(columns), cells)


def _cell(row: Variants, column: Variants, fits: Callable[[Any, Any], bool]) -> str:
    """Return ``yes``, the first option that makes both fit, or nothing."""
    for row_label, one in row.items():
        for column_label, other in column.items():
            if fits(one, other):
                return ", ".join(filter(None, (row_label, column_label))) or "yes"
    return ""
