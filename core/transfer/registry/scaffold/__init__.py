"""Scaffold of a plugin package, from the template in this folder: a backbone, a dataset, a config and tests."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from string import Template

from transfer.errors import UserError
from transfer.registry.entry_points import plugins
from transfer.registry.requirements import CORE_DISTRIBUTION

_CORE_MODULES = ("transfer_text", "transfer_vision")
_FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "config.yaml": "$module.yaml",
    "plugins.py": "transfer_$module/__init__.py",
    "signal.txt": "tests/signal.txt",
    "test_contracts.py": "tests/test_contracts.py",
}


def new_plugin(name: str, folder: str | Path = ".", *, version: str) -> Path:
    """Write a package that installs, passes its own tests and trains on generated data.

    Args:
        name: Name of the plugin. The distribution is called ``transfer-NAME`` and its module ``transfer_NAME``.
        folder: Parent folder of the package's folder.
        version: Version of transfer for which the package is written.

    Returns:
        The package's folder.

    Raises:
        UserError: The name is no valid package name, or the folder exists.
    """
    short = re.sub(r"[-_.]+", "-", name.lower()).removeprefix("transfer-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short):
        fix = "use letters, digits and hyphens, and start with a letter"
        raise UserError(f"{name!r} is no valid package name", fix=fix)
    _refuse_taken(short.replace("-", "_"))
    target = Path(folder) / f"transfer-{short}"
    if target.exists():
        raise UserError(f"{target} exists", fix="choose another name, or another folder with --output")
    names = {
        "name": short,
        "module": short.replace("-", "_"),
        "Class": "".join(part.capitalize() for part in short.split("-")),
        "transfer": _compatible(version),
    }
    template = resources.files(__package__) / "template"
    for source, written in _FILES.items():
        path = target / Template(written).substitute(names)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (template / f"{source}.template").read_text(encoding="utf-8")
        path.write_text(Template(text).substitute(names), encoding="utf-8")
    return target


def _refuse_taken(module: str) -> None:
    """Refuse a name of which the module, or a plugin in the template, would collide with one of core's.

    Core's plugins win if a name is claimed twice, so that the new plugin would not be found by its name.
    """
    core = {plugin.name for plugin in plugins() if plugin.distribution == CORE_DISTRIBUTION}
    taken = sorted({module, f"{module}_cnn", f"{module}_waves"} & core)
    if taken:
        raise UserError(f"{CORE_DISTRIBUTION} has a plugin called {taken[0]!r}", fix="choose another name")
    if f"transfer_{module}" in _CORE_MODULES:
        raise UserError(f"{CORE_DISTRIBUTION} has a module transfer_{module}", fix="choose another name")


def _compatible(version: str) -> str:
    """Return the requirement on transfer: from this version to the next that may change a contract."""
    major, minor = (int(part) for part in version.split(".")[:2])
    next_breaking = f"{major + 1}" if major else f"0.{minor + 1}"
    return f"{CORE_DISTRIBUTION}>={version},<{next_breaking}"
