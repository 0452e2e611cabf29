"""What plugins say of themselves, read from source files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from transfer.registry import entry_points as registry
from transfer.registry.entry_points import Plugin
from transfer.registry.listing import description, problem

HEAD = '''
"""A module."""
raise RuntimeError("imported")

class Loud(Base):
    """Shouts.

    Args:
        size: How loud.
    """

def command():
    """Does something."""

made = make()
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a package that cannot be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "loud_package"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("from .inner.parts import Loud as Passed\nraise RuntimeError", encoding="utf-8")
    (folder / "inner/__init__.py").write_text("raise RuntimeError", encoding="utf-8")
    (folder / "inner/parts.py").write_text(HEAD, encoding="utf-8")
    (folder / "inner/wrong.py").write_text("x = 1\nclass Loud(:\n", encoding="utf-8")
    (folder / "inner/open.py").write_text("from somewhere import *\n", encoding="utf-8")
    return folder


def plugin(target: str) -> Plugin:
    return Plugin("head", "loud", "loud-package", "1.0", target)


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("loud_package.inner.parts:Loud", "Shouts."),
        ("loud_package:Passed", "Shouts."),
        ("loud_package.inner.parts:command", "Does something."),
        ("loud_package.inner.parts:made", ""),
        ("loud_package.inner.wrong:Loud", ""),
        ("loud_package.nowhere:Loud", ""),
        ("nowhere_at_all:Loud", ""),
    ],
)
@pytest.mark.usefixtures("package")
def test_the_description_is_read_from_the_source(target: str, line: str) -> None:
    assert description(plugin(target)) == line
    assert not any(name.startswith("loud_package") for name in sys.modules)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("loud_package.nowhere:Loud", "there is no module 'loud_package.nowhere'"),
        ("nowhere_at_all:Loud", "there is no module 'nowhere_at_all'"),
        ("loud_package.inner.parts:Quiet", "loud_package.inner.parts defines no 'Quiet'"),
        ("loud_package.inner.wrong:Loud", "wrong.py:2: invalid syntax"),
    ],
)
@pytest.mark.usefixtures("package")
def test_problems_are_listed_without_import(target: str, message: str) -> None:
    found = problem(plugin(target))
    assert found is not None
    assert found.message.endswith(message)
    assert found.fix == "reinstall or update loud-package"


@pytest.mark.parametrize(
    "target",
    [
        "loud_package.inner.parts:Loud",
        "loud_package:Passed",
        "loud_package.inner.parts:made",
        "loud_package.inner.open:Anything",
        "math:sqrt",
    ],
)
@pytest.mark.usefixtures("package")
def test_what_may_be_there_is_no_problem(target: str) -> None:
    assert problem(plugin(target)) is None


def test_built_in_plugins_have_description_and_no_problem() -> None:
    installed = [plugin for plugin in registry.plugins() if plugin.distribution == "transferkit"]
    assert [plugin.name for plugin in installed if not description(plugin)] == []


def test_reading_descriptions_imports_nothing() -> None:
    code = (
        "import sys; from transfer.registry.entry_points import plugins\n"
        "from transfer.registry.listing import description, problem\n"
        "for plugin in plugins(): description(plugin), problem(plugin)\n"
        "assert not {'torch', 'transfer_text', 'transfer_vision', 'transfer.heads'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
