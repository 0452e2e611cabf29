"""Plugins by name, found through entry points and imported only when asked for by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from transfer.errors import PluginError, Problem, nearest
from transfer.registry.requirements import CORE_DISTRIBUTION, unmet

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

Kind = str
KINDS: tuple[Kind, ...] = ("dataset", "backbone", "head", "task")
"""Core's own; plugins bring others (see :func:`kinds`)."""

_T = TypeVar("_T", bound=type)

OLD_DISTRIBUTION = "transfer"
"""The name of this distribution in run folders of version 0.1; on the package index it is another project."""


@dataclass(frozen=True)
class Plugin:
    """A plugin as its distribution declares it; nothing of it has been imported.

    Args:
        kind: What it plugs in as.
        name: What a config calls it.
        distribution: The installed package that brings it, or ``"(registered)"`` for ``@register``.
        version: That package's version.
        target: ``module:attribute``.
        extras: The extras of its distribution without which it cannot be imported.
    """

    kind: Kind
    name: str
    distribution: str
    version: str
    target: str
    extras: tuple[str, ...] = ()

    @property
    def qualified_name(self) -> str:
        """``distribution:name``, which a config uses when two distributions claim one name."""
        return f"{self.distribution}:{self.name}"

    @property
    def requirement(self) -> str:
        """What pip is to install to have exactly this plugin: ``distribution[extra]==version``; empty in-process."""
        if self.distribution == IN_PROCESS:
            return ""
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        distribution = CORE_DISTRIBUTION if self.distribution == OLD_DISTRIBUTION else self.distribution
        return f"{distribution}{extras}=={self.version}"

    @property
    def unavailable(self) -> Problem | None:
        """Why it cannot be loaded here and what to do about it, from its distribution's requirements; None: it can."""
        return None if self.distribution == IN_PROCESS else unmet(self.distribution, self.extras)


IN_PROCESS = "(registered)"
_registered: dict[tuple[Kind, str], type] = {}


def register(kind: Kind, name: str) -> Callable[[_T], _T]:
    """Register a class under a name for this process: for notebooks, scripts and tests.

    A package registers through an entry point instead, in the group ``transfer.datasets`` and so on for each kind.

    Raises:
        PluginError: The kind is unknown, the class is not of that kind, or the name is taken by another class.
    """
    if kind not in (known_kinds := kinds()):
        raise PluginError(f"there is no kind of plugin called {kind!r}", available=known_kinds)

    def decorate(cls: _T) -> _T:
        _check(cls, kind, name, IN_PROCESS)
        known = _registered.get((kind, name))
        # A notebook cell that is run again defines the same class anew; only a different class is a collision.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PluginError(
                f"{kind} {name!r} is already registered by {known.__module__}.{known.__qualname__}",
                fix="register it under another name",
            )
        _registered[kind, name] = cls
        return cls

    return decorate


def kinds() -> tuple[Kind, ...]:
    """Return every kind of plugin: core's own, then those that plugins bring.

    A plugin that offers a choice of its own (tokenizers) declares the kind by an entry point in ``transfer.kinds``,
    which names the class that all plugins of the kind derive from.
    """
    return (*KINDS, *sorted({entry_point.name for entry_point in _declared("kind")} - set(KINDS)))


def plugins(kind: Kind | None = None) -> list[Plugin]:
    """List every plugin (of one kind) by kind and name, without importing any."""
    found = [
        Plugin(k, name, IN_PROCESS, "", f"{cls.__module__}:{cls.__qualname__}")
        for (k, name), cls in _registered.items()
        if kind in (None, k)
    ]
    order = kinds() if kind is None else (kind,)
    for k in order:
        found += [_describe(k, entry_point) for entry_point in _declared(k)]
    return sorted(found, key=lambda p: (order.index(p.kind), p.name, p.distribution))


def find(kind: Kind, name: str) -> Plugin:
    """Return the one plugin that ``name`` or ``distribution:name`` means, without importing it.

    Raises:
        PluginError: No plugin has that name (the nearest ones are listed), or two distributions claim it.
    """
    if name.startswith(f"{OLD_DISTRIBUTION}:"):
        name = f"{CORE_DISTRIBUTION}:{name.removeprefix(f'{OLD_DISTRIBUTION}:')}"
    candidates = [p for p in plugins(kind) if name in (p.name, p.qualified_name)]
    registered = [p for p in candidates if p.distribution == IN_PROCESS]
    if registered:  # what this very process registers was meant to be used
        return registered[0]
    if not candidates:
        names = sorted({p.name for p in plugins(kind)})
        close = nearest(name, names)
        raise PluginError(
            f"there is no {kind} called {name!r}",
            available=names,
            fix=f"did you mean {close!r}?" if close else f"install the package that brings {kind} {name!r}",
        )
    candidates = core_first(candidates)
    if len(candidates) > 1:
        raise PluginError(
            f"{kind} {name!r} is claimed by {' and '.join(f'{p.distribution} {p.version}' for p in candidates)}",
            available=[p.qualified_name for p in candidates],
            fix=f"write {candidates[0].qualified_name!r} to say which one",
        )
    return candidates[0]


