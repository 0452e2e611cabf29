"""Import rules that import-linter (``[tool.importlinter]`` in pyproject.toml) does not express."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "transfer"
PLUGINS = ROOT / "plugins"
HEAVY = ("torch", "numpy", "pydantic")
LIGHT_MODULES = (
    "transfer",
    "transfer.errors",
    "transfer.cli.app",
    "transfer.cli.report_commands",
    "transfer.cli.experiment_commands",
    "transfer.cli.deployment_commands",
    "transfer.config.yaml_document",
    "transfer.registry.entry_points",
    "transfer.registry.listing",
    "transfer.registry.requirements",
    "transfer.registry.scaffold",
    "transfer.system.downloads",
    "transfer.system.ranks",
)


def imports(file: Path) -> Iterator[tuple[int, str, str | None]]:
    """Yield line, module and imported name (None for ``import module``) of each import."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, str(node.module), alias.name) for alias in node.names)


def plugin_files() -> list[Path]:
    return sorted(PLUGINS.glob("*/transfer_*/**/*.py"))


def test_core_root_contains_only_three_modules() -> None:
    assert {path.name for path in CORE.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}


def test_core_does_not_import_pytest() -> None:
    for file in CORE.glob("**/*.py"):
        assert not any(source.split(".")[0] == "pytest" for _, source, _ in imports(file)), file


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_module_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


@pytest.mark.parametrize("file", plugin_files(), ids=lambda file: str(file.relative_to(PLUGINS)))
def test_plugin_imports_only_public_names(file: Path) -> None:
    import transfer

    for line, source, name in imports(file):
        if source.split(".")[0] == "transfer":
            assert source == "transfer", f"{file}:{line}: import {name} from transfer itself"
            assert name in transfer.__all__, f"{file}:{line}: {name} is not a public name of transfer"


def test_both_plugins_are_checked() -> None:
    assert {file.relative_to(PLUGINS).parts[0] for file in plugin_files()} >= {"vision", "text"}
