"""Imports run one way: read from the syntax trees, so that an import inside a function counts too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "transfer"
PLUGINS = ROOT / "plugins"

# Each module may import those that stand before it, and no other.
ORDER = (
    "errors",
    "launch",
    "memory",
    "statistics",
    "new_plugin",
    "interruption",
    "processes",
    "files",
    "document",
    "interfaces",
    "splits",
    "targets",
    "tables",
    "requirements",
    "registry",
    "catalogue",
    "schema",
    "precision",
    "settings",
    "recipes",
    "heads",
    "tasks",
    "trackers",
    "chain",
    "model",
    "freezing",
    "events",
    "run_directory",
    "checkpoint",
    "description",
    "earlier_run",
    "loading",
    "mixing",
    "feature_cache",
    "optim",
    "config",
    "json_schema",
    "matrix",
    "training_state",
    "fusion",
    "engine",
    "batch_size",
    "build",
    "terminal",
    "console",
    "plan",
    "model_folder",
    "reload",
    "model_card",
    "export_formats",
    "exporting",
    "explaining",
    "reporting",
    "tracking",
    "workflow",
    "several",
    "comparison",
    "value",
    "sweeping",
    "looking",
    "serving",
    "learning_rate",
    "testing",
    "subcommands",
    "cli",
    "__main__",
)


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without what stands under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and _is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from _nodes(other)
            continue
        yield child
        yield from _nodes(child)


def imports(file: Path) -> Iterator[tuple[int, str, str | None]]:
    """Yield line, module and imported name (None for ``import module``) of each import."""
    for node in _nodes(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, str(node.module), alias.name) for alias in node.names)


def modules_of_core() -> list[str]:
    modules = (path for path in CORE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
    return sorted(path.stem for path in modules if path.stem != "__init__")


def files_of(module: str) -> list[Path]:
    """Return the file of a module, or those of a package."""
    return sorted((CORE / module).glob("*.py")) or [CORE / f"{module}.py"]


def sources_of_plugins() -> list[Path]:
    return sorted(PLUGINS.glob("*/transfer_*/**/*.py"))


def test_every_module_of_core_has_a_place() -> None:
    assert set(modules_of_core()) <= set(ORDER)


@pytest.mark.parametrize("module", modules_of_core())
def test_core_imports_run_one_way(module: str) -> None:
    before = ORDER[: ORDER.index(module)]
    for file in files_of(module):
        own = {module} if file.parent != CORE else set()
        for line, source, name in imports(file):
            if source == "transfer" and name is not None:
                source = f"transfer.{name}"
            if source.startswith("transfer."):
                assert source.split(".")[1] in {*before, *own}, f"{file}:{line}: {module} stands below {source}"


@pytest.mark.parametrize("module", ["__init__", *modules_of_core()])
def test_core_imports_no_plugin(module: str) -> None:
    for file in files_of(module):
        for line, source, _ in imports(file):
            assert not source.startswith("transfer_"), f"{file}:{line}: core knows no plugin"


def test_nothing_but_pytest_itself_imports_pytest() -> None:
    for file in (file for module in modules_of_core() for file in files_of(module)):
        assert not any(source.split(".")[0] == "pytest" for _, source, _ in imports(file)), file


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "requirements",
        "registry",
        "catalogue",
        "subcommands",
        "files",
        "document",
        "new_plugin",
        "cli",
        "__init__",
    ],
)
def test_the_light_modules_import_no_torch_at_the_top(module: str) -> None:
    tree = ast.parse(files_of(module)[0].read_text(encoding="utf-8"))
    heavy = {
        "torch",
        "numpy",
        "pydantic",
        "transfer.interfaces",
        "transfer.config.option_schema",
        "transfer.runs.train",
    }
    for node in tree.body:
        if isinstance(node, ast.Import):
            assert not heavy & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in heavy


@pytest.mark.parametrize("file", sources_of_plugins(), ids=lambda file: str(file.relative_to(PLUGINS)))
def test_plugins_import_public_names_alone(file: Path) -> None:
    import transfer

    own = file.relative_to(PLUGINS).parts[1]
    for line, source, name in imports(file):
        package = source.split(".")[0]
        if package == "transfer":
            assert source == "transfer", f"{file}:{line}: import {name} from transfer itself"
            assert name in transfer.__all__, f"{file}:{line}: {name} is no public name of transfer"
        elif package.startswith("transfer_"):
            assert package == own, f"{file}:{line}: a plugin imports no other plugin"


def test_there_are_plugins_to_check() -> None:
    assert {file.relative_to(PLUGINS).parts[0] for file in sources_of_plugins()} >= {"vision", "text"}
