"""Mean, spread and intervals."""

from __future__ import annotations

import numpy as np
import pytest
from torchmetrics import MeanAbsoluteError, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassMatthewsCorrCoef

from transfer import DataSpec
from transfer.builtin.tasks import Classification
from transfer.experiments import intervals as statistics
from transfer.experiments.intervals import (
    difference,
    metric_bounds,
    resamples,
    spread,
    standard_error,
    student_quantile,
)


def test_mean_and_spread() -> None:
    found = spread([0.5, 0.7, 0.6])
    assert found.mean == pytest.approx(0.6)
    assert found.standard_deviation == pytest.approx(0.1)
    assert found.interval is not None
    low, high = found.interval
    assert low < 0.5
    assert high > 0.7
    assert str(found) == "0.6000 ± 0.1000"


def test_one_value_has_no_spread() -> None:
    found = spread([0.5])
    assert (found.mean, found.standard_deviation, found.interval) == (0.5, None, None)


def test_the_same_values_always_give_the_same_interval() -> None:
    assert spread([0.1, 0.4, 0.2, 0.9]) == spread([0.1, 0.4, 0.2, 0.9])


# Tables of Student's distribution.
@pytest.mark.parametrize(("degrees", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216)])
def test_quantiles_of_students_distribution(degrees: int, t: float) -> None:
    assert student_quantile(degrees) == pytest.approx(t, abs=1e-4)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_intervals_of_few_values_hold_the_mean_as_often_as_they_say(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    samples = np.random.default_rng(7).normal(size=(400, count))
    intervals = [spread(sample).interval for sample in samples]
    held = np.mean([interval is not None and interval[0] <= 0 <= interval[1] for interval in intervals])
    assert held == pytest.approx(0.95, abs=0.04)


def test_pairs_take_away_what_both_sides_share() -> None:
    ours, theirs = [0.80, 0.60, 0.70, 0.90, 0.50], [0.78, 0.57, 0.68, 0.87, 0.48]
    paired, apart = (difference(ours, theirs, paired=paired) for paired in (True, False))
    assert paired.mean == apart.mean == pytest.approx(0.024)
    assert not paired.within_noise
    assert apart.within_noise


def test_few_test_examples_are_noise_too() -> None:
    ours, theirs = [0.80, 0.81, 0.80], [0.77, 0.78, 0.78]
    assert not difference(ours, theirs, paired=True).within_noise
    noisy = difference(ours, theirs, paired=True, standard_error_of_examples=0.05)
    assert noisy.within_noise
    assert noisy.interval is not None
    assert noisy.interval[1] - noisy.interval[0] > 2 * 1.9 * 0.05


def test_of_single_runs_only_the_examples_are_known() -> None:
    assert difference([0.9], [0.5], paired=True).interval is None
    assert not difference([0.9], [0.5], paired=True).within_noise
    found = difference([0.9], [0.5], paired=True, standard_error_of_examples=0.1)
    assert found.interval == pytest.approx((0.4 - 0.196, 0.4 + 0.196), abs=0.01)


def test_the_standard_error_over_examples_is_the_known_one() -> None:
    right = np.random.default_rng(0).random(400) < 0.8
    found = standard_error([float(right[indices].mean()) for indices in resamples(400, 500)])
    assert found == pytest.approx(np.sqrt(0.8 * 0.2 / 400), rel=0.1)


def test_interval_of_an_accuracy_is_within_zero_and_one() -> None:
    values = [0.75, 0.85, 1.0]
    unclipped, clipped = spread(values).interval, spread(values, (0.0, 1.0)).interval
    assert unclipped is not None
    assert unclipped[1] > 1
    assert clipped == (unclipped[0], 1.0)


def test_interval_of_a_difference_of_accuracies_is_within_minus_one_and_one() -> None:
    ours, theirs = [1.0, 0.9], [0.1, 0.1]
    unclipped, clipped = (difference(ours, theirs, paired=True, bounds=b) for b in ((None, None), (0.0, 1.0)))
    assert unclipped.interval is not None
    assert unclipped.interval[1] > 1
    assert clipped.interval == (unclipped.interval[0], 1.0)


def test_interval_of_an_error_has_no_upper_bound() -> None:
    interval = spread([0.1, 9.0], (0.0, None)).interval
    assert interval is not None
    assert interval[0] == 0
    assert interval[1] > 9


class WithMetrics(Classification):
    def metrics(self) -> dict[str, Metric]:
        return {
            "accuracy": MulticlassAccuracy(2),
            "error": MeanAbsoluteError(),
            "correlation": MulticlassMatthewsCorrCoef(2),  # torchmetrics plots 0 to 1, but it may be -1
        }


@pytest.mark.parametrize(
    ("metric", "bounds"),
    [("accuracy", (0, 1)), ("error", (0, None)), ("correlation", (None, None)), ("loss", (None, None))],
)
def test_bounds_of_a_metric(metric: str, bounds: tuple[float | None, float | None]) -> None:
    task = WithMetrics(DataSpec(("point",), "class", ("near", "far")))
    assert metric_bounds(task, metric) == bounds
