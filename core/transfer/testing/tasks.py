"""What a task promises, for each kind of target that it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.interfaces import DataSpec, PrimaryMetric, TargetKind, Task
from transfer.testing.cases import BATCH, Case, promise, require

CLASSES = ("one", "two", "three")
TARGETS: dict[TargetKind, npt.NDArray[Any]] = {
    "class": np.array([0, 1, 2, 1]),
    "labels": np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]], dtype=np.float32),
    "number": np.array([[0.5, -1, 2], [1, 0, 0], [2, 3, -1], [0, 0, 1]], dtype=np.float32),
}


def _tasks(case: Case) -> Iterator[tuple[Task, Tensor, Tensor]]:
    """Yield for each kind of its targets a task that has seen them, outputs of a model, and the targets."""
    component = case.component()
    kinds = component.cls.targets
    known = isinstance(kinds, frozenset) and kinds and kinds <= set(get_args(TargetKind))
    require(known, f"targets is {kinds!r}: a frozenset of {', '.join(map(repr, get_args(TargetKind)))} belongs there")
    for kind in sorted(kinds):
        task: Task = component.make(DataSpec(("text",), kind, CLASSES))
        count = getattr(task, "out_features", None)
        require(isinstance(count, int) and count > 0, f"out_features is {count!r}: the constructor sets it")
        targets = TARGETS[kind]
        task.prepare(targets)
        outputs = torch.randn(BATCH, task.out_features, generator=torch.Generator().manual_seed(0))
        yield task, outputs, torch.as_tensor(targets)


@promise("interfaces.Task", "quick")
def the_loss_is_one_finite_number_per_example(case: Case) -> None:
    """``loss`` returns (B,) of outputs (B, out_features), finite, with finite gradients; the engine takes the mean."""
    for task, outputs, targets in _tasks(case):
        outputs.requires_grad_()
        loss = task.loss(outputs, targets)
        require(loss.shape == (BATCH,), f"loss returns {tuple(loss.shape)}, where {(BATCH,)} belongs: take no mean")
        require(loss.isfinite().all(), "a loss is not finite")
        loss.mean().backward()  # type: ignore[no-untyped-call]
        require(outputs.grad is not None and outputs.grad.isfinite().all(), "a gradient is missing or not finite")


@promise("interfaces.Task", "quick")
def an_example_has_the_same_loss_in_any_batch(case: Case) -> None:
    """The loss of an example does not depend on the rest of the batch."""
    for task, outputs, targets in _tasks(case):
        alone = task.loss(outputs[:1], targets[:1])
        require(torch.allclose(task.loss(outputs, targets)[:1], alone, atol=1e-5), "alone, an example has another loss")


@promise("interfaces.PrimaryMetric", "quick")
def the_primary_metric_is_one_of_the_metrics(case: Case) -> None:
    """``primary_metric`` names one of ``metrics``: it picks the best epoch."""
    for task, _, _ in _tasks(case):
        primary = task.primary_metric
        require(isinstance(primary, PrimaryMetric), f"primary_metric is {primary!r}")
        names = list(task.metrics())
        require(primary.name in names, f"primary_metric is {primary.name!r}, and metrics are {', '.join(names)}")
        require("loss" not in names, "a metric is called 'loss', as the framework calls the mean loss")


@promise("interfaces.Task", "quick")
def metrics_are_fresh_and_take_predictions(case: Case) -> None:
    """``metrics`` returns new torchmetrics at each call; each takes ``predictions`` and targets, and is one number."""
    for task, outputs, targets in _tasks(case):
        metrics, others = task.metrics(), task.metrics()
        for name, metric in metrics.items():
            require(metric is not others[name], f"metrics returns the same {name} twice, so epochs would add up")
            metric.update(task.predictions(outputs), targets)
            value = metric.compute()
            require(isinstance(value, Tensor) and value.numel() == 1, f"{name} is {value!r}, and not one number")


@promise("interfaces.Task", "quick")
def predictions_are_read_as_json(case: Case) -> None:
    """``interpret`` says what each row of outputs means: one dict of JSON per example."""
    for task, outputs, _ in _tasks(case):
        rows = task.interpret(outputs)
        good = isinstance(rows, list) and len(rows) == BATCH and all(isinstance(row, dict) and row for row in rows)
        require(good, f"interpret returns {rows!r:.120}, and not a list of {BATCH} dicts")
        try:
            json.dumps(rows, allow_nan=False)
        except (TypeError, ValueError) as error:
            require(False, f"interpret returns what JSON cannot hold: {error}")
