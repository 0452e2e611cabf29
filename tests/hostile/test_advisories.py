"""The audit of the lower bounds, without a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / ".ci" / "audit.py"
SPEC = importlib.util.spec_from_file_location("audit", FILE)
assert SPEC is not None
assert SPEC.loader is not None
audit = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(audit)


@pytest.mark.parametrize("requirement", ["pillow", "Pillow>=10.0", "pillow>=9,<11", "pillow[xmp]==10.0.0"])
def test_audit_refuses_versions_with_known_holes(requirement: str) -> None:
    (problem,) = audit.problems("# a comment\npillow 12.3.0 CVE-1 CVE-2\n", ["numpy", requirement])
    assert problem.endswith("expected at least 12.3.0 (CVE-1 CVE-2)")


def test_audit_accepts_this_repository() -> None:
    assert audit.main() == 0
