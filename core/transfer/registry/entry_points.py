"""Plugins by name, found through entry points. Only the plugin that is used is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from transfer.errors import PluginError, Problem, unknown_name
from transfer.registry.requirements import CORE_DISTRIBUTION, unmet

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

Kind = str
KINDS: tuple[Kind, ...] = ("dataset", "backbone", "head", "task")
"""The kinds of core; plugins can add others (see :func:`kinds`)."""

_T = TypeVar("_T", bound=type)

OLD_DISTRIBUTION = "transfer"
"""Name of this distribution in run folders of version 0.1. On the package index it is another project."""


@dataclass(frozen=True)
class Plugin:
    """A plugin as its distribution declares it, before anything is imported.

    Args:
        kind: Kind of the plugin (``backbone``).
        name: Name of the plugin in a config.
        distribution: Installed package that contains the plugin, or ``"(registered)"`` for ``@register``.
        version: Version of the distribution.
        target: Import path, ``module:attribute``.
        extras: Extras of the distribution without which the plugin cannot be imported.
    """

    kind: Kind
    name: str
    distribution: str
    version: str
    target: str
    extras: tuple[str, ...] = ()

    @property
    def qualified_name(self) -> str:
        """``distribution:name``, which selects one of several distributions that claim the same name."""
        return f"{self.distribution}:{self.name}"

    @property
    def requirement(self) -> str:
        """Requirement to install exactly this plugin: ``distribution[extra]==version``; empty for ``@register``."""
        if self.distribution == IN_PROCESS:
            return ""
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        distribution = CORE_DISTRIBUTION if self.distribution == OLD_DISTRIBUTION else self.distribution
        return f"{distribution}{extras}=={self.version}"

    @property
    def unavailable(self) -> Problem | None:
        """Reason that the plugin cannot be loaded, from its distribution's requirements; None if it can be loaded."""
        return None if self.distribution == IN_PROCESS else unmet(self.distribution, self.extras)


IN_PROCESS = "(registered)"
_registered: dict[tuple[Kind, str], type] = {}


def register(kind: Kind, name: str) -> Callable[[_T], _T]:
    """Register a class under a name in this process: for notebooks, scripts and tests.

    A package uses an entry point instead, in the group ``transfer.datasets`` for datasets and so on.

    Raises:
        PluginError: The kind is unknown, the class is not of that kind, or the name is taken by another class.
    """
    if kind not in (known_kinds := kinds()):
        raise PluginError.of([unknown_name("kind of plugin", kind, known_kinds)])

    def decorate(cls: _T) -> _T:
        _check(cls, kind, name, IN_PROCESS)
        registered = _registered.get((kind, name))
        # Running a notebook cell again defines the same class again; only another class is a collision.
        if registered is not None and _full_name(registered) != _full_name(cls):
            raise PluginError(
                f"{kind} {name!r} is already registered by {_full_name(registered)}",
                fix="register it under another name",
            )
        _registered[kind, name] = cls
        return cls

    return decorate


def kinds() -> tuple[Kind, ...]:
    """Return every kind of plugin: those of core, then those of plugins.

    A plugin with a choice of its own (tokenizers) declares the kind by an entry point in ``transfer.kinds``. Its target
    is the base class of all plugins of that kind.
    """
    return (*KINDS, *sorted({entry_point.name for entry_point in _declared("kind")} - set(KINDS)))


def plugins(kind: Kind | None = None) -> list[Plugin]:
    """Return every plugin, optionally of one kind, by kind and name, without importing any."""
    listed = [
        Plugin(k, name, IN_PROCESS, "", f"{cls.__module__}:{cls.__qualname__}")
        for (k, name), cls in _registered.items()
        if kind in (None, k)
    ]
    order = kinds() if kind is None else (kind,)
    for k in order:
        listed += [_describe(k, entry_point) for entry_point in _declared(k)]
    return sorted(listed, key=lambda p: (order.index(p.kind), p.name, p.distribution))


def find(kind: Kind, name: str) -> Plugin:
    """Return the plugin called ``name`` or ``distribution:name``, without importing it.

    Raises:
        PluginError: No plugin has that name, or two distributions claim it.
    """
    # Runs of version 0.1 recorded the old name of the distribution.
    if name.startswith(f"{OLD_DISTRIBUTION}:"):
        name = f"{CORE_DISTRIBUTION}:{name.removeprefix(f'{OLD_DISTRIBUTION}:')}"
    candidates = [p for p in plugins(kind) if name in (p.name, p.qualified_name)]
    registered = [p for p in candidates if p.distribution == IN_PROCESS]
    if registered:  # what this process registers takes precedence
        return registered[0]
    if not candidates:
        fix = f"install the package that contains {kind} {name!r}"
        raise PluginError.of([unknown_name(kind, name, {p.name for p in plugins(kind)}, fix=fix)])
    candidates = core_first(candidates)
    if len(candidates) > 1:
        raise PluginError(
            f"{kind} {name!r} is claimed by {' and '.join(f'{p.distribution} {p.version}' for p in candidates)}",
            available=[p.qualified_name for p in candidates],
            fix=f"write {candidates[0].qualified_name!r} to choose one",
        )
    return candidates[0]


