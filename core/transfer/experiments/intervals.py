"""Mean, standard deviation and confidence intervals of a metric over several runs.

Intervals are expanded percentile bootstrap intervals (Hesterberg 2015): percentiles of resampled means (Efron 1979),
widened by the ratio of Student's t quantile to the normal quantile, because plain percentiles are too narrow for the
three to ten runs that are usual here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from transfer.interfaces import Task

LEVEL = 0.95
"""Confidence level of all intervals."""
RESAMPLES = 10_000
"""Number of bootstrap resamples of the runs."""
_SEED = 1979  # fixed, so that the same values always have the same interval

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]
Bounds = tuple[float | None, float | None]
"""Lowest and highest possible value of a metric; None if it is not bounded on that side."""

UNBOUNDED: Bounds = (None, None)

# The plot bounds of these metrics in torchmetrics are the usual range of a plot: the metric itself can be outside.
_WIDER_THAN_PLOTTED = (
    *("CohenKappa", "MatthewsCorrCoef", "HingeLoss", "CosineSimilarity", "ExplainedVariance", "KendallRankCorrCoef"),
    "CoverageError",
)


@dataclass(frozen=True)
class Spread:
    """A metric over several runs.

    Args:
        mean: Mean over the runs.
        standard_deviation: Sample standard deviation over the runs (n - 1 in the denominator); None if there is only
            one run.
        interval: 95 % confidence interval of the mean; None if its noise cannot be estimated.
        values: Value of the metric in each run.
    """

    mean: float
    standard_deviation: float | None
    interval: Interval | None
    values: tuple[float, ...]

    def __str__(self) -> str:
        deviation = "" if self.standard_deviation is None else f" ± {self.standard_deviation:.4f}"
        return f"{self.mean:.4f}{deviation}"


@dataclass(frozen=True)
class Difference:
    """A difference of two means over runs.

    Args:
        mean: First mean minus second mean.
        interval: 95 % confidence interval of the difference; None if its noise cannot be estimated.
    """

    mean: float
    interval: Interval | None

    @property
    def within_noise(self) -> bool:
        """Whether the interval contains zero; False if there is no interval."""
        return self.interval is not None and self.interval[0] <= 0 <= self.interval[1]

    def __str__(self) -> str:
        interval = "" if self.interval is None else f" ({self.interval[0]:+.4f} to {self.interval[1]:+.4f})"
        return f"{self.mean:+.4f}{interval}"


def metric_bounds(task: Task, metric: str) -> Bounds:
    """Return the range of possible values of one of a task's metrics, such as (0, 1) for an accuracy.

    Args:
        task: Task that computes the metric.
        metric: Name of the metric. A loss has no bounds, because a task may define any loss.
    """
    measure = task.metrics().get(metric)
    if measure is None or type(measure).__name__.endswith(_WIDER_THAN_PLOTTED):
        return UNBOUNDED
    return getattr(measure, "plot_lower_bound", None), getattr(measure, "plot_upper_bound", None)


def spread(
    values: Sequence[float], bounds: Bounds = UNBOUNDED, standard_error_of_examples: float | None = None
) -> Spread:
    """Return mean, standard deviation and confidence interval of a metric over several runs.

    Args:
        values: Value of the metric in each run.
        bounds: Range of the metric (:func:`metric_bounds`). The interval does not extend beyond it.
        standard_error_of_examples: Standard error of the mean over test examples (:func:`standard_error`). None omits
            this source of noise.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    deviation = float(array.std(ddof=1)) if len(array) > 1 else None
    if deviation is None and standard_error_of_examples is None:
        return Spread(mean, None, None, tuple(values))
    deviations = np.zeros(RESAMPLES) if deviation is None else _deviations(array, 0)
    if standard_error_of_examples is not None:
        deviations = deviations + _normal_errors(standard_error_of_examples)
    return Spread(mean, deviation, _clip(_interval(mean, deviations), bounds), tuple(values))


def spread_of_folds(values: Sequence[float], folds: int, bounds: Bounds = UNBOUNDED) -> Spread:
    """Return mean, standard deviation and confidence interval of a metric over the folds of a cross-validation.

    The training splits of the folds overlap, so their metrics are not independent, and the usual interval is too
    narrow. The variance of the mean is corrected by the ratio of test to training examples (Nadeau and Bengio 2003).

    Args:
        values: Value of the metric in each fold of each repetition.
        folds: Number of folds of a repetition.
        bounds: Range of the metric (:func:`metric_bounds`). The interval does not extend beyond it.
    """
    array = np.asarray(values, dtype=np.float64)
    mean, deviation = float(array.mean()), float(array.std(ddof=1))
    error = deviation * math.sqrt(1 / len(array) + 1 / (folds - 1))
    half = student_quantile(len(array) - 1) * error
    return Spread(mean, deviation, _clip((mean - half, mean + half), bounds), tuple(values))


def difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    paired: bool,
    standard_error_of_examples: float | None = None,
    bounds: Bounds = UNBOUNDED,
) -> Difference:
    """Return the difference of two means over runs with its confidence interval.

    The interval covers two sources of noise. Other seeds would give other runs: the runs are resampled. Other test
    examples would give other values: this adds a normal error.

    Args:
        ours: Metric of each run.
        theirs: Same metric of each run of the other kind.
        paired: Whether runs at the same index have the same seed. If so, their differences are resampled.
        standard_error_of_examples: Standard error of the difference over test examples (:func:`standard_error`). None
            omits this source of noise.
        bounds: Range of the metric (:func:`metric_bounds`).
    """
    one, other = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    mean = float(one.mean() - other.mean())
    has_several_runs = min(len(one), len(other)) > 1
    if not has_several_runs and standard_error_of_examples is None:
        return Difference(mean, None)
    deviations = np.zeros(RESAMPLES)
    if has_several_runs and paired:
        deviations += _deviations(one - other, 0)
    elif has_several_runs:
        deviations += _deviations(one, 0) - _deviations(other, 1)
    if standard_error_of_examples is not None:
        deviations += _normal_errors(standard_error_of_examples)
    low, high = bounds
    # Two values between 0 and 1 differ by at most 1 in either direction.
    width = None if low is None or high is None else high - low
    return Difference(mean, _clip(_interval(mean, deviations), (None if width is None else -width, width)))


def resamples(count: int, times: int) -> list[npt.NDArray[np.int64]]:
    """Return ``times`` bootstrap resamples of the indices below ``count``; the same ones in every call."""
    generator = np.random.default_rng((_SEED, 3))
    return [generator.integers(count, size=count) for _ in range(times)]


def standard_error(resampled: Sequence[float]) -> float:
    """Return the bootstrap standard error of a statistic."""
    return float(np.std(np.asarray(resampled, dtype=np.float64), ddof=1))


def _normal_errors(standard_error_of_examples: float) -> Floats:
    return np.random.default_rng((_SEED, 2)).normal(0, standard_error_of_examples, RESAMPLES)


def _interval(mean: float, deviations: Floats) -> Interval:
    low, high = np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean + float(low), mean + float(high)


def _clip(interval: Interval, bounds: Bounds) -> Interval:
    """Return an interval without its part beyond the bounds."""
    low, high = interval
    lowest, highest = bounds
    return low if lowest is None else max(low, lowest), high if highest is None else min(high, highest)


def _deviations(values: Floats, stream: int) -> Floats:
    """Return the deviations of resampled means from the mean, expanded for few values, (RESAMPLES,).

    Percentiles of resampled means are too narrow for few values: those of five values contain the true mean in 83 of
    100 cases. The deviations are therefore multiplied by t / z * sqrt(n / (n - 1)), which makes the interval of normal
    values as wide as Student's t interval (expanded percentile bootstrap, Hesterberg 2015, section 4.1).

    Args:
        values: Values to resample, (N,).
        stream: Number of the random stream; two samples that are resampled independently have different streams.
    """
    count = len(values)
    drawn = np.random.default_rng((_SEED, stream)).integers(count, size=(RESAMPLES, count))
    normal = NormalDist().inv_cdf((1 + LEVEL) / 2)
    expansion = student_quantile(count - 1) / normal * math.sqrt(count / (count - 1))
    deviations: Floats = (values[drawn].mean(axis=1) - values.mean()) * expansion
    return deviations


def student_quantile(degrees_of_freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t distribution."""
    # Bisection on the distribution function: scipy would be a large dependency for this one number.
    low, high = 0.0, 16.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, degrees_of_freedom) < LEVEL else (low, middle)
    return high


def _student_within(t: float, degrees_of_freedom: int) -> float:
    """Return the probability of a value between -t and t under Student's t distribution.

    It is the finite series of Abramowitz and Stegun, 26.7.3 for odd and 26.7.4 for even degrees of freedom.
    """
    angle = math.atan(t / math.sqrt(degrees_of_freedom))
    odd = degrees_of_freedom % 2
    if degrees_of_freedom == 1:
        return 2 / math.pi * angle
    term = math.cos(angle) if odd else 1.0
    total = term
    for k in range(2 + odd, degrees_of_freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
