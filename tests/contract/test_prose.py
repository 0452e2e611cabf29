"""Docstrings that users read without the class around them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "core").glob("**/*.py"), *(ROOT / "plugins").glob("**/*.py")])
DANGLING = ("Of ", "As ", "Its ", "What ", "Which ", "Whose ", "The same", "Likewise")
"""A sentence that starts so needs the line or the class before it; `transfer show` and the schema show it alone."""


def argument_entries(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the line of the docstring, the name and the description of each entry under ``Args:``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", ast.get_docstring(node) or "", re.MULTILINE | re.DOTALL)
        for entry in re.finditer(r"^    ([\w*, ]+): (.+)$", section[1] if section else "", re.MULTILINE):
            yield node.lineno, entry[1], entry[2]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_argument_description_is_self_contained(file: Path) -> None:
    dangling = [
        f"{file}:{line}: {name}: {text}" for line, name, text in argument_entries(file) if text.startswith(DANGLING)
    ]
    assert not dangling, "\n".join(dangling)


def test_argument_entries_are_found() -> None:
    assert sum(1 for file in FILES for _ in argument_entries(file)) > 500
