"""Check that the lower bounds in pyproject.toml and the pins in constraints.txt are versions without known holes."""

from __future__ import annotations

import sys
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def problems(advisories: str, requirements: list[str]) -> list[str]:
    """Return a line for each requirement that admits a version with a known vulnerability.

    Args:
        advisories: Content of ``advisories.txt``.
        requirements: Requirements as in pyproject.toml or a constraints file.
    """
    rows = [line.split(maxsplit=2) for line in advisories.splitlines() if line.strip() and not line.startswith("#")]
    first = {canonicalize_name(name): (Version(version), reasons) for name, version, reasons in rows}
    lines = []
    for requirement in map(Requirement, requirements):
        fixed, reasons = first.get(canonicalize_name(requirement.name), (None, ""))
        if fixed is None:
            continue
        lower = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==", "~=")]
        if not lower or max(lower) < fixed:
            lines.append(f"{requirement}: expected at least {fixed} ({reasons})")
    return lines


def main() -> int:
    """Print the problems of this repository; return the exit status."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    pins = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
    advisories = Path(__file__).with_name("advisories.txt").read_text(encoding="utf-8")
    lines = problems(advisories, requirements + pins)
    for line in lines:
        print(line)  # noqa: T201
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
