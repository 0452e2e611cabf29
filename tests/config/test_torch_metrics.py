"""torchmetrics' metrics in a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAUROC
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy, multiclass_matthews_corrcoef
from torchmetrics.functional.regression import pearson_corrcoef

import transfer
from transfer import ConfigError, DataSpec, Task, register
from transfer.builtin.tasks import Classification, MultiLabel, Regression
from transfer.config.check import load_component
from transfer.config.collected_metrics import MAX_PENDING_BATCHES
from transfer.config.torch_metrics import torch_metrics
from transfer.system.file_schema import checked
from transfer.training.events import EpochEnded
from transfer.training.state import _metric_states, _MetricUpdates, _restore_metric, named_metrics

CLASSES = DataSpec(("x",), "class", ("a", "b", "c"))


def make(name: str, data: DataSpec, *metrics: Any, **options: Any) -> Task:
    block = {"name": name, "metrics": list(metrics), **options}
    task: Task = load_component("task", block, "test").make(data)
    return task


def values(task: Task, outputs: Tensor, targets: Tensor, size: int = 7) -> dict[str, float]:
    """Return the metrics, updated batch by batch as the engine does."""
    metrics = task.metrics()
    for some, their_targets in zip(outputs.split(size), targets.split(size), strict=True):
        inputs, predictions = task.metric_inputs(some), task.predictions(some)
        for name, metric in metrics.items():
            metric.update(inputs.get(name, predictions), their_targets)
            float(metric.compute())  # progress events compute metrics at any time
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_metrics_of_classes_take_probabilities() -> None:
    outputs, targets = random(300, 3), torch.arange(300) % 3
    outputs[torch.arange(300), targets] += 0.5
    found = values(
        make("classification", CLASSES, "auroc", "mcc", {"name": "accuracy", "top_k": 2}), outputs, targets, 3
    )
    assert MAX_PENDING_BATCHES < 300 / 3
    scores = outputs.softmax(1)
    assert found["auroc"] == pytest.approx(float(MulticlassAUROC(3)(scores, targets)))
    assert found["mcc"] == pytest.approx(float(multiclass_matthews_corrcoef(scores, targets, 3)))
    top_2 = multiclass_accuracy(scores, targets, 3, average="micro", top_k=2)
    assert found["accuracy_top_k_2"] == pytest.approx(float(top_2))
    assert set(found) == {"accuracy", "f1_macro", "auroc", "mcc", "accuracy_top_k_2"}


def test_auroc_leaves_out_classes_without_examples() -> None:
    outputs, targets = random(40, 3), torch.arange(40) % 2
    scores = outputs.softmax(1)
    expected = [float(binary_auroc(scores[:, index], targets == index)) for index in (0, 1)]
    for options in ({}, {"thresholds": 10_000}):
        task = make("classification", CLASSES, {"name": "auroc", **options})
        (found,) = (value for name, value in values(task, outputs, targets).items() if "auroc" in name)
        assert found == pytest.approx(sum(expected) / 2, abs=2e-3)


def test_label_metrics_use_threshold_of_task() -> None:
    data, outputs = DataSpec(("x",), "labels", ("a", "b")), random(50, 2)
    targets = torch.stack([outputs[:, 0] > 0.9, torch.zeros(50)], 1).float()
    task = make("multilabel", data, "auroc", "precision", threshold=0.7)
    found = values(task, outputs, targets)
    assert found["auroc"] == 1  # the second label has no examples
    expected = float((outputs[:, 0] > 0.9).sum() / (outputs[:, 0].sigmoid() >= 0.7).sum())
    assert found["precision"] == pytest.approx(expected / 2)


@pytest.mark.parametrize("count", [1, 2])
def test_metrics_of_numbers_are_means_over_the_numbers(count: int) -> None:
    data = DataSpec(("x",), "number", tuple("ab"[:count]))
    outputs = random(60, count)
    targets = outputs + random(60, count).flip(0)
    found = values(make("regression", data, "pearson_corrcoef", "r2_score"), outputs, targets)
    expected = [float(pearson_corrcoef(outputs[:, index], targets[:, index])) for index in range(count)]
    assert found["pearson_corrcoef"] == pytest.approx(sum(expected) / count, abs=1e-5)


@pytest.mark.parametrize("target", ["class", "labels", "number"])
def test_every_metric_is_a_number_with_direction(target: Any) -> None:
    name, cls = {
        "class": ("classification", Classification),
        "labels": ("multilabel", MultiLabel),
        "number": ("regression", Regression),
    }[target]
    required: dict[str, dict[str, Any]] = {
        "fbeta_score": {"beta": 2.0},
        "critical_success_index": {"threshold": 0.5},
        "minkowski_distance": {"p": 2.0},
    }
    data = DataSpec(("x",), target, ("a", "b"))
    for metric in torch_metrics(target).keys() - cls(data).metrics().keys():
        task = make(name, data, {"name": metric, **required.get(metric, {})})
        assert isinstance(list(task.metrics().values())[-1].higher_is_better, bool), metric


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("r2_score", "metric 'r2_score' does not fit the task: expected targets of kind number, got class"),
        ("aurocc", "did you mean 'auroc'?"),
        ("roc", "unknown metric 'roc'"),
        ({"name": "auroc", "averag": "macro"}, "unknown option 'averag' of metric 'auroc'"),
        ({"name": "auroc", "average": "none"}, "metric 'auroc' returns 3 values: expected one number"),
        ({"name": "accuracy", "top_k": 9}, "`top_k` to be smaller or equal"),
        ("accuracy", "task.metrics adds 'accuracy', which exists already"),
    ],
    ids=["other-target", "typo", "curve", "unknown-option", "no-average", "top-k", "twice"],
)
def test_wrong_metric_is_refused(metric: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make("classification", CLASSES, metric)
    assert message in str(caught.value)


def test_select_by_names_a_metric_of_the_task() -> None:
    assert make("classification", CLASSES, select_by="f1_macro").primary_metric.name == "f1_macro"
    task = make("classification", CLASSES, "calibration_error", select_by="calibration_error")
    assert not task.primary_metric.higher_is_better
    with pytest.raises(ConfigError, match=r"task\.select_by is wrong: unknown metric 'auroc'") as caught:
        make("classification", CLASSES, select_by="auroc")
    assert caught.value.problems[0].available == ("accuracy", "f1_macro")


def test_registered_metric_takes_precedence_and_may_take_scores() -> None:
    class Scores(transfer.MeanOf):
        """Mean of the scores."""

        higher_is_better = True
        takes_scores = True

        def __init__(self, data: DataSpec) -> None:
            super().__init__(lambda scores, targets: scores)

    register("metric", "scores")(Scores)
    found = values(make("classification", CLASSES, "scores"), random(9, 3), torch.arange(9) % 3)
    assert found["scores"] == pytest.approx(1 / 3)


def test_state_of_collected_batches_is_restored() -> None:
    one, other = (make("classification", CLASSES, "auroc", "mcc").metrics() for _ in range(2))
    outputs, targets = random(300, 3).softmax(1), torch.arange(300) % 3
    for some, their_targets in zip(outputs.split(4), targets.split(4), strict=True):
        for name in ("auroc", "mcc"):
            one[name].update(some, their_targets)
    updates, tensors = _metric_states(one)
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)  # safetensors refuses shared memory
    for path, metric in named_metrics(other):
        _restore_metric(metric, path, tensors, checked(updates[path], _MetricUpdates, "", "damaged"))
    for name in ("auroc", "mcc"):
        assert one[name].compute() == other[name].compute()


def test_metric_in_selection_resume_and_evaluation(config: dict[str, Any], tmp_path: Path) -> None:
    config["task"] |= {"metrics": ["auroc", "mcc"], "select_by": "auroc"}
    config["train"] |= {"report": False, "phases": [{"epochs": 2}], "scheduler": {"name": "plateau"}}
    complete = transfer.run(config, output=tmp_path / "a")
    assert complete.summary["primary_metric"] == "auroc"
    assert transfer.evaluate(complete.folder) == complete.summary["test"]
    assert transfer.compare([complete.folder]).metric == "auroc"

    def stop(event: Any) -> None:
        if isinstance(event, EpochEnded) and event.record["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.run(config, output=tmp_path / "b", observe=stop)
    (folder,) = (tmp_path / "b").iterdir()
    assert transfer.resume(folder).summary["test"] == complete.summary["test"]
