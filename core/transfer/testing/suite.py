"""The contracts of a distribution's plugins, or of one plugin."""

from __future__ import annotations

import unittest
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from transfer.config.option_schema import Block, options_model
from transfer.errors import ConfigError, PluginError, unknown_name
from transfer.registry.entry_points import Plugin, import_target, load, plugins
from transfer.testing import (
    backbones,
    components,
    configs as config_files,
    datasets,
    freezing,
    heads,
    inputs,
    samplers,
    tasks,
    weights,
)
from transfer.testing.cases import Case, ConfigCase, Contract, ContractError, Promise

Options = Mapping[str, Any]

_OF_KIND: Mapping[str, Sequence[ModuleType]] = {
    "dataset": (components, datasets),
    "backbone": (components, backbones, inputs, weights, freezing),
    "head": (components, heads),
    "task": (components, tasks),
    "sampler": (components, samplers),
}


def contracts(
    distribution: str,
    options: Mapping[str, Options | Sequence[Options]] | None = None,
    *,
    values: Mapping[str, Sequence[Any]] | None = None,
    sources: Mapping[str, Sequence[str]] | None = None,
    configs: Iterable[str | Path] = (),
) -> list[Contract]:
    """Return every contract of every plugin of an installed distribution; nothing is imported yet.

    Plugins whose extra is not installed are left out.

    Args:
        distribution: Name of the distribution, as in ``pip list``.
        options: Options to test each plugin with, by plugin name: one mapping or several. Small values keep the tests
                fast. Default: the plugin's own defaults.
        values: Four or more different raw values of a backbone's field, by plugin name.
        sources: Arguments of the command line that the preprocessing of a backbone reads (paths of files, or texts), by
                plugin name.
        configs: Paths of the config files in the package.

    Raises:
        PluginError: The distribution has no plugins, or none with a name in ``options``, ``values`` or ``sources``.
    """
    options, values, sources = options or {}, values or {}, sources or {}
    mine = [plugin for plugin in plugins() if plugin.distribution == distribution]
    if not mine:
        available = sorted({plugin.distribution for plugin in plugins()})
        fix = "install it (pip install --editable .), and declare its plugins under [project.entry-points]"
        raise PluginError(f"no plugin of {distribution!r} is installed", available=available, fix=fix)
    names = sorted({plugin.name for plugin in mine})
    for name in {**options, **values, **sources}:
        if name not in names:
            fix = "give the name of an entry point"
            raise PluginError.of([unknown_name(f"plugin of {distribution}", name, names, fix=fix)])
    collected: list[Contract] = []
    for plugin in mine:
        if plugin.extras and plugin.unavailable:
            continue
        # One mapping is one case; a sequence of mappings is one case each.
        given = options.get(plugin.name, {})
        for block in [given] if isinstance(given, Mapping) else given:
            name = plugin.name
            case = Case(plugin.kind, plugin.qualified_name, block, values.get(name), sources.get(name))
            collected += contracts_of(case)
    return collected + [p.of(ConfigCase(Path(path))) for path in configs for p in _promises([config_files])]


def contracts_of(case: Case) -> list[Contract]:
    """Return every contract of one plugin with some options."""
    return [promise.of(case) for promise in _promises(_OF_KIND.get(case.kind, (components,)))]


def quick_check(plugin: Plugin) -> tuple[int, list[str]]:
    """Load a plugin with its default options and check its quick contracts.

    If an option is required, only the contracts that do not depend on options are checked.

    Returns:
        The number of contracts that it keeps, and the failures.
    """
    if plugin.kind not in _OF_KIND:
        try:
            import_target(plugin)
        except PluginError as error:
            return 0, [str(error)]
        return 1, []
    case = Case(plugin.kind, plugin.qualified_name)
    passed, failures, depends_on_options = 0, [], None
    for number, promise in enumerate(_promises(_OF_KIND[plugin.kind])):
        if promise.cost != "quick":
            continue
        if promise.written not in _ANY_OPTIONS:
            if depends_on_options is None:
                depends_on_options = _needs_options(case)
            if depends_on_options:
                continue
        try:
            promise.of(case).check()
            passed += 1
        except unittest.SkipTest:
            continue
        except ContractError as error:
            failures.append(str(error))
            if not number:  # it cannot be imported, so the other contracts cannot be checked
                break
    return passed, failures


_ANY_OPTIONS = {promise.written for promise in vars(components).values() if isinstance(promise, Promise)}


def _needs_options(case: Case) -> bool:
    fields = options_model(load(case.kind, case.name), Block).model_fields
    if any(field.is_required() for field in fields.values()):
        return True
    if case.kind != "dataset":
        return False
    try:
        case.component().make()
    except ConfigError:  # no option is required, but one of several must be set
        return True
    except Exception:
        return False  # the contracts report it
    return False


def _promises(modules: Iterable[ModuleType]) -> list[Promise]:
    return [value for module in modules for value in vars(module).values() if isinstance(value, Promise)]
