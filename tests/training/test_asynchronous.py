"""No operation of the training and the evaluation loop waits for the device.

A GPU computes asynchronously: an operation whose result the CPU must see (a Python number, an output size that depends
on the data, a copy to pageable memory) drains its queue. These tests treat the CPU as such a device: they record the
operations that would synchronize.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from transfer import DataSpec, Task
from transfer.builtin.metrics import MAX_PENDING_BATCHES, MeanOf
from transfer.builtin.tasks import Classification, MultiLabel, Regression
from transfer.config.check import load_config
from transfer.config.torch_metrics import TorchMetric
from transfer.data.batch import Batch
from transfer.feature_cache.loader import StageInputs
from transfer.training.build import build
from transfer.training.engine import Trainer
from transfer.training.evaluation import PredictionCollector, device_metrics, evaluate
from transfer.training.events import ignore_events
from transfer.training.experiment import Experiment
from transfer_text.models import bilstm, embedding, textcnn

SYNCHRONIZING = {
    "_local_scalar_dense",  # .item(), float(tensor), if tensor:
    "nonzero",
    "masked_select",
    "bincount",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "histc",
    "repeat_interleave",
    "equal",
    "is_nonzero",
}


class RecordSynchronizations(TorchDispatchMode):
    """Record the operations that would wait for an asynchronous device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean_index = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in SYNCHRONIZING or boolean_index:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def synchronizations() -> Iterator[list[str]]:
    with RecordSynchronizations() as mode:
        yield mode.names


def experiment(config: dict[str, Any], *overrides: str) -> Experiment:
    return build(load_config(config, ["backbone.dropout=0.1", *overrides]), ignore_events).experiment


def test_recorder_finds_synchronizing_operations() -> None:
    values = torch.arange(4.0)
    with synchronizations() as names:
        float(values.sum())
        values[values > 1]
        torch.bincount(values.long())
        values + 1
    assert names == ["_local_scalar_dense", "index", "bincount"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.clip_norm=1.0"],
        ["train.optimizer={name: adamw, lr: 0.01}", "train.scheduler={name: cosine}"],
        ["train.precision=bf16"],
    ],
    ids=["default", "clip", "adamw-cosine", "bf16"],
)
def test_train_step_never_waits(config: dict[str, Any], overrides: list[str]) -> None:
    trainer = Trainer(experiment(config, *overrides))
    trainer.prepare_phase(trainer.experiment.phases[0])
    batches = [batch for batch, _ in zip(trainer.experiment.train.epoch(0), range(3), strict=False)]
    with synchronizations() as names:
        for batch in batches:
            trainer.train_step([batch], examples=len(batch.indices))
    assert names == []


def test_evaluation_waits_only_at_its_end(config: dict[str, Any]) -> None:
    assert evaluation_synchronizations(experiment(config)) == []


def evaluation_synchronizations(built: Experiment) -> list[str]:
    """Return the synchronizing operations of an evaluation up to the end of its last batch."""
    assert built.validation is not None
    batches = list(built.validation.epoch())
    during = list[int]()

    class Source:
        def __len__(self) -> int:
            return len(batches)

        def epoch(self, **_: Any) -> Iterator[Batch]:
            yield from batches

    with synchronizations() as names:
        evaluate(
            built.model,
            built.task,
            StageInputs(Source(), 0, {}),  # type: ignore[arg-type]
            "fp32",
            lambda event: during.append(len(names)),
            "validation",
            collector=PredictionCollector(),
        )
    return names[: during[-1]]


