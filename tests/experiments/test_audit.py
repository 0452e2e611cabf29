"""Audits of data: wrong labels, near duplicates, outliers, and the file that leaves examples out."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Dense, Points

import transfer
from transfer import Data, Split, UserError, register
from transfer.cli.experiment_commands import audit as audit_command

needs_cleanlab = pytest.mark.skipif(find_spec("cleanlab") is None, reason="cleanlab is not installed")

WRONG = ("train-3", "train-40", "train-77")
TWIN, LEAKED, FAR = "train-10", "test-5", "train-60"


class Pretrained(Dense):
    """Pretrained weights pass the coordinates of a point on."""

    def load_pretrained(self) -> dict[str, Any]:
        with torch.no_grad():
            for stage in self.stages:
                stage[0].weight.copy_(torch.eye(*stage[0].weight.shape))
                stage[0].bias.fill_(4.0)
        return {"weights": "coordinates"}


class Flawed(Points):
    """Two distant clouds with three wrong labels, a repeated point, one that is also in the test split, and a far one.

    Args:
        classes: Number of classes of the training split.
    """

    def __init__(self, *, classes: int = 2) -> None:
        super().__init__(count=200, distance=3.0)
        self.classes = classes

    def load(self) -> Data:
        splits = {}
        for name, split in super().load().splits.items():
            points, targets = [list(point) for point in split.fields["point"]], split.targets.copy()
            names = [f"{name}-{index}" for index in range(len(targets))]
            splits[name] = points, targets, names
        points, targets, names = splits["train"]
        for wrong in WRONG:
            targets[names.index(wrong)] ^= 1
        points[names.index(TWIN)] = list(points[8])
        targets[names.index(TWIN)] = targets[8]
        points[names.index(FAR)] = [3.9, -3.9, 3.9, -3.9]
        other = splits["test"]
        other[0][5], other[1][5] = list(points[20]), targets[20]
        return Data(self.spec, {n: Split({"point": p}, t, m) for n, (p, t, m) in splits.items()})


@pytest.fixture
def flawed(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config of the flawed data."""
    register("backbone", "coordinates")(Pretrained)
    register("dataset", "flawed")(Flawed)
    return config | {"data": {"name": "flawed", "validation": 0.2}, "backbone": {"name": "coordinates"}}


@needs_cleanlab
def test_audit_finds_wrong_labels_duplicates_and_outliers(flawed: dict[str, Any], tmp_path: Path) -> None:
    audited = transfer.audit(flawed, similarity=0.9999)
    by_name = {finding.name: finding for finding in audited.findings}
    labels = {name for name, finding in by_name.items() if "label" in finding.issues}
    assert set(WRONG) <= labels
    assert len(labels) <= 6
    assert by_name[WRONG[0]].label != by_name[WRONG[0]].suggested
    assert "duplicate" in by_name[TWIN].issues
    assert by_name[TWIN].duplicate_of.endswith("train-8")
    assert "leak" in by_name[LEAKED].issues
    assert not by_name[LEAKED].exclude  # the test split is never changed
    assert by_name["train-20"].exclude
    assert by_name[TWIN].exclude != by_name["train-8"].exclude
    assert "outlier" in by_name[FAR].issues
    assert audited.accuracy > 0.9
    audited.write_csv(tmp_path / "audit.csv")
    with (tmp_path / "audit.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [finding.name for finding in audited.findings]


def test_excluded_examples_are_left_out_of_training_and_validation_only(flawed: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "audit.csv"
    path.write_text("name,exclude\ntrain-3,yes\ntrain-40,no\ntest-5,yes\ntrain-77,yes\n")
    before = transfer.run(flawed, output=tmp_path / "before").summary["examples"]
    after = transfer.run(flawed, [f"data.exclude={path}"], output=tmp_path / "after").summary["examples"]
    assert sum(after.values()) == sum(before.values()) - 2
    assert after["test"] == before["test"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("example,exclude\ntrain-3,yes\n", "no column name"),
        ("name,exclude\ntrain-3,perhaps\n", "exclude is wrong: expected yes or no, got 'perhaps'"),
        ("name,exclude\nnobody,yes\n", "the data has no example nobody"),
        (None, "cannot be read"),
    ],
    ids=["column", "decision", "example", "file"],
)
def test_wrong_list_of_excluded_examples_is_refused(
    flawed: dict[str, Any], tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "audit.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        transfer.run(flawed, [f"data.exclude={path}"], output=tmp_path)


@needs_cleanlab
def test_data_with_numbers_is_refused(config: dict[str, Any]) -> None:
    numbers = config | {"data": config["data"] | {"target": "number"}, "task": {"name": "regression"}}
    with pytest.raises(UserError, match="expected one class per example"):
        transfer.audit(numbers)


@needs_cleanlab
@pytest.mark.parametrize("similarity", [0.0, 1.5, np.nan])
def test_wrong_similarity_is_refused(flawed: dict[str, Any], similarity: float) -> None:
    with pytest.raises(UserError, match="the similarity is wrong"):
        transfer.audit(flawed, similarity=similarity)


@needs_cleanlab
def test_of_three_near_duplicates_one_remains(flawed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    load = Flawed.load

    def with_triplet(self: Flawed) -> Data:
        data = load(self)
        points = list(data.splits["train"].fields["point"])
        points[30] = points[31] = points[32] = points[33]
        train = data.splits["train"]
        return Data(data.spec, {**data.splits, "train": Split({"point": points}, train.targets, train.names)})

    monkeypatch.setattr(Flawed, "load", with_triplet)
    audited = transfer.audit(flawed, similarity=0.9999)
    names = {f"train-{number}" for number in range(30, 34)}
    duplicates = [finding for finding in audited.findings if finding.name in names and "duplicate" in finding.issues]
    assert len(duplicates) == 4
    assert sum(not finding.exclude for finding in duplicates if "label" not in finding.issues) <= 1


def test_file_of_an_earlier_audit_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reviewed = tmp_path / "mine-audit.csv"
    reviewed.write_text("name,exclude\n")
    with pytest.raises(UserError, match="the file exists"):
        audit_command("mine.yaml")
    assert reviewed.read_text() == "name,exclude\n"
