"""Plugins that a run has recorded: a run is read with the same distributions, and changes of them are reported."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from transfer.config.check import load_config
from transfer.config.component import Component
from transfer.config.run_config import RunConfig
from transfer.errors import PluginError, Problem, RunError
from transfer.models.model_json import DESCRIPTION
from transfer.registry import entry_points
from transfer.registry.entry_points import IN_PROCESS, OLD_DISTRIBUTION, Kind, Plugin
from transfer.registry.requirements import CORE_DISTRIBUTION, install_hint
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import read_json

SECTIONS: Mapping[str, Kind] = {"data": "dataset", **{kind: kind for kind in ("backbone", "head", "task", "adapter")}}
"""Kind of plugin by section of a config."""


def record(components: Iterable[Component]) -> dict[str, dict[str, Any]]:
    """Return the plugin and the code of each component by kind, as JSON values."""
    return {one.kind: {**asdict(one.plugin), "code": code_digest(one.cls)} for one in components}


def code_digest(cls: type) -> str | None:
    """Return a digest of the source of a class and of its base classes in the same package.

    Comments, formatting and docstrings do not count. None if there is no source, as in an interactive session.
    """
    package = cls.__module__.partition(".")[0]
    digest = hashlib.sha256()
    for base in cls.__mro__:
        # The version of another package represents the code of its base classes.
        if base.__module__.partition(".")[0] != package:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
                # Replaced instead of removed, because a body may not be empty.
                node.body[0] = ast.Pass()
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def resolve(kind: Kind, name: str, recorded: object) -> str:
    """Return the name under which a plugin of a run is found: with the distribution that the run recorded.

    Args:
        kind: Kind of the plugin.
        name: Name in the config of the run.
        recorded: Record of the plugin (:func:`record`). Anything else, as in runs of older versions, changes nothing.

    Raises:
        RunError: The plugin is not installed. Another distribution with a plugin of that name is not used.
    """
    plugin = _plugin(recorded)
    if plugin is None:
        return name
    try:
        distribution = entry_points.find(kind, name).distribution
    except PluginError:
        distribution = ""  # unknown, or claimed by several distributions
    # The name is kept if it means the recorded plugin, so that a resumed run writes the same config. What this process
    # registers takes precedence, and a class that a run had registered may be part of a package by now.
    if distribution and (distribution == _distribution(plugin) or IN_PROCESS in (distribution, plugin.distribution)):
        return name
    qualified = f"{_distribution(plugin)}:{name.rpartition(':')[2]}"
    try:
        entry_points.find(kind, qualified)
    except PluginError as error:
        fix = install_hint(plugin.requirement, "register it first, as the training script did")
        available = tuple(sorted({p.name for p in entry_points.plugins(kind)}))
        raise RunError.of([Problem(f"unknown {kind} {name!r}", None, available, fix)]) from error
    return qualified


def load_run_config(directory: RunDirectory) -> RunConfig:
    """Check the config of a run, without its trackers, with the plugins that it recorded.

    Raises:
        RunError: The config cannot be read, or a plugin is not installed.
        ConfigError: The config has problems.
    """
    return load_config(run_config(directory))


def run_config(directory: RunDirectory, *, trackers: bool = False) -> dict[str, Any]:
    """Return the config of a run as nested dicts, with the names of the plugins that it recorded.

    Args:
        directory: Run directory.
        trackers: Whether to include the trackers. Only training needs them; elsewhere they may not be installed.

    Raises:
        RunError: The config cannot be read, or a plugin is not installed.
    """
    plain = directory.config(trackers=trackers)
    recorded = recorded_plugins(directory)
    for section, kind in SECTIONS.items():
        block = plain.get(section)
        if isinstance(block, dict) and isinstance(block.get("name"), str):
            plain[section] = {**block, "name": resolve(kind, block["name"], recorded.get(kind))}
    return plain


def recorded_plugins(directory: RunDirectory) -> dict[str, Any]:
    """Return the records of a run's plugins by kind; empty if there are none."""
    # environment.json also records the dataset; a copied model folder only has model.json.
    for file in (directory.path / "environment.json", directory.model / DESCRIPTION):
        try:
            recorded = read_json(file, "").get("plugins")
        except RunError:
            continue
        if isinstance(recorded, dict):
            return recorded
    return {}


def changes_note(lines: Iterable[str]) -> str:
    """Return the sentence about the plugins that have changed since a run (:func:`changes`)."""
    return f"plugins have changed since the run, so results may differ: {'; '.join(lines)}"


def changes(recorded: Mapping[str, Any], current: Iterable[Component], *, versions: bool = True) -> list[str]:
    """Return a line for each plugin whose version or code differs from the record.

    Args:
        recorded: Records by kind.
        current: Components that are used now.
        versions: Whether to compare versions too. False if they are compared with the environment.
    """
    lines = []
    for component in current:
        before, plugin = _plugin(recorded.get(component.kind)), component.plugin
        name = f"{component.kind} {plugin.name!r}"
        if before is None:
            continue
        was, now = (f"{_distribution(p)} {p.version}".rstrip() for p in (before, plugin))
        code = recorded[component.kind].get("code")
        if was != now:
            lines += [f"{name}: {was} -> {now}"] if versions else []
        # Code of core changes with its version, which is compared with the environment.
        elif plugin.distribution != CORE_DISTRIBUTION and code and code != code_digest(component.cls):
            lines.append(f"the code of {name} has changed")
    return lines


def _distribution(plugin: Plugin) -> str:
    return CORE_DISTRIBUTION if plugin.distribution == OLD_DISTRIBUTION else plugin.distribution


def _plugin(recorded: object) -> Plugin | None:
    """Return the plugin of a record; None if it is none, because the file was edited or is of an older version."""
    if not isinstance(recorded, dict):
        return None
    names = [field.name for field in fields(Plugin) if field.name != "extras"]
    if not all(isinstance(recorded.get(name), str) for name in names):
        return None
    return Plugin(**{name: recorded[name] for name in names}, extras=tuple(map(str, recorded.get("extras") or ())))