def core_first(candidates: list[Plugin]) -> list[Plugin]:
    """Return core's own plugin if it is among the candidates for one name, otherwise all candidates.

    A package that claims the name of a built-in plugin can thus not change what existing configs mean.
    """
    return [plugin for plugin in candidates if plugin.distribution == CORE_DISTRIBUTION] or candidates


def load(kind: Kind, name: str) -> type[Any]:
    """Import the one plugin that ``name`` means, and no other, and return its class.

    Raises:
        PluginError: As :func:`find`; or what it requires is not installed; or the import fails (the cause is kept); or
            the class is not of that kind.
    """
    plugin = find(kind, name)
    if plugin.distribution == IN_PROCESS:
        return _registered[kind, plugin.name]
    cls = import_target(plugin)
    _check(cls, kind, plugin.name, origin(plugin))
    return cls  # type: ignore[no-any-return]  # _check has just made sure of it


def origin(plugin: Plugin) -> str:
    """Say where a plugin is declared, for messages."""
    return f"entry point {plugin.name} = {plugin.target} of {plugin.distribution} {plugin.version}"


def import_target(plugin: Plugin) -> Any:
    """Import what a plugin's entry point names, whatever it is.

    Raises:
        PluginError: What it requires is not installed, or the import fails (the cause is kept).
    """
    if (why := plugin.unavailable) is not None:
        raise PluginError(
            f"{plugin.kind} {plugin.name!r} cannot be loaded: {why.message}", where=origin(plugin), fix=why.fix
        )
    try:
        return metadata.EntryPoint(plugin.name, plugin.target, _group(plugin.kind)).load()
    # A plugin's module may raise anything at all while it is imported; whatever it is must name the plugin.
    except Exception as error:
        raise PluginError(
            f"{plugin.kind} {plugin.name!r} cannot be imported: {type(error).__name__}: {error}",
            where=origin(plugin),
            fix=f"reinstall or update {plugin.distribution}, or choose another {plugin.kind}",
        ) from error


def _base(kind: Kind) -> type[Any]:
    """Return the class that plugins of a kind derive from."""
    if kind not in KINDS:
        return import_target(find("kind", kind))  # type: ignore[no-any-return]
    from transfer import interfaces  # torch is imported by whoever loads a plugin, not by whoever lists them

    bases = (interfaces.Dataset, interfaces.Backbone, interfaces.Head, interfaces.Task)
    return dict(zip(KINDS, bases, strict=True))[kind]


def _check(cls: Any, kind: Kind, name: str, where: str) -> None:
    base = _base(kind)
    base_name = f"{'transfer' if kind in KINDS else base.__module__}.{base.__name__}"
    derived = isinstance(cls, type) and issubclass(cls, base)
    if not derived:
        raise PluginError(
            f"{kind} {name!r} is {cls!r}, which is no subclass of {base_name}",
            where=where,
            fix=f"derive it from {base_name}",
        )
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise PluginError(
            f"{kind} {name!r} does not define {', '.join(missing)}",
            where=where,
            fix=f"define what {base_name} asks for",
        )


def _describe(kind: Kind, entry_point: EntryPoint) -> Plugin:
    name, version = _name_and_version(entry_point.dist)
    target = entry_point.value.partition("[")[0].rstrip()
    return Plugin(kind, entry_point.name, name, version, target, tuple(entry_point.extras))


@cache  # each look at a distribution's name reads all of its metadata
def _name_and_version(distribution: Distribution | None) -> tuple[str, str]:
    return (distribution.name, distribution.version) if distribution else ("(unknown)", "")


def _group(kind: Kind) -> str:
    """Return the group of a kind's entry points: its plural."""
    return f"transfer.{kind.removesuffix('s')}s"


def _declared(kind: Kind) -> list[EntryPoint]:
    # A distribution found twice on sys.path (an editable install beside a build folder) declares the same entry twice.
    found = _entry_points().get(_group(kind), ())
    return list({(e.name, e.value, _name_and_version(e.dist)[0]): e for e in found}.values())


@cache
def _entry_points() -> dict[str, tuple[EntryPoint, ...]]:
    """Return the entry points of all kinds by group, in one pass over the metadata of all that is installed."""
    everything = metadata.entry_points()
    groups = (group for group in everything.groups if group.startswith("transfer."))
    return {group: tuple(everything.select(group=group)) for group in groups}


# What plugins that offer choices of their own need, by names that say what they are outside this module.
find_plugin = find
load_plugin = load
