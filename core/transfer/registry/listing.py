"""Descriptions and problems of installed plugins, read from their source files without importing them."""

from __future__ import annotations

import ast
import importlib.util
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from transfer.errors import Problem
from transfer.registry.entry_points import IN_PROCESS, Plugin, plugins
from transfer.registry.requirements import CORE_DISTRIBUTION

_MAX_STEPS = 5
"""Maximum number of re-exports that are followed from module to module."""


@dataclass(frozen=True)
class Entry:
    """A plugin in the list of installed plugins.

    Args:
        plugin: The plugin as its distribution declares it.
        description: One-line description.
        problem: Reason that it cannot be loaded, as far as that is visible without importing it.
    """

    plugin: Plugin
    description: str
    problem: Problem | None


def catalog(reserved: Collection[str] = ()) -> list[Entry]:
    """Return every installed plugin and every subcommand of a package, without importing any.

    Args:
        reserved: Command names that plugins cannot use.
    """
    installed = [*plugins(), *plugins("command")]
    # A class that a script registers may replace a plugin on purpose, so it is no second claim.
    claims = Counter((plugin.kind, plugin.name) for plugin in installed if plugin.distribution != IN_PROCESS)
    entries = []
    for plugin in installed:
        wrong = plugin.unavailable or problem(plugin)
        if wrong is None and claims[plugin.kind, plugin.name] > 1 and plugin.distribution != CORE_DISTRIBUTION:
            fix = "uninstall one" if plugin.kind == "command" else f"write {plugin.qualified_name!r} in a config"
            wrong = Problem("more than one distribution claims the name", fix=fix)
        if wrong is None and plugin.kind == "command" and plugin.name in reserved:
            wrong = Problem("transfer has a command of that name", fix=f"ask {plugin.distribution} to choose another")
        entries.append(Entry(plugin, description(plugin), wrong))
    return entries


def description(plugin: Plugin) -> str:
    """Return the first line of the docstring of a plugin's class or function; empty if the source contains none."""
    if plugin.distribution == IN_PROCESS:
        return ""
    module, _, name = plugin.target.partition(":")
    try:
        return _first_line(module, name, _MAX_STEPS)
    except (SyntaxError, OSError, UnicodeDecodeError, ValueError):
        return ""


def problem(plugin: Plugin) -> Problem | None:
    """Return the reason that a plugin cannot be loaded, as far as it is visible without importing it."""
    if plugin.distribution == IN_PROCESS:
        return None
    module, _, name = plugin.target.partition(":")
    fix = f"reinstall or update {plugin.distribution}"
    spec = _find(module)
    if spec is None:
        return Problem(f"there is no module {module!r}", fix=fix)
    if not _is_source(spec):
        return None
    try:
        tree = _tree(str(spec.origin))
    except SyntaxError as error:
        return Problem(f"{spec.origin}:{error.lineno}: {error.msg}", fix=fix)
    except (OSError, ValueError) as error:
        return Problem(f"{spec.origin} cannot be read: {error}", fix=fix)
    if name.partition(".")[0] not in _names(tree) and not _is_open(tree):
        return Problem(f"{module} defines no {name!r}", fix=fix)
    if plugin.kind == "command" and (missing := _missing_package(tree, module, name)) is not None:
        return Problem(
            f"it needs the package {missing}, which is not part of this installation",
            fix=f"reinstall the complete distribution: pip install --force-reinstall --no-deps {plugin.distribution}",
        )
    return None


def _missing_package(tree: ast.Module, module: str, name: str) -> str | None:
    """Return the package of the distribution that a function imports and that does not exist, if there is one.

    A command imports its implementation when it runs, from a package that may have been deleted.
    """
    top = f"{module.partition('.')[0]}."
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    imports = (node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom))
    for imported in imports:
        package = ".".join((imported.module or "").split(".")[:2])
        if not imported.level and package.startswith(top) and _find(package) is None:
            return package
    return None


def _find(module: str) -> ModuleSpec | None:
    """Find a module without importing it or its parent packages."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # imports nothing for a name without a dot
        for name in inner:
            if spec is None or spec.submodule_search_locations is None:
                return None
            top = f"{top}.{name}"
            spec = PathFinder.find_spec(top, spec.submodule_search_locations)
    except (ImportError, ValueError):
        return None
    return spec


def _is_source(spec: ModuleSpec) -> bool:
    return spec.origin is not None and spec.origin.endswith(".py")


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"), file)


def _first_line(module: str, name: str, steps: int) -> str:
    spec = _find(module)
    if spec is None or not _is_source(spec):
        return ""
    for node in _tree(str(spec.origin)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
        if isinstance(node, ast.ImportFrom) and steps:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _first_line(_absolute(node, spec), alias.name, steps - 1)
    return ""


def _absolute(node: ast.ImportFrom, spec: ModuleSpec) -> str:
    """Return the absolute name of the module in an import statement."""
    written = "." * node.level + (node.module or "")
    package = spec.name if spec.submodule_search_locations is not None else spec.name.rpartition(".")[0]
    return importlib.util.resolve_name(written, package)


def _names(tree: ast.Module) -> Iterator[str]:
    """Yield every name that the top level of a module may define."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from ((alias.asname or alias.name).partition(".")[0] for alias in aliases)
            case ast.Name(id=name, ctx=ast.Store()):
                yield name


def _is_open(tree: ast.Module) -> bool:
    """Return whether a module may define names that its source does not contain."""
    star = any(alias.name == "*" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names)
    return (
        star
        or "__getattr__" in _names(tree)
        or any(
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("globals", "vars", "setattr")
            for node in ast.walk(tree)
        )
    )
