"""Contracts of tasks, for each supported kind of targets."""

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
    """Yield a prepared task, outputs of a model, and targets, for each kind of targets."""
    component = case.component()
    kinds = component.cls.targets
    valid = isinstance(kinds, frozenset) and kinds and kinds <= set(get_args(TargetKind))
    require(valid, f"targets is {kinds!r}: expected a frozenset of {', '.join(map(repr, get_args(TargetKind)))}")
    for kind in sorted(kinds):
        task: Task = component.make(DataSpec(("text",), kind, CLASSES))
        count = getattr(task, "out_features", None)
        require(isinstance(count, int) and count > 0, f"out_features is {count!r}: the constructor must set it")
        targets = TARGETS[kind]
        # As in a run: a task may compute statistics of the training targets first.
        task.prepare(targets)
        outputs = torch.randn(BATCH, task.out_features, generator=torch.Generator().manual_seed(0))
        yield task, outputs, torch.as_tensor(targets)


@promise("interfaces.DataSpec", "quick")
def names_of_classes_may_be_unknown(case: Case) -> None:
    """The constructor compares no option with ``DataSpec.classes`` if they are ``placeholders``."""
    component = case.component()
    for kind in sorted(component.cls.targets):
        component.make(DataSpec(("text",), kind, ("(class 1)", "(class 2)"), placeholders=True))


@promise("interfaces.Task", "quick")
def the_loss_is_one_finite_number_per_example(case: Case) -> None:
    """``loss`` returns finite values (B,) with finite gradients for outputs (B, out_features); the engine averages."""
    for task, outputs, targets in _tasks(case):
        outputs.requires_grad_()
        loss = task.loss(outputs, targets)
        require(loss.shape == (BATCH,), f"loss returns {tuple(loss.shape)}: expected {(BATCH,)}, without a mean")
        require(loss.isfinite().all(), "a loss is not finite")
        loss.mean().backward()  # type: ignore[no-untyped-call]
        require(outputs.grad is not None and outputs.grad.isfinite().all(), "a gradient is missing or not finite")


@promise("interfaces.Task", "quick")
def an_example_has_the_same_loss_in_any_batch(case: Case) -> None:
    """The loss of an example does not depend on the other examples of the batch."""
    for task, outputs, targets in _tasks(case):
        alone = task.loss(outputs[:1], targets[:1])
        # Kernels may add in another order for another batch size.
        unchanged = torch.allclose(task.loss(outputs, targets)[:1], alone, atol=1e-5)
        require(unchanged, "other examples in the batch change the loss of an example")


@promise("interfaces.Task", "quick")
def the_state_of_a_task_survives_json(case: Case) -> None:
    """A new task with the saved ``state`` has the same losses and the same ``output_scaling`` as the prepared one."""
    component = case.component()
    for kind, (task, outputs, targets) in zip(sorted(component.cls.targets), _tasks(case), strict=True):
        restored: Task = component.make(DataSpec(("text",), kind, CLASSES))
        # Through JSON, because model.json stores the state.
        restored.load_state(json.loads(json.dumps(task.state())))
        same = torch.equal(restored.loss(outputs, targets), task.loss(outputs, targets))
        require(same, "the losses differ without prepare: return what it computes from state, and set it in load_state")
        scaling = task.output_scaling()
        if scaling is not None:
            shapes = [tuple(values.shape) for values in scaling]
            require(
                shapes == [(task.out_features,)] * 2, f"output_scaling has shapes {shapes}: expected (out_features,)"
            )
            again = restored.output_scaling()
            require(
                again is not None and all(map(torch.equal, scaling, again)), "output_scaling differs after load_state"
            )


@promise("interfaces.PrimaryMetric", "quick")
def the_primary_metric_is_one_of_the_metrics(case: Case) -> None:
    """``primary_metric`` names one of ``metrics``: it selects the best epoch."""
    for task, _, _ in _tasks(case):
        primary = task.primary_metric
        require(isinstance(primary, PrimaryMetric), f"primary_metric is {primary!r}: expected a transfer.PrimaryMetric")
        names = list(task.metrics())
        require(primary.name in names, f"primary_metric is {primary.name!r}: expected one of {', '.join(names)}")
        require("loss" not in names, "a metric is called 'loss', which is the framework's name for the mean loss")


@promise("interfaces.PrimaryMetric", "quick")
def the_direction_is_that_of_the_metric(case: Case) -> None:
    """``primary_metric.higher_is_better`` agrees with the attribute of that name of the torchmetrics class, if set."""
    for task, _, _ in _tasks(case):
        metric = task.metrics().get(task.primary_metric.name)
        direction = getattr(metric, "higher_is_better", None)
        declared = task.primary_metric.higher_is_better
        agrees = direction is None or direction == declared
        require(agrees, f"higher_is_better is {declared} in primary_metric, and {direction} in {type(metric).__name__}")


@promise("interfaces.Task", "quick")
def metrics_are_new_objects_and_take_predictions(case: Case) -> None:
    """``metrics`` returns new torchmetrics at each call. Each takes predictions and targets and is one number."""
    for task, outputs, targets in _tasks(case):
        metrics, others = task.metrics(), task.metrics()
        for name, metric in metrics.items():
            require(metric is not others[name], f"metrics returns the same {name} twice: epochs would be added up")
            metric.update(task.metric_inputs(outputs).get(name, task.predictions(outputs)), targets)
            value = metric.compute()
            require(isinstance(value, Tensor) and value.numel() == 1, f"{name} is {value!r}: expected one number")


@promise("interfaces.Task", "quick")
def predictions_are_json(case: Case) -> None:
    """``interpret`` returns one dict of JSON values per row of outputs."""
    for task, outputs, _ in _tasks(case):
        rows = task.interpret(outputs)
        good = isinstance(rows, list) and len(rows) == BATCH and all(isinstance(row, dict) and row for row in rows)
        require(good, f"interpret returns {rows!r:.120}: expected a list of {BATCH} dicts")
        try:
            json.dumps(rows, allow_nan=False)
        except (TypeError, ValueError) as error:
            require(False, f"interpret returns values that are no JSON: {error}")
