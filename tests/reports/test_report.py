"""The report of a run: its metrics against torchmetrics, its content for each task, and the runs it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Dense, PointPreprocessing, Points
from safetensors.torch import load_file, save_file
from torchmetrics.classification import MulticlassPrecision, MulticlassRecall, MultilabelF1Score
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)
from torchmetrics.functional.regression import r2_score

import transfer
from transfer import Data, DataSpec, Occlusion, RunError, Split
from transfer.registry import entry_points as registry
from transfer.reports import charts
from transfer.reports.metrics import (
    Bin,
    calibration,
    confusion_matrix,
    most_confused,
    residuals,
)
from transfer.runs.class_metrics import metrics_per_class, metrics_per_label
from transfer.system.atomic_files import write_json
from transfer.training.events import Note

DRAWN = torch.Generator().manual_seed(0)


def drawn(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=DRAWN)


# ------------------------------------------------------------------------------------------------------------ metrics


def test_metrics_per_class_equal_torchmetrics() -> None:
    predictions, targets = (drawn(200) * 5).long(), (drawn(200) * 5).long()
    matrix = confusion_matrix(predictions, targets, 5)
    assert torch.equal(matrix, multiclass_confusion_matrix(predictions, targets, 5))
    metrics = metrics_per_class(predictions, targets, 5)
    oracles = {"precision": MulticlassPrecision(5, average=None), "recall": MulticlassRecall(5, average=None)}
    for name, oracle in oracles.items():
        assert [getattr(one, name) for one in metrics] == pytest.approx(oracle(predictions, targets).tolist())
    assert [one.f1 for one in metrics] == pytest.approx(multiclass_f1_score(predictions, targets, 5, None).tolist())
    assert [one.support for one in metrics] == torch.bincount(targets, minlength=5).tolist()


def test_class_metrics_without_examples_or_predictions() -> None:
    absent, never_predicted = metrics_per_class(torch.tensor([2, 2]), torch.tensor([1, 2]), 3)[:2]
    assert (absent.precision, absent.recall, absent.f1, absent.support) == (None, None, None, 0)
    assert (never_predicted.precision, never_predicted.recall) == (None, 0.0)
    assert (never_predicted.f1, never_predicted.support) == (0.0, 1)


def test_metrics_per_class_of_a_single_class() -> None:
    (only,) = metrics_per_class(torch.tensor([0, 0]), torch.tensor([0, 0]), 1)
    assert (only.precision, only.recall, only.f1, only.support, only.predicted) == (1.0, 1.0, 1.0, 2, 2)


def test_most_confused_sorts_mistakes_by_count() -> None:
    assert most_confused(torch.tensor([[9, 1, 0], [3, 9, 0], [0, 2, 9]]), 2) == [(1, 0, 3), (2, 1, 2)]
    assert most_confused(torch.diag(torch.tensor([4, 5])), 3) == []


def test_metrics_per_label_equal_torchmetrics() -> None:
    probabilities, targets = drawn(50, 3), (drawn(50, 3) > 0.6).long()
    metrics = metrics_per_label(probabilities >= 0.4, targets > 0)
    oracle = MultilabelF1Score(3, threshold=0.4, average=None)
    assert [one.f1 for one in metrics] == pytest.approx(oracle(probabilities, targets).tolist())


def test_calibration_error_equals_torchmetrics() -> None:
    probabilities, correct = drawn(500), drawn(500) < 0.7
    calibrated = calibration(probabilities, correct)
    oracle = float(binary_calibration_error(probabilities, correct.long(), 15))
    assert calibrated.error == pytest.approx(oracle, abs=1e-6)
    assert sum(one.count for one in calibrated.bins) == 500
    assert calibrated.accuracy == pytest.approx(correct.float().mean().item())
    certain = calibration(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([False, True, True]))
    assert certain.error == 0
    assert [one.count for one in certain.bins] == [1, 2]
    assert 0 < Bin(0.9, 1.0, 10, 0.95, 1.0).standard_error < 0.2


def test_residuals_equal_torchmetrics() -> None:
    targets = drawn(40, 2)
    predictions = targets + drawn(40, 2) / 5
    for index, errors in enumerate(residuals(predictions, targets)):
        predicted, true = predictions[:, index], targets[:, index]
        assert errors.r2 == pytest.approx(float(r2_score(predicted, true)), abs=1e-5)
        assert errors.mean_absolute_error == pytest.approx(float((predicted - true).abs().mean()))
        assert errors.root_mean_squared_error == pytest.approx(float((predicted - true).square().mean().sqrt()))
        assert errors.bias == pytest.approx(float((predicted - true).mean()))
    assert residuals(torch.zeros(2, 1), torch.ones(2, 1))[0].r2 is None
    assert residuals(torch.zeros(1, 1), torch.ones(1, 1))[0].r2 is None


# ------------------------------------------------------------------------------------------------------------- charts

ODD = {
    "one point": charts.lines("a", {"x": [(1.0, 0.5)]}),
    "all alike": charts.lines("a", {"x": [(1.0, 0.5), (2.0, 0.5)], "y": [(1.0, 0.5)]}),
    "tiny rates": charts.lines("a", {"x": [(1.0, 1e-9), (2.0, 1e-3)]}, log_y=True),
    "one rate": charts.lines("a", {"x": [(1.0, 1e-9)]}, log_y=True),
    "many lines": charts.lines("a", {f"layer {i}": [(1.0, i), (2.0, -i)] for i in range(30)}),
    "one number": charts.scatter("<a>", [(2.0, 2.0)], "x", "y"),
    "many numbers": charts.scatter("a", [(i * 1.0, -i * 1e6) for i in range(9000)], "x", "y"),
    "empty classes": charts.confusion_matrix("a", [[0, 0], [0, 0]], ["<b>", "\x1b" * 40]),
    "many classes": charts.confusion_matrix("a", [[1] * 40] * 40, [f"class {i}" for i in range(40)]),
    "no time": charts.stacked_bar("a", {"x": 0.0, "y": 1.0}, "s"),
    "one bin": charts.reliability("a", calibration(torch.ones(1), torch.ones(1) > 0)),
}


@pytest.mark.parametrize("svg", ODD.values(), ids=ODD.keys())
def test_chart_is_xml_and_stays_inside_its_frame(svg: str) -> None:
    root = ET.fromstring(charts.standalone(svg))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    numbers = [float(n) for e in root.iter() for n in re.findall(r"-?\d+\.?\d*", e.attrib.get("points", ""))]
    for element in root.iter():
        if "cx" in element.attrib:
            numbers += [float(element.attrib["cx"]), float(element.attrib["cy"])]
        assert float(element.attrib.get("x", "0").rstrip("%")) <= width
    assert all(0 <= number <= max(width, height) for number in numbers)
    assert "nan" not in svg


def test_labels_of_marks_do_not_overlap() -> None:
    marks = {float(i): f"phase {i}" for i in range(1, 30)} | {2.0: "best"}
    root = ET.fromstring(charts.standalone(charts.lines("a", {"x": [(1.0, 0.5), (30.0, 0.5)]}, marks=marks)))
    namespace = "{http://www.w3.org/2000/svg}"
    texts = [e for e in root.iter(f"{namespace}text") if str(e.text).startswith(("phase", "best"))]
    assert len(texts) > 3
    left_aligned = [(float(e.attrib["x"]), len(str(e.text))) for e in texts if e.attrib["text-anchor"] == "start"]
    for (x, length), (following, _) in itertools.pairwise(sorted(left_aligned)):
        assert x + charts.LEGEND_CHARACTER_WIDTH * length <= following
    # Every mark has its name as a tooltip.
    tooltips = [e.findtext(f"{namespace}title") for e in root.iter(f"{namespace}path")]
    assert set(marks.values()) <= set(tooltips)


# --------------------------------------------------------------------------------------------------------------- runs


class OccludedPoints(PointPreprocessing):
    """Points whose pieces are their numbers."""

    def occlusions(self, value: Any) -> list[Occlusion]:
        return [Occlusion(f"{number:.1f} ", [*value[:i], 0.0, *value[i + 1 :]]) for i, number in enumerate(value)]


class Explaining(Dense):
    """The tiny backbone with pieces that can be left out."""

    @property
    def preprocessing(self) -> OccludedPoints:
        return OccludedPoints()


class LabeledPoints(Points):
    """Points with two labels: whether the first and the second number are positive."""

    @property
    def spec(self) -> DataSpec:
        return DataSpec(("point",), "labels", ("<first>\x1b[2J", "second"))

    def load(self) -> Data:
        generator = np.random.default_rng(0)
        points = generator.normal(size=(self.count, 4))
        split = Split({"point": [row.tolist() for row in points]}, (points[:, :2] > 0).astype(np.float32))
        half = np.arange(self.count) % 2 == 0
        parts = {"train": split.select(np.flatnonzero(half)), "test": split.select(np.flatnonzero(~half))}
        return Data(self.spec, parts)


def page(run: transfer.Run) -> str:
    return (run.folder / "report.html").read_text(encoding="utf-8")


def words(html: str) -> str:
    """Return the text of a page in one line."""
    return " ".join(re.sub(r"<[^>]*>", " ", html.split("<body>")[1]).split())


@pytest.fixture
def run(config: dict[str, Any], tmp_path: Path) -> transfer.Run:
    registry.register("backbone", "explaining")(Explaining)
    return transfer.run(config | {"backbone": {"name": "explaining"}}, output=tmp_path)


def test_run_writes_its_report(run: transfer.Run) -> None:
    text = words(page(run))
    assert f"test accuracy {run.summary['test']['accuracy']:.4f}" in text
    assert "40 examples" in text
    names = {path.name for path in (run.folder / "plots").iterdir()}
    drawn = ("loss", "accuracy", "f1_macro", "learning_rate", "time", "confusion", "calibration")
    assert names == {f"{name}.svg" for name in drawn}
    for name in names:
        ET.parse(run.folder / "plots" / name)
    assert page(run).count("<article>") == 12
    # The highest loss comes first, and the pieces with the largest changes are named.
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", text.split("examples with the highest loss")[1])]
    assert losses == sorted(losses, reverse=True)
    assert text.count("largest changes: ") == 12
    assert not list(run.folder.glob(".*"))


def test_report_writes_the_same_page_again(run: transfer.Run) -> None:
    before = page(run)
    (run.folder / "report.html").unlink()
    shutil.rmtree(run.folder / "plots")
    assert transfer.report(run.folder) == run.folder / "report.html"
    assert page(run) == before
    write_json(run.folder / "summary.json", {**run.summary, "data_warnings": {"duplicates in train": "2 of <120>"}})
    transfer.report(run.folder)
    assert "Possible problems duplicates in train 2 of &lt;120&gt;" in words(page(run))


def test_report_without_data_states_the_reason(run: transfer.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Points, "load", lambda self: (_ for _ in ()).throw(transfer.DataError("no <points> here")))
    transfer.report(run.folder)
    assert "Not shown: the data is not available: no &lt;points&gt; here." in page(run)
    assert "<article>" not in page(run)
    assert (run.folder / "plots" / "confusion.svg").is_file()


def test_report_refuses_changed_data(run: transfer.Run) -> None:
    file = run.folder / "config.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("count: 160", "count: 80"), encoding="utf-8")
    transfer.report(run.folder)
    assert "the data has changed since the run was scored" in page(run)


def test_report_of_numbers_contains_residuals_and_no_calibration(config: dict[str, Any], tmp_path: Path) -> None:
    config |= {"data": {"name": "points", "target": "number"}, "task": {"name": "regression"}}
    text = words(page(run := transfer.run(config, output=tmp_path)))
    assert "mean absolute error" in text
    assert "Calibration" not in text
    assert (run.folder / "plots" / "residuals-1.svg").is_file()
    assert re.search(r"true first -?\d", text)


def test_report_of_labels_contains_their_metrics_and_calibration(config: dict[str, Any], tmp_path: Path) -> None:
    registry.register("dataset", "labeled")(LabeledPoints)
    config |= {"data": {"name": "labeled"}, "task": {"name": "multilabel", "threshold": 0.3}}
    run = transfer.run(config, output=tmp_path)
    assert "if its probability is at least 0.3" in words(page(run))
    # Neither markup nor a terminal command in a name has an effect.
    assert "&lt;first&gt;\\x1b[2J" in page(run)
    assert "<first>" not in page(run)
    assert "\x1b" not in page(run)
    assert "label probabilities" in words(page(run))
    assert not (run.folder / "plots" / "confusion.svg").exists()


def test_report_of_phases_without_test_metrics(config: dict[str, Any], tmp_path: Path) -> None:
    phases = "train.phases=[{epochs: 1, freeze: backbone}, {epochs: 2, lr: {head: 0.1, backbone: 0.001}}]"
    run = transfer.run(config, [phases, "train.score_test=false"], output=tmp_path)
    text = words(page(run))
    assert "the test split was not scored" in text
    assert "phase 1: 1 epoch phase 2: 2 epochs first 56 frozen lr 0.001" in text
    assert "phase 2" in (run.folder / "plots" / "loss.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(("overrides", "quick"), [(["train.report=false"], False), ([], True)])
def test_report_is_not_written_if_disabled_or_quick(
    config: dict[str, Any], tmp_path: Path, overrides: Sequence[str], quick: bool
) -> None:
    run = transfer.run(config, overrides, output=tmp_path, quick=quick)
    assert not (run.folder / "report.html").exists()
    transfer.report(run.folder)
    assert ("its metrics are meaningless" in page(run)) == quick


def test_failing_report_leaves_run_complete(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("broken report")

    monkeypatch.setattr("transfer.reports.report.render", broken)
    events: list[object] = []
    run = transfer.run(config, output=tmp_path, observe=events.append)
    assert run.summary["status"] == "complete"
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("the report was not written" in text and "transfer report" in text for text in notes)
    with pytest.raises(RunError, match="the report cannot be created from this run: ZeroDivisionError"):
        transfer.report(run.folder)


def test_report_refuses_an_incomplete_run(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, output=tmp_path)
    (run.folder / "summary.json").write_text(json.dumps({"status": "stopped", "error": "StoppedByObserver: enough"}))
    with pytest.raises(RunError, match="the run is not complete: StoppedByObserver: enough") as caught:
        transfer.report(run.folder)
    assert "transfer resume" in str(caught.value.problems[0].fix)


Change = Callable[[Path], object]


def replaced(name: str, old: str, new: str) -> Change:
    def change(run: Path) -> None:
        text = (run / name).read_text(encoding="utf-8")
        assert old in text
        (run / name).write_text(text.replace(old, new), encoding="utf-8")

    return change


DAMAGE = {
    "no metrics": lambda run: (run / "metrics.jsonl").unlink(),
    "a line that is none": lambda run: (run / "metrics.jsonl").write_text("{}\n[1"),
    "an epoch that is a word": replaced("metrics.jsonl", '"epoch": 1', '"epoch": "first"'),
    "another primary metric": replaced("summary.json", '"primary_metric": "accuracy"', '"primary_metric": "x"'),
    "no sizes": replaced("summary.json", '"examples":', '"samples":'),
    "other names of examples": lambda run: save_file(
        load_file(run / "predictions.safetensors") | {"names": torch.tensor([91, 49, 93], dtype=torch.uint8)},
        run / "predictions.safetensors",
    ),
    "predictions cut": lambda run: (run / "predictions.safetensors").write_bytes(b"\x08"),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_report_refuses_damaged_files(config: dict[str, Any], tmp_path: Path, change: Change) -> None:
    folder = transfer.run(config, ["train.phases=[{epochs: 1}]"], output=tmp_path).folder
    change(folder)
    with pytest.raises(RunError) as caught:
        transfer.report(folder)
    assert str(folder) in str(caught.value)


def test_report_of_predictions_without_losses(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, output=tmp_path)
    directory = transfer.storage.run_directory.RunDirectory(run.folder)
    scored = directory.predictions()
    assert scored is not None
    directory.write_predictions(dataclasses.replace(scored, losses=None, confidences=None, scores=None, names=()))
    transfer.report(run.folder)
    assert "did not store the losses" in page(run)
    assert "Calibration" not in words(page(run))
