"""The contracts of a distribution's plugins, or of one plugin."""

from __future__ import annotations

import unittest
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from transfer.config.option_schema import Block, options_model
from transfer.errors import PluginError, nearest
from transfer.registry.entry_points import Plugin, import_target, load, plugins
from transfer.testing import backbones, components, datasets, freezing, heads, tasks
from transfer.testing import configs as config_files
from transfer.testing.cases import Case, ConfigCase, Contract, ContractError, Promise

Options = Mapping[str, Any]

_OF_KIND: Mapping[str, Sequence[ModuleType]] = {
    "dataset": (components, datasets),
    "backbone": (components, backbones, freezing),
    "head": (components, heads),
    "task": (components, tasks),
}


def contracts(
    distribution: str,
    options: Mapping[str, Options | Sequence[Options]] | None = None,
    *,
    values: Mapping[str, Sequence[Any]] | None = None,
    configs: Iterable[str | Path] = (),
) -> list[Contract]:
    """Return every contract of every plugin that an installed distribution registers; nothing is imported yet.

    A plugin that needs an extra is left out where that is not installed.

    Args:
        distribution: Its name, as ``pip list`` has it.
        options: By plugin name, the options to try it with (small ones, so that its tests are fast), or several such;
            by default its own defaults.
        values: By plugin name, for a backbone: four or more raw values of its field which differ.
        configs: Paths of the config files that the package ships.

    Raises:
        PluginError: It registers nothing, or has no plugin of a name that ``options`` or ``values`` gives.
    """
    options, values = options or {}, values or {}
    mine = [plugin for plugin in plugins() if plugin.distribution == distribution]
    if not mine:
        available = sorted({plugin.distribution for plugin in plugins()})
        fix = "install it (pip install --editable .), and declare its plugins under [project.entry-points]"
        raise PluginError(f"no plugin of {distribution!r} is installed", available=available, fix=fix)
    names = sorted({plugin.name for plugin in mine})
    for name in {**options, **values}:
        if name not in names:
            close = nearest(name, names)
            fix = f"did you mean {close!r}?" if close else "give the name of an entry point"
            raise PluginError(f"{distribution} has no plugin called {name!r}", available=names, fix=fix)
    found: list[Contract] = []
    for plugin in mine:
        if plugin.extras and plugin.unavailable:
            continue
        given = options.get(plugin.name, {})
        for block in [given] if isinstance(given, Mapping) else given:
            found += contracts_of(Case(plugin.kind, plugin.qualified_name, block, values.get(plugin.name)))
    return found + [p.of(ConfigCase(Path(path))) for path in configs for p in _promises([config_files])]


def contracts_of(case: Case) -> list[Contract]:
    """Return every contract of one plugin with some options."""
    return [promise.of(case) for promise in _promises(_OF_KIND.get(case.kind, (components,)))]


def quick_check(plugin: Plugin) -> tuple[int, list[str]]:
    """Load a plugin with its defaults and check its quick contracts.

    Where an option is required, only what holds for any options is checked.

    Returns:
        How many contracts it keeps, and what is wrong.
    """
    if plugin.kind not in _OF_KIND:
        try:
            import_target(plugin)
        except PluginError as error:
            return 0, [str(error)]
        return 1, []
    case = Case(plugin.kind, plugin.qualified_name)
    kept, wrong = 0, []
    for number, promise in enumerate(_promises(_OF_KIND[plugin.kind])):
        if promise.cost != "quick" or (promise.written not in _ANY_OPTIONS and _needs_options(case)):
            continue
        try:
            promise.of(case).check()
            kept += 1
        except unittest.SkipTest:
            continue
        except ContractError as error:
            wrong.append(str(error))
            if not number:  # it cannot be imported
                break
    return kept, wrong


_ANY_OPTIONS = {promise.written for promise in vars(components).values() if isinstance(promise, Promise)}


def _needs_options(case: Case) -> bool:
    fields = options_model(load(case.kind, case.name), Block).model_fields
    return any(field.is_required() for field in fields.values())


def _promises(modules: Iterable[ModuleType]) -> list[Promise]:
    return [value for module in modules for value in vars(module).values() if isinstance(value, Promise)]