@pytest.mark.parametrize(
    "backbone",
    [
        {"name": "textcnn", "vectors": "mini", "vectors_vocabulary": True, "filters": 4},
        {"name": "bilstm", "vectors": "mini", "hidden_size": 4, "dropout": 0.1},
        {"name": "bilstm", "readout": "max", "dimensions": 6, "hidden_size": 4},
    ],
    ids=["textcnn", "bilstm", "bilstm-max"],
)
def test_text_models_never_wait(backbone: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU: the vectors of all words in order. On the CPU only distinct words are looked up.
    for module in (embedding, textcnn, bilstm):
        monkeypatch.setattr(module, "use_batch_vocabulary", lambda indices: False)
    config = {
        "data": {"name": "mini_reviews", "limit": 40},
        "backbone": backbone,
        "train": {"batch_size": 16, "phases": [{"epochs": 1}]},
    }
    built = build(load_config(config), ignore_events).experiment
    trainer = Trainer(built)
    trainer.prepare_phase(built.phases[0])
    batches = list(built.train.epoch(0))
    assert len({batch.inputs.shape for batch in batches}) > 2
    with synchronizations() as names:
        for batch in batches:
            trainer.train_step([batch], examples=len(batch.indices))
    assert names == []
    assert evaluation_synchronizations(built) == []


@pytest.mark.parametrize("task_class", [Classification, MultiLabel, Regression], ids=lambda task: task.__name__.lower())
def test_metrics_of_built_in_tasks_need_no_data(task_class: type[Task]) -> None:
    """Tensors on the meta device have no data: an operation that needs any raises an error."""
    kind = next(iter(task_class.targets))
    task = task_class(DataSpec({"x": "x"}, kind, ("a", "b", "c")))  # type: ignore[call-arg]
    outputs, targets = torch.empty(16, 3, device="meta"), torch.empty(16, 3, device="meta")
    if kind == "class":
        targets = torch.empty(16, dtype=torch.int64, device="meta")
    losses, predictions = task.loss(outputs, targets), task.predictions(outputs)
    assert losses.shape == (16,)
    for metric in device_metrics(task, torch.device("meta")).values():
        metric.update(predictions, targets)
        assert metric.metric_state  # counts the batch


def test_metrics_of_torchmetrics_never_wait() -> None:
    task = Classification(DataSpec({"x": "x"}, "class", ("a", "b", "c")))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    targets, scores = torch.randint(3, (16,), generator=generator), torch.rand(16, 3, generator=generator)
    for name in ("auroc", "mcc", "f1_score", "calibration_error"):
        metric = TorchMetric(name, {}, "").make(DataSpec(("x",), "class", ("a", "b", "c")), task)
        with synchronizations() as names:
            for _ in range(20):
                metric.update(scores, targets)
        assert names == [], name


@pytest.mark.parametrize(
    ("name", "reference"),
    [("accuracy", MulticlassAccuracy(5, average="micro")), ("f1_macro", MulticlassF1Score(5, average="macro"))],
    ids=["accuracy", "f1_macro"],
)
def test_metric_of_classification_equals_torchmetrics(name: str, reference: Metric) -> None:
    ours = Classification(DataSpec({"x": "x"}, "class", tuple("abcde"))).metrics()[name]
    generator = torch.Generator().manual_seed(0)
    for size in (7, 1, 30):
        predictions, targets = torch.randint(4, (2, size), generator=generator)  # class e never occurs
        ours.update(predictions, targets)
        reference.update(predictions, targets)
    assert torch.equal(ours.compute(), reference.compute())
    assert ours.update_count == reference.update_count
    for _ in range(2 * MAX_PENDING_BATCHES + 1):  # more batches than are counted together
        ours.update(predictions, targets)
        reference.update(predictions, targets)
    for state in ("tp", "fp", "fn"):  # ours leaves true negatives out
        assert torch.equal(ours.metric_state[state], reference.metric_state[state]), state
    copied = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    copied.update(torch.tensor([1]), torch.tensor([2]))
    assert copied.compute() < ours.compute()  # the value from before the update is not kept
    ours.reset()
    assert not any(value.any() for value in ours.metric_state.values())


def test_mean_of_equals_torch_mean_with_nan() -> None:
    metric = MeanOf(lambda predictions, targets: (predictions - targets).abs())
    for predictions in (torch.tensor([1.0, 2.0]), torch.tensor([6.0])):
        metric.update(predictions, torch.zeros_like(predictions))
    assert metric.compute() == 3
    metric.update(torch.tensor([float("nan")]), torch.zeros(1))
    assert metric.compute().isnan()