def core_first(candidates: list[Plugin]) -> list[Plugin]:
    """Return core's plugin if it is among the candidates for one name, and otherwise all candidates.

    A package that claims the name of a built-in plugin thus cannot change the meaning of existing configs.
    """
    return [plugin for plugin in candidates if plugin.distribution == CORE_DISTRIBUTION] or candidates


def load(kind: Kind, name: str) -> type[Any]:
    """Import one plugin and return its class; no other plugin is imported.

    Raises:
        PluginError: :func:`find` or :func:`import_target` fails, or the target is no class of that kind.
    """
    plugin = find(kind, name)
    if plugin.distribution == IN_PROCESS:
        return _registered[kind, plugin.name]
    cls = import_target(plugin)
    _check(cls, kind, plugin.name, origin(plugin))
    return cls  # type: ignore[no-any-return]  # _check has just made sure of it


def origin(plugin: Plugin) -> str:
    """Return the declaration of a plugin, for messages."""
    return f"entry point {plugin.name} = {plugin.target} of {plugin.distribution} {plugin.version}"


def import_target(plugin: Plugin) -> Any:
    """Import the target of a plugin's entry point, whatever its type.

    Raises:
        PluginError: A requirement is not installed, or the import fails (the cause is kept).
    """
    if (why := plugin.unavailable) is not None:
        raise PluginError(
            f"{plugin.kind} {plugin.name!r} cannot be loaded: {why.message}", where=origin(plugin), fix=why.fix
        )
    try:
        return metadata.EntryPoint(plugin.name, plugin.target, _group(plugin.kind)).load()
    # A plugin's module may raise any exception on import. The message must name the plugin in all cases.
    except Exception as error:
        raise PluginError(
            f"{plugin.kind} {plugin.name!r} cannot be imported: {type(error).__name__}: {error}",
            where=origin(plugin),
            fix=f"reinstall or update {plugin.distribution}, or choose another {plugin.kind}",
        ) from error


def _base(kind: Kind) -> type[Any]:
    """Return the base class of all plugins of a kind."""
    if kind not in KINDS:
        return import_target(find("kind", kind))  # type: ignore[no-any-return]
    from transfer import interfaces  # here, because listing plugins must not import torch

    bases = (interfaces.Dataset, interfaces.Backbone, interfaces.Head, interfaces.Task)
    return dict(zip(KINDS, bases, strict=True))[kind]


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _public_name(cls: type) -> str:
    """Return the shortest import path of a class: ``transfer.Head`` for ``transfer.interfaces.head.Head``."""
    parts = cls.__module__.split(".")
    packages = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    public = (package for package in packages if getattr(sys.modules.get(package), cls.__name__, None) is cls)
    return f"{next(public, cls.__module__)}.{cls.__name__}"


def _check(cls: Any, kind: Kind, name: str, where: str) -> None:
    base = _base(kind)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(
            f"{kind} {name!r} is {cls!r}, which is no subclass of {_public_name(base)}",
            where=where,
            fix=f"derive it from {_public_name(base)}",
        )
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise PluginError(
            f"{kind} {name!r} does not define {', '.join(missing)}",
            where=where,
            fix=f"define every abstract method of {_public_name(base)}",
        )
    # The check of a config reads these attributes from the class, before an object exists.
    attribute = {"head": "layouts", "task": "targets"}.get(kind)
    if attribute and not isinstance(value := getattr(cls, attribute, None), frozenset | set):
        raise PluginError(
            f"the class attribute {attribute} of {kind} {name!r} is {value!r}: expected a frozenset",
            where=where,
            fix=f"write {attribute} = frozenset({{...}}) in the class {cls.__name__}",
        )


def _describe(kind: Kind, entry_point: EntryPoint) -> Plugin:
    name, version = _name_and_version(entry_point.dist)
    target = entry_point.value.partition("[")[0].rstrip()
    return Plugin(kind, entry_point.name, name, version, target, tuple(entry_point.extras))


@cache  # reading a distribution's name parses all of its metadata
def _name_and_version(distribution: Distribution | None) -> tuple[str, str]:
    return (distribution.name, distribution.version) if distribution else ("(unknown)", "")


def _group(kind: Kind) -> str:
    """Return the entry point group of a kind, which is its plural."""
    return f"transfer.{kind.removesuffix('s')}s"


def _declared(kind: Kind) -> list[EntryPoint]:
    # A distribution that is twice on sys.path (an editable install and a build folder) declares the same entry twice.
    entry_points = _entry_points().get(_group(kind), ())
    return list({(e.name, e.value, _name_and_version(e.dist)[0]): e for e in entry_points}.values())


@cache
def _entry_points() -> dict[str, tuple[EntryPoint, ...]]:
    """Return the entry points of all kinds by group, in one pass over the metadata of all distributions."""
    everything = metadata.entry_points()
    groups = (group for group in everything.groups if group.startswith("transfer."))
    return {group: tuple(everything.select(group=group)) for group in groups}


# Public names of these functions, for plugins that have choices of their own.
find_plugin = find
load_plugin = load
