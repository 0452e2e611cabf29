"""Cross-validation: folds, their runs, the file of predictions and the corrected interval."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transfer
from transfer import DataError, RunError, UserError
from transfer.data.splits import complete, fold_numbers
from transfer.experiments.intervals import spread_of_folds, student_quantile
from transfer.feature_cache.store import FeatureCache
from transfer.interfaces import Data, DataSpec, Split

CONFIG: dict[str, Any] = {
    "data": {"name": "mini_reviews", "limit": 30},
    "backbone": {"name": "textcnn", "vectors": "mini", "kernel_sizes": [2, 3], "filters": 4},
    "head": {"name": "linear"},
    "task": {"name": "classification"},
    "train": {"batch_size": 16, "report": False, "phases": [{"epochs": 1, "freeze": "backbone"}]},
}


def split_of(targets: Any, groups: Any = None) -> Split:
    names = [f"example-{index}" for index in range(len(targets))]
    return Split({"x": names}, np.asarray(targets), names, groups)


@pytest.mark.parametrize("repeat", [1, 2])
def test_folds_keep_the_proportions_of_the_classes(repeat: int) -> None:
    targets = np.array([0] * 50 + [1] * 23 + [2] * 3)
    folds = fold_numbers(split_of(targets), 5, repeat)
    counts = np.stack([np.bincount(targets[folds == number], minlength=3) for number in range(1, 6)])
    assert counts.sum(0).tolist() == [50, 23, 3]
    assert (counts.max(0) - counts.min(0)).max() <= 1
    assert np.ptp(counts.sum(1)) <= 1
    assert np.array_equal(folds, fold_numbers(split_of(targets), 5, repeat))


def test_repetitions_divide_the_examples_in_another_way() -> None:
    split = split_of(np.arange(40) % 2)
    assert not np.array_equal(fold_numbers(split, 4, 1), fold_numbers(split, 4, 2))


def test_folds_do_not_divide_groups_and_stay_balanced() -> None:
    generator = np.random.default_rng(0)
    groups = generator.integers(40, size=400)
    targets = (groups % 3 == 0).astype(np.int64)
    folds = fold_numbers(split_of(targets, groups), 4)
    assert all(len(set(folds[groups == group])) == 1 for group in set(groups))
    for members in (targets == 0, targets == 1):
        sizes = np.bincount(folds[members], minlength=5)[1:]
        assert sizes.max() - sizes.min() <= 0.35 * sizes.mean()


@pytest.mark.parametrize(("groups", "what"), [(None, "6 examples"), (np.array([0, 0, 0, 1, 1, 1]), "2 groups")])
def test_more_folds_than_parts_are_refused(groups: Any, what: str) -> None:
    with pytest.raises(DataError, match=f"{what} are too few for 7 folds"):
        fold_numbers(split_of([0, 1] * 3, groups), 7)


def test_fold_replaces_the_test_split_and_every_example_is_tested_once() -> None:
    data = Data(DataSpec(("x",), "class", ("a", "b")), {"train": split_of([0, 1] * 20), "test": split_of([0, 1])})
    tested: list[str] = []
    for number in (1, 2, 3, 4):
        splits = complete(data, validation=0.2, limit=None, fold=(number, 4, 1))
        used = [name for split in splits.values() for name in split.fields["x"]]
        assert sorted(used) == sorted(data.splits["train"].fields["x"])
        assert splits["test"].pool is not None
        pool, rows = splits["test"].pool
        assert [pool.fields["x"][row] for row in rows] == list(splits["test"].fields["x"])
        tested += splits["test"].fields["x"]
    assert sorted(tested) == sorted(data.splits["train"].fields["x"])


def test_interval_of_folds_has_the_variance_of_nadeau_and_bengio() -> None:
    values = [0.80, 0.84, 0.82, 0.79, 0.85]
    spread = spread_of_folds(values, 5)
    error = float(np.std(values, ddof=1)) * math.sqrt(1 / 5 + 1 / 4)
    assert spread.interval == pytest.approx((0.82 - student_quantile(4) * error, 0.82 + student_quantile(4) * error))
    # Repetitions do not make the second term smaller: the training splits overlap as much as before.
    repeated = spread_of_folds(values * 20, 5)
    assert repeated.interval is not None
    assert repeated.interval[1] - repeated.interval[0] > 2 * 1.9 * float(np.std(values)) * math.sqrt(1 / 4)


def test_cross_validation_predicts_every_example_and_computes_features_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    computed: list[int] = []
    compute = FeatureCache._compute

    def count(self: FeatureCache, key: str, prefix: Any, loader: Any, view: Any, views: int) -> Any:
        computed.append(len(loader.split))
        return compute(self, key, prefix, loader, view, views)

    monkeypatch.setattr(FeatureCache, "_compute", count)
    result = transfer.run_folds({**CONFIG, "data": {"name": "mini_reviews"}}, folds=3, output=tmp_path)
    assert result.summary["folds"] == 3
    spread = result.summary["test"]["accuracy"]
    assert len(spread["values"]) == 3
    assert spread["interval"][0] <= spread["mean"] <= spread["interval"][1]
    with (result.folder / "out_of_fold.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(len(rows)))
    assert {row["fold"] for row in rows} == {"1", "2", "3"}
    hits = [row["target"] == row["label"] for row in rows]
    assert np.mean(hits) == pytest.approx(spread["mean"], abs=1e-6)
    assert all(size in (len(rows), 168) for size in computed)  # 168: the validation split of the dataset


def test_fold_is_evaluated_as_in_its_summary_and_an_interrupted_folder_is_resumed(tmp_path: Path) -> None:
    result = transfer.run_folds(CONFIG, folds=2, output=tmp_path)
    first = result.folder / "fold-1"
    summary = json.loads((first / "summary.json").read_text())
    assert transfer.evaluate(first) == summary["test"]
    (result.folder / "summary.json").unlink()
    (result.folder / "out_of_fold.csv").unlink()
    (result.folder / "fold-2" / "summary.json").unlink()
    again = transfer.resume_folds(result.folder)
    assert strip(again.summary) == strip(result.summary)
    assert (result.folder / "out_of_fold.csv").is_file()


def strip(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name != "seconds"}


@pytest.mark.parametrize("options", [{"folds": 1}, {"folds": 2, "repeats": 0}])
def test_too_few_folds_are_refused(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the number of folds is too small"):
        transfer.run_folds(CONFIG, output=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_more_folds_than_examples_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are too few for 5000 folds"):
        transfer.run_folds(CONFIG, folds=5000, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_folder_cannot_be_resumed_as_folds(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a folder of folds"):
        transfer.resume_folds(tmp_path)
