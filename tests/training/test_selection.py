"""Selection of the best epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import transfer
from transfer import ConfigError, DataSpec, MeanOf
from transfer.builtin.tasks import Classification
from transfer.training.events import EpochEnded, Note
from transfer.training.selection import MetricSample, Selection
from transfer.training.state import EpochSums, Progress

TASK = Classification(DataSpec(("x",), "class", ("no", "yes")))
ACCURACY = Selection.of(TASK, None)


def best_epochs(selection: Selection, epochs: Sequence[tuple[float, float]], error: float = 0.05) -> list[int]:
    """Return the best epoch after each epoch, given as accuracy and loss."""
    progress, best = Progress(), []
    for accuracy, loss in epochs:
        progress.epoch = EpochSums(batches=1, examples=1, seconds=1.0)
        progress.end_epoch({}, {"accuracy": accuracy, "loss": loss}, 0.0, selection, {"standard_error": error})
        assert progress.best is not None
        best.append(progress.best["epoch"])
    return best


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([(0.70, 0.6), (0.72, 0.5), (0.74, 0.4)], [1, 2, 3]),
        # Within one standard error of the highest accuracy, the loss decides in both directions.
        ([(0.90, 0.5), (0.88, 0.3), (0.90, 0.4)], [1, 2, 2]),
        # A difference of more than one standard error is decided by the accuracy.
        ([(0.90, 0.5), (0.84, 0.3)], [1, 1]),
        ([(0.80, 0.3), (0.90, 0.5)], [1, 2]),
        # An accuracy that falls slowly does not move the selection away from the highest one.
        ([(0.90, 0.5), (0.86, 0.4), (0.82, 0.3), (0.78, 0.2)], [1, 2, 2, 2]),
        # If the highest accuracy rises away from the best epoch, the new epoch is taken.
        ([(0.80, 0.3), (0.84, 0.4), (0.88, 0.5)], [1, 1, 3]),
        ([(0.80, 0.3), (0.80, 0.3)], [1, 1]),
    ],
)
def test_loss_decides_within_one_standard_error(epochs: list[tuple[float, float]], expected: list[int]) -> None:
    assert best_epochs(ACCURACY, epochs) == expected


def test_ties_only_without_standard_error() -> None:
    assert best_epochs(ACCURACY, [(0.90, 0.5), (0.89, 0.3), (0.90, 0.4)], error=0.0) == [1, 1, 3]


def test_loss_and_last_epoch_can_be_selected() -> None:
    epochs = [(0.9, 0.5), (0.5, 0.4), (0.9, 0.45)]
    assert best_epochs(Selection.of(TASK, "loss"), epochs) == [1, 2, 2]
    assert best_epochs(Selection.of(TASK, "last"), epochs) == [1, 2, 3]


def test_unknown_metric_and_metric_without_direction_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown metric 'acuracy'") as caught:
        Selection.of(TASK, "acuracy")
    assert caught.value.problems[0].available == ("loss", "accuracy", "f1_macro", "last")

    class WithMean(Classification):
        def metrics(self) -> dict[str, Any]:
            return {"accuracy": MulticlassAccuracy(2), "mean": MeanOf(lambda p, t: p.float())}

    with pytest.raises(ConfigError, match="'mean' has no direction"):
        Selection.of(WithMean(DataSpec(("x",), "class", ("no", "yes"))), "mean")
    assert Selection.of(TASK, "f1_macro") == Selection("f1_macro", higher_is_better=True)


def sample(metric: Any, predictions: Tensor, targets: Tensor) -> MetricSample:
    collected = MetricSample("metric", metric)
    for start in range(0, len(targets), 32):
        collected.append(predictions[start : start + 32], targets[start : start + 32])
    return collected


def test_standard_error_equals_that_of_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(2, (500,), generator=generator)
    predictions = torch.where(torch.rand(500, generator=generator) < 0.8, targets, 1 - targets)
    accuracy = sample(MulticlassAccuracy(2, average="micro"), predictions, targets).standard_error()
    assert accuracy == pytest.approx((0.8 * 0.2 / 500) ** 0.5, rel=0.3)
    numbers = torch.randn(500, 1, generator=generator)
    error = sample(MeanAbsoluteError(), numbers, torch.zeros(500, 1)).standard_error()
    assert error == pytest.approx(float(numbers.abs().std()) / 500**0.5, rel=0.3)


def test_standard_error_of_large_split_uses_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, predictions = torch.zeros(4000, dtype=torch.long), (torch.arange(4000) * 7919 % 10 < 2).long()
    complete = sample(MulticlassAccuracy(2, average="micro"), predictions, targets).standard_error()
    monkeypatch.setattr("transfer.training.selection.MAX_EXAMPLES", 1500)
    assert sample(MulticlassAccuracy(2, average="micro"), predictions, targets).standard_error() < 3 * complete + 0.01


def test_no_standard_error_for_single_example_or_failing_metric() -> None:
    one = torch.zeros(1, dtype=torch.long)
    assert sample(MulticlassAccuracy(2), one, one).standard_error() == 0.0

    def fail(predictions: Tensor, targets: Tensor) -> Tensor:
        raise ValueError("not defined")

    assert sample(MeanOf(fail), one.repeat(9), one.repeat(9)).standard_error() == 0.0


def test_equal_predictions_are_recorded() -> None:
    targets = torch.tensor([0, 1, 0, 0])
    assert sample(MulticlassF1Score(2), torch.zeros_like(targets), targets).facts()["constant_prediction"] == 0
    assert "constant_prediction" not in sample(MulticlassF1Score(2), targets, targets).facts()


def run(config: dict[str, Any], output: Path, **data: Any) -> tuple[transfer.Run, list[Any]]:
    events: list[Any] = []
    config["data"] |= data
    config["train"]["report"] = False
    return transfer.run(config, output=output, observe=events.append), events


def test_last_epoch_is_kept(config: dict[str, Any], tmp_path: Path) -> None:
    config["train"] |= {"select": "last", "phases": [{"epochs": 3}]}
    done, events = run(config, tmp_path)
    assert done.summary["best_epoch"] == 3
    assert done.summary["validation"] == [e.record for e in events if isinstance(e, EpochEnded)][-1]["validation"]


def test_small_validation_split_is_warned_about(config: dict[str, Any], tmp_path: Path) -> None:
    _, events = run(config, tmp_path)
    assert any("has only 12 examples" in e.text for e in events if isinstance(e, Note))


def test_dropped_phase_is_reported(config: dict[str, Any], tmp_path: Path) -> None:
    # The second phase diverges.
    config["train"] |= {"select": "loss", "phases": [{"epochs": 1}, {"epochs": 1, "lr": 50.0}]}
    done, _ = run(config, tmp_path, distance=4.0)
    assert done.summary["best_epoch"] == 1
    (warning,) = (text for text in done.summary["warnings"] if "not used" in text)
    assert warning.startswith("the weights of phase 2 are not used: the best epoch is 1, in phase 1")


def test_all_examples_train_without_validation(config: dict[str, Any], tmp_path: Path) -> None:
    config["data"]["validation"] = 0
    done, events = run(config, tmp_path)
    assert done.summary["examples"] == {"train": 120, "test": 40}
    assert (done.summary["best_epoch"], done.summary["validation"]) == (2, {})
    assert [e.record["validation"] for e in events if isinstance(e, EpochEnded)] == [{}, {}]
    assert transfer.evaluate(done.folder) == done.summary["test"]
    page = transfer.report(done.folder).read_text(encoding="utf-8")
    assert "the last one" in page


def test_settings_that_need_validation_are_refused_without_it(config: dict[str, Any], tmp_path: Path) -> None:
    config["data"]["validation"] = 0
    config["train"] |= {
        "select": "loss",
        "phases": [{"epochs": 2, "patience": 1}],
        "scheduler": {"name": "plateau"},
    }
    with pytest.raises(ConfigError) as caught:
        run(config, tmp_path)
    assert [problem.message.split()[0] for problem in caught.value.problems] == [
        "train.select",
        "train.phases.0.patience",
        "train.scheduler",
    ]
