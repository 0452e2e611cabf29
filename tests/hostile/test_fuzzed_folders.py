"""Damaged folders of every kind: a command accepts or refuses them in words. ``make fuzz`` makes a longer search."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import folder_fuzzer

MUTATIONS = 4
"""Mutations of each kind of folder; they are always the same ones."""


@pytest.mark.parametrize("kind", folder_fuzzer.KINDS)
def test_damaged_folder_is_accepted_or_refused(kind: str, tmp_path: Path) -> None:
    if kind == "sweep":
        pytest.importorskip("optuna")
    scene = folder_fuzzer.Scene(kind, tmp_path)
    scene.build()
    outcomes = {number: scene.attack(number) for number in range(MUTATIONS)}
    assert {number: failure for number, (_, failure) in outcomes.items() if failure is not None} == {}


# Found by longer searches.
@pytest.mark.parametrize(("kind", "number"), [("export", 7), ("export", 21)])
def test_damaged_folder_of_an_earlier_failure_is_refused(kind: str, number: int, tmp_path: Path) -> None:
    scene = folder_fuzzer.Scene(kind, tmp_path)
    scene.build()
    assert scene.attack(number) == ("refused", None)
