"""Installed packages that classes, modules and files of code belong to."""

from __future__ import annotations

import functools
import platform
import site
import sys
import sysconfig
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import transfer

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the flag that types written in C as static structures lack
FRAMEWORK = "transfer"
_PYTHON = "python"


def library_of_class(cls: type) -> str | None:
    """Return the installed package that defines a class; None of the user's own code and that of plugins."""
    # `__module__` is a claim that any class can make: it is believed if the name leads back to the class.
    module = sys.modules.get(cls.__module__)
    value: Any = module
    for name in cls.__qualname__.split("."):
        value = getattr(value, name, None)
    if value is cls and module is not None:
        return library_of_module(module)
    # Its name leads elsewhere: it was defined in a function or by exec, where __module__ may be anything, or is static.
    return None if cls.__flags__ & _HEAP_TYPE else _PYTHON


def library_of_module(module: types.ModuleType) -> str | None:
    """Return the installed package that a module belongs to; None of the user's own code and that of plugins."""
    path = getattr(module, "__file__", None)
    if path is not None:
        return library_of_path(path)
    top = module.__name__.partition(".")[0]
    return _PYTHON if top in sys.stdlib_module_names and top != "__main__" else None


@functools.cache
def library_of_path(path: str) -> str | None:
    """Return the installed package that a file of code belongs to; None of the user's own code and that of plugins."""
    if path.startswith("<frozen "):
        return _PYTHON
    if path.startswith("<"):  # a notebook's cell, exec, code that dataclasses and others generate
        return None
    for root, library in _roots():
        if path.startswith(root):
            if library is not None:
                return library
            top = path[len(root) :].partition("/")[0].partition(".")[0]
            return None if top in _plugin_packages() or version_of(top) is None else top
    return None


@functools.cache
def _roots() -> tuple[tuple[str, str | None], ...]:
    """Return folders of code and the package that they contain, None for a folder of packages; the first match wins."""
    named = {FRAMEWORK: transfer} | {name: sys.modules.get(name) for name in ("torch", "torchvision", "numpy")}
    roots: list[tuple[Path, str | None]] = [
        (Path(module.__file__).parent, name)
        for name, module in named.items()
        if module is not None and module.__file__ is not None
    ]
    paths = sysconfig.get_paths()
    packages = {paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()}
    roots += [(Path(folder), None) for folder in sorted(packages)]
    roots += [(Path(paths[name]), _PYTHON) for name in ("stdlib", "platstdlib")]
    # Code may have been imported through a link or not.
    return tuple((f"{path}/", library) for root, library in roots for path in {root: 0, root.resolve(): 0})


@functools.cache
def _plugin_packages() -> frozenset[str]:
    """Return the import names of the packages that declare plugins: their code counts, installed or not."""
    installed = metadata.entry_points()
    groups = [group for group in installed.groups if group.startswith("transfer.")]
    points = [point for group in groups for point in installed.select(group=group)]
    return frozenset(point.value.partition(":")[0].partition(".")[0] for point in points) - {FRAMEWORK}


@functools.cache
def version_of(library: str) -> str | None:
    """Return the version of an installed package or of Python; None if it is not installed."""
    if library == _PYTHON:
        return f"{platform.python_implementation()} {platform.python_version()}"
    try:
        return metadata.version(library)
    except (metadata.PackageNotFoundError, ValueError):
        version = getattr(sys.modules.get(library), "__version__", None)
        return None if version is None else str(version)
