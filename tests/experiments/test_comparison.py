"""Runs beside each other."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Points

import transfer
from transfer import Data, RunError, compare, run_seeds
from transfer.registry import entry_points as registry
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import read_json, write_json

EPOCHS = "train.phases=[{epochs: 2}]"
BLIND = "train.optimizer.lr=1.0e-9"
EASY = "data.distance=2.0"


@pytest.fixture
def good(config: dict[str, Any], tmp_path: Path) -> Path:
    return run_seeds(config, [EPOCHS, EASY], seeds=3, output=tmp_path / "good").folder


def test_what_is_much_better_is_said_to_be(config: dict[str, Any], good: Path, tmp_path: Path) -> None:
    bad = run_seeds(config, [EPOCHS, EASY, BLIND], seeds=3, output=tmp_path / "bad").folder
    found = compare([bad, good])
    assert (found.metric, found.split, found.higher_is_better) == ("accuracy", "test", True)
    assert [row.verdict for row in found.rows] == ["reference", "better"]
    assert compare([good, bad]).rows[1].verdict == "worse"


def test_of_an_error_less_is_better(config: dict[str, Any], tmp_path: Path) -> None:
    number = ["data.target=number", "task={name: regression}", "train.phases=[{epochs: 3}]"]
    good = transfer.run(config, number, output=tmp_path).folder
    bad = transfer.run(config, [*number, BLIND], output=tmp_path).folder
    found = compare([bad, good])
    assert (found.metric, found.higher_is_better) == ("mean_absolute_error", False)
    assert found.rows[1].verdict == "better"
    assert not compare([bad, good], metric="loss").higher_is_better
    assert not compare([bad, good], metric="mean_squared_error").higher_is_better


def test_losses_of_single_runs_are_compared_over_examples(config: dict[str, Any], tmp_path: Path) -> None:
    good = transfer.run(config, [EPOCHS, EASY], output=tmp_path).folder
    bad = transfer.run(config, [EPOCHS, EASY, BLIND], output=tmp_path).folder
    assert [compare([one, bad], metric="loss").rows[1].verdict for one in (good, bad)] == ["worse", "within noise"]


def test_without_an_interval_nothing_is_said(config: dict[str, Any], tmp_path: Path) -> None:
    untested = [EPOCHS, EASY, "train.score_test=false"]
    runs = [transfer.run(config, [*untested, *more], output=tmp_path).folder for more in ([], [BLIND])]
    assert compare(runs).rows[1].verdict == "cannot tell"


def test_a_small_difference_is_noise(config: dict[str, Any], good: Path, tmp_path: Path) -> None:
    other = run_seeds(config, [EPOCHS, EASY, "seed=20"], seeds=3, output=tmp_path / "other").folder
    found = compare([good, other])
    assert found.rows[1].verdict == "within noise"
    assert "seeds and test examples" in found.notes[0]


def test_two_single_runs_are_compared_over_examples(config: dict[str, Any], tmp_path: Path) -> None:
    runs = [transfer.run(config, [EPOCHS, EASY, seed], output=tmp_path).folder for seed in ("seed=1", "seed=2")]
    found = compare(runs)
    assert found.rows[0].spread.standard_deviation is None
    assert found.rows[1].difference is not None
    assert found.rows[1].difference.interval is not None
    assert any("a single run does not show" in note for note in found.notes)


def test_the_noise_of_examples_is_that_of_pairs(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, [EPOCHS, EASY], output=tmp_path).folder
    (_, row) = compare([run, run]).rows
    # The same predictions differ nowhere, however the examples are drawn.
    assert row.difference is not None
    assert row.difference.interval == (0.0, 0.0)
    assert row.verdict == "within noise"


def test_stored_predictions_give_the_metrics_of_the_summary(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, [EPOCHS], output=tmp_path)
    stored = RunDirectory(run.folder).predictions()
    assert stored is not None
    assert stored.losses is not None
    assert stored.scores is not None
    assert stored.losses.mean().item() == pytest.approx(run.summary["test"]["loss"], rel=1e-5)
    hits = stored.predictions == stored.targets
    assert hits.float().mean().item() == pytest.approx(run.summary["test"]["accuracy"])
    torch.testing.assert_close(stored.scores.sum(1), torch.ones(40))
    assert stored.scores.argmax(1).tolist() == stored.predictions.tolist()
    assert stored.confidences is not None
    assert stored.scores.amax(1).equal(stored.confidences)
    # In the split's own order, which alternates the classes.
    assert stored.targets.tolist() == [0, 1] * 20
    per_class = run.summary["per_class"]
    assert list(per_class) == ["near", "far"]
    assert per_class["near"]["recall"] == pytest.approx(hits[::2].float().mean().item())
    assert sum(one["predicted"] for one in per_class.values()) == 40


def test_stored_predictions_contain_names_but_no_score_twice(config: dict[str, Any], tmp_path: Path) -> None:
    class Named(Points):
        def load(self) -> Data:
            data = super().load()
            named = {
                name: replace(split, names=[f"{name}: {index}" for index in range(len(split))])
                for name, split in data.splits.items()
            }
            return replace(data, splits=named)

    registry.register("dataset", "named")(Named)
    config |= {"data": {"name": "named", "target": "number"}, "task": {"name": "regression"}}
    run = transfer.run(config, [EPOCHS], output=tmp_path)
    stored = RunDirectory(run.folder).predictions()
    assert stored is not None
    assert stored.names[:2] == ("test: 0", "test: 1")
    assert len(stored.names) == len(stored.targets) == 40
    assert stored.scores is None
    assert "per_class" not in run.summary


def test_noise_of_examples_includes_metrics_of_probabilities(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transfer.experiments.comparison.RESAMPLED_TEST_SPLITS", 8)
    config["task"] |= {"metrics": ["auroc", "mcc"]}
    config["train"] |= {"report": False}
    runs = [transfer.run(config, [EPOCHS, EASY, *more], output=tmp_path).folder for more in ([], [BLIND])]
    for metric in ("auroc", "mcc"):
        table = compare([*runs, runs[0]], metric=metric)
        first, again = (row.difference for row in table.rows[1:])
        assert first is not None
        assert again is not None
        assert first.interval is not None
        assert first.interval[0] < first.mean < first.interval[1]
        assert again.interval == (0.0, 0.0)
        assert "test examples" in table.notes[0]
    directory = RunDirectory(runs[1])
    scored = directory.predictions()
    assert scored is not None
    directory.write_predictions(replace(scored, scores=None))  # as runs of older versions
    assert compare(runs, metric="auroc").rows[1].verdict == "cannot tell"
    assert compare(runs, metric="accuracy").rows[1].verdict == "worse"


def test_a_quick_try_is_not_compared(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, output=tmp_path, quick=True)
    assert RunDirectory(run.folder).predictions() is None
    with pytest.raises(RunError, match="quick run"):
        compare([run.folder])


def test_other_test_examples_are_refused(config: dict[str, Any], good: Path, tmp_path: Path) -> None:
    other = transfer.run(config, [EPOCHS, "data.count=80"], output=tmp_path / "other").folder
    with pytest.raises(RunError, match="not scored on the same test examples") as caught:
        compare([good, other])
    assert "--different-data" in str(caught.value.problems[0].fix)
    told = compare([good, other], different_data=True)
    assert "the intervals do not cover the noise of the scored examples" in told.notes


def test_an_unknown_metric_lists_those_there_are(good: Path) -> None:
    with pytest.raises(RunError, match="unknown metric of the test split 'acuracy'") as caught:
        compare([good], metric="acuracy")
    assert set(caught.value.problems[0].available) == {"loss", "accuracy", "f1_macro"}


def test_seeds_that_have_not_ended_are_refused(good: Path) -> None:
    summary = good / "seed-4" / "summary.json"
    write_json(summary, {**read_json(summary, ""), "status": "interrupted"})
    with pytest.raises(RunError, match="is not complete") as caught:
        compare([good])
    assert caught.value.problems[0].fix == f"transfer resume {good}"


def test_tables_for_machines_and_for_people(good: Path, tmp_path: Path) -> None:
    found = compare([good, good / "seed-3"])
    found.write(csv=tmp_path / "out" / "table.csv", html=tmp_path / "out" / "table.html")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text(encoding="utf-8"))))
    assert [row["verdict"] for row in rows] == ["reference", found.rows[1].verdict]
    assert float(rows[0]["mean"]) == found.rows[0].spread.mean
    assert rows[0]["values"].split() == [str(value) for value in found.rows[0].spread.values]
    page = (tmp_path / "out" / "table.html").read_text(encoding="utf-8")
    assert page.count("<circle") == 4
    assert str(good) in page
    assert "http" not in page


def test_a_table_that_cannot_be_written_says_so(good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        compare([good]).write(csv=tmp_path / "file" / "table.csv")
