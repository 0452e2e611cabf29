"""The tasks that need no modality."""

from __future__ import annotations

import json
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transfer import ConfigError, DataSpec, MeanOf, Task
from transfer.builtin.samplers import Balanced
from transfer.builtin.tasks import Classification, Focal, MultiLabel, Regression

CLASSES = DataSpec(("x",), "class", ("cat", "dog", "owl"))
LABELS = DataSpec(("x",), "labels", ("red", "big"))
NUMBERS = DataSpec(("x",), "number", ("width", "height"))

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 1.0], [0.5, 0.0, 0.0], [0.0, 0.0, 1.0]])
TARGETS = torch.tensor([0, 1, 1, 2])


def scores(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Update in two batches, as the engine does."""
    metrics = task.metrics()
    for metric in metrics.values():
        metric.update(task.predictions(outputs[:1]), targets[:1])
        metric.update(task.predictions(outputs[1:]), targets[1:])
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def test_classification_loss_is_cross_entropy_per_example() -> None:
    task = Classification(CLASSES)
    assert task.out_features == 3
    loss = task.loss(LOGITS, TARGETS)
    assert loss.shape == (4,)
    assert torch.allclose(loss, -LOGITS.log_softmax(1)[torch.arange(4), TARGETS])


def test_label_smoothing_is_torch_s() -> None:
    loss = Classification(CLASSES, label_smoothing=0.2).loss(LOGITS, TARGETS)
    assert torch.allclose(loss.mean(), F.cross_entropy(LOGITS, TARGETS, label_smoothing=0.2))


def test_class_weights_by_name_multiply_the_loss() -> None:
    task = Classification(CLASSES, class_weights={"owl": 3.0, "cat": 1.0, "dog": 0.5})
    weights = torch.tensor([1.0, 0.5, 0.5, 3.0])
    assert torch.allclose(task.loss(LOGITS, TARGETS), Classification(CLASSES).loss(LOGITS, TARGETS) * weights)


def test_balanced_weights_have_mean_one_over_examples() -> None:
    task = Classification(CLASSES, class_weights="balanced")
    targets = np.array([0] * 6 + [1] * 3 + [2])
    task.prepare(targets)
    assert task.weights is not None
    assert torch.allclose(task.weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    assert task.weights[torch.from_numpy(targets)].mean().item() == pytest.approx(1)


def test_a_class_without_training_examples_gets_no_weight() -> None:
    task = Classification(CLASSES, class_weights="balanced")
    task.prepare(np.array([0, 0, 1]))
    assert task.weights is not None
    assert torch.allclose(task.weights, torch.tensor([0.75, 1.5, 0.0]))


@pytest.mark.parametrize("weights", [{"cat": 1.0}, {"cat": 1.0, "dog": 1.0, "fish": 1.0}])
def test_weights_are_given_for_every_class(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="class_weights names") as caught:
        Classification(CLASSES, class_weights=weights)
    assert caught.value.problems[0].available == CLASSES.classes


def test_classification_metrics() -> None:
    found = scores(Classification(CLASSES), LOGITS, TARGETS)
    # Predicted 0, 1, 0, 2: F1 of 2/3, 2/3 and 1.
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_two_classes_are_scored_as_classes() -> None:
    task = Classification(DataSpec(("x",), "class", ("no", "yes")))
    found = scores(task, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_a_classification_is_read_for_people() -> None:
    rows = Classification(CLASSES).interpret(LOGITS)
    json.dumps(rows)
    assert [row["label"] for row in rows] == ["cat", "dog", "cat", "owl"]
    assert rows[1]["probability"] == pytest.approx(LOGITS[1].softmax(0)[1].item())
    assert list(rows[1]["probabilities"]) == ["dog", "owl", "cat"]


def test_of_many_classes_the_most_probable_are_shown() -> None:
    task = Classification(DataSpec(("x",), "class", tuple(f"c{i}" for i in range(50))))
    (row,) = task.interpret(torch.arange(50.0).unsqueeze(0))
    assert list(row["probabilities"]) == ["c49", "c48", "c47", "c46", "c45"]


def test_a_classification_of_half_precision_is_read() -> None:
    (row,) = Classification(CLASSES).interpret(torch.tensor([[1.0, 5.0, 2.0]], dtype=torch.bfloat16))
    assert row["label"] == "dog"


def test_multilabel() -> None:
    task = MultiLabel(LABELS)
    outputs = torch.tensor([[2.0, -1.0], [-2.0, 1.0], [3.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    assert task.out_features == 2
    probabilities = outputs.sigmoid()
    expected = -(targets * probabilities.log() + (1 - targets) * (1 - probabilities).log()).mean(1)
    assert torch.allclose(task.loss(outputs, targets), expected, atol=1e-6)
    # red: 2 found of 3, none wrongly; big: 1 of 1 found and 1 wrongly.
    assert scores(task, outputs, targets.long()) == pytest.approx({"f1_macro": (0.8 + 2 / 3) / 2, "accuracy": 2 / 3})
    rows = task.interpret(outputs)
    json.dumps(rows)
    assert [row["labels"] for row in rows] == [["red"], ["big"], ["red", "big"]]
    assert rows[0]["probabilities"]["red"] == pytest.approx(probabilities[0, 0].item())


def test_the_threshold_of_a_label() -> None:
    outputs, targets = torch.tensor([[0.5, -3.0]]), torch.tensor([[1, 0]])
    assert MultiLabel(LABELS, threshold=0.7).interpret(outputs)[0]["labels"] == []
    assert scores(MultiLabel(LABELS, threshold=0.7), outputs.repeat(2, 1), targets.repeat(2, 1))["accuracy"] == 0.5
    assert scores(MultiLabel(LABELS, threshold=0.6), outputs.repeat(2, 1), targets.repeat(2, 1))["accuracy"] == 1.0


def test_multilabel_scores_the_targets_that_a_dataset_gives() -> None:
    outputs, targets = torch.tensor([[2.0, -1.0], [-2.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert scores(MultiLabel(LABELS), outputs, targets)["f1_macro"] == 1.0


@pytest.mark.parametrize(
    ("kind", "expected"), [("squared", [0.5, 2.0]), ("absolute", [0.5, 1.0]), ("huber", [0.25, 0.75])]
)
def test_regression_losses(kind: str, expected: list[float]) -> None:
    task = Regression(NUMBERS, loss=kind)  # type: ignore[arg-type]
    outputs, targets = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    assert task.out_features == 2
    assert torch.allclose(task.loss(outputs, targets), torch.tensor(expected))


def test_regression_metrics() -> None:
    outputs, targets = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    task = Regression(NUMBERS)
    assert scores(task, outputs, targets) == pytest.approx({"mean_absolute_error": 0.75, "mean_squared_error": 1.25})
    assert not task.primary_metric.higher_is_better


def test_numbers_are_read_by_name() -> None:
    rows = Regression(NUMBERS).interpret(torch.tensor([[1.5, 2.0]]))
    assert json.loads(json.dumps(rows)) == [{"width": 1.5, "height": 2.0}]


@pytest.mark.parametrize("task", [Classification(CLASSES), MultiLabel(LABELS), Regression(NUMBERS)])
def test_the_primary_metric_is_one_of_the_metrics(task: Task) -> None:
    assert task.primary_metric.name in task.metrics()
    assert task.metrics()[task.primary_metric.name] is not task.metrics()[task.primary_metric.name]


def test_the_mean_of_a_function_is_a_metric() -> None:
    metric = MeanOf(lambda predictions, targets: (predictions - targets).abs())
    metric.update(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]))
    metric.update(torch.tensor([[6.0]]), torch.tensor([[0.0]]))
    assert metric.compute() == 3.0


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_classes_is_the_formula_of_the_paper(gamma: float) -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = Classification(CLASSES, loss=Focal(name="focal", gamma=gamma)).loss(logits, TARGETS)
    p = LOGITS.softmax(1)[torch.arange(4), TARGETS]
    assert torch.allclose(loss, -((1 - p) ** gamma) * p.log())
    loss.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_focal_loss_with_gamma_zero_is_cross_entropy_and_convex() -> None:
    task = Classification(CLASSES, loss=Focal(name="focal", gamma=0.0), label_smoothing=0.1)
    assert torch.equal(task.loss(LOGITS, TARGETS), Classification(CLASSES, label_smoothing=0.1).loss(LOGITS, TARGETS))
    assert task.has_convex_loss
    assert not Classification(CLASSES, loss="focal").has_convex_loss


def test_focal_loss_of_certain_predictions_has_a_finite_gradient() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    Classification(CLASSES, loss=Focal(name="focal", gamma=0.5)).loss(logits, torch.tensor([0])).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_focal_loss_of_labels_equals_torchvision_without_alpha() -> None:
    ops = pytest.importorskip("torchvision.ops")
    logits, targets = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.eye(2)[[0, 1, 1, 0, 1]]
    expected = ops.sigmoid_focal_loss(logits, targets, alpha=-1, gamma=2).mean(1)
    assert torch.allclose(MultiLabel(LABELS, loss="focal").loss(logits, targets), expected, atol=1e-6)


def test_positive_weights_of_labels_are_those_of_torch() -> None:
    logits, targets = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.eye(2)[[0, 1, 1, 0, 1]]
    task = MultiLabel(LABELS, pos_weight={"big": 0.5, "red": 4.0})
    weights = torch.tensor([4.0, 0.5])
    expected = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none").mean(1)
    assert torch.allclose(task.loss(logits, targets), expected)


def test_balanced_positive_weights_are_the_ratio_of_absent_to_present_and_are_saved() -> None:
    data = DataSpec(("x",), "labels", ("rare", "absent", "constant"))
    task = MultiLabel(data, pos_weight="balanced")
    task.prepare(np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]], dtype=np.float32))
    assert task.weights is not None
    assert task.weights.tolist() == [3.0, 1.0, 1.0]
    restored = MultiLabel(data, pos_weight="balanced")
    restored.load_state(json.loads(json.dumps(task.state())))
    assert torch.equal(cast("Tensor", restored.weights), task.weights)


def test_positive_weights_are_given_for_every_label() -> None:
    with pytest.raises(ConfigError, match="pos_weight names other classes"):
        MultiLabel(LABELS, pos_weight={"red": 2.0})


@pytest.mark.parametrize(("power", "fraction"), [(1.0, 1 / 2), (0.5, 1 / 4), (0.0, 1 / 10)])
def test_balanced_sampler_draws_classes_by_the_power_of_their_frequency(power: float, fraction: float) -> None:
    targets = np.array([0] * 900 + [1] * 100).repeat(20)
    drawn = targets[Balanced(power=power).order(targets, seed=0, epoch=1)]
    assert (drawn == 1).mean() == pytest.approx(fraction, abs=0.02)
    assert np.array_equal(Balanced(power=power).order(targets, 0, 1), Balanced(power=power).order(targets, 0, 1))
