"""How much a figure of a few runs may be trusted: mean, spread, and intervals by the bootstrap (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
"""Of all intervals."""
RESAMPLES = 10_000
_SEED = 1979  # of the resampling, so that the same figures always give the same interval

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Spread:
    """A figure over several runs.

    Args:
        mean: Over the runs.
        standard_deviation: Between the runs, with n - 1 in the denominator; None of a single run.
        interval: Holds the mean of ever more such runs in 95 of 100 cases; None of a single run.
        values: One per run.
    """

    mean: float
    standard_deviation: float | None
    interval: Interval | None
    values: tuple[float, ...]

    def __str__(self) -> str:
        of = "" if self.standard_deviation is None else f" ± {self.standard_deviation:.4f}"
        return f"{self.mean:.4f}{of}"


@dataclass(frozen=True)
class Difference:
    """A difference of two means over runs.

    Args:
        mean: Of the one less that of the other.
        interval: Of the difference; None where nothing tells how large the noise is.
    """

    mean: float
    interval: Interval | None

    @property
    def within_noise(self) -> bool:
        """The interval holds zero; without one nothing can be told."""
        return self.interval is not None and self.interval[0] <= 0 <= self.interval[1]

    def __str__(self) -> str:
        interval = "" if self.interval is None else f" ({self.interval[0]:+.4f} to {self.interval[1]:+.4f})"
        return f"{self.mean:+.4f}{interval}"


def spread(values: Sequence[float]) -> Spread:
    """Sum up one figure of several runs."""
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if len(found) < 2:
        return Spread(mean, None, None, tuple(values))
    return Spread(mean, float(found.std(ddof=1)), _interval(mean, _deviations(found, 0)), tuple(values))


def difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    paired: bool,
    standard_error_of_examples: float | None = None,
) -> Difference:
    """Return the difference of two means over runs, with an interval for both of its noises.

    Another seed would give other runs: that noise is resampled. Other test examples would give other figures: that
    noise adds to it as a normal error.

    Args:
        ours: A figure of each run.
        theirs: The same figure of each run of the other kind.
        paired: Runs at the same place had the same seed: their differences are resampled, not the two apart.
        standard_error_of_examples: Of the difference over test examples (:func:`standard_error`), where it is known.
    """
    one, other = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    mean = float(one.mean() - other.mean())
    several = min(len(one), len(other)) > 1
    if not several and standard_error_of_examples is None:
        return Difference(mean, None)
    deviations = np.zeros(RESAMPLES)
    if several and paired:
        deviations += _deviations(one - other, 0)
    elif several:
        deviations += _deviations(one, 0) - _deviations(other, 1)
    if standard_error_of_examples is not None:
        deviations += np.random.default_rng((_SEED, 2)).normal(0, standard_error_of_examples, RESAMPLES)
    return Difference(mean, _interval(mean, deviations))


def resamples(count: int, times: int) -> list[npt.NDArray[np.int64]]:
    """Return so many draws of all of ``count`` examples with replacement, always the same ones."""
    generator = np.random.default_rng((_SEED, 3))
    return [generator.integers(count, size=count) for _ in range(times)]


def standard_error(resampled: Sequence[float]) -> float:
    """Return the standard error of a figure, given what it is on each resample."""
    return float(np.std(np.asarray(resampled, dtype=np.float64), ddof=1))


def _interval(mean: float, deviations: Floats) -> Interval:
    low, high = np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean + float(low), mean + float(high)


def _deviations(values: Floats, stream: int) -> Floats:
    """Return by how much resampled means differ from the mean, (RESAMPLES,).

    Percentiles of resampled means are too narrow for few values (Hesterberg 2015, section 4.1): those of five hold the
    true mean in 83 of 100 cases. So the deviations are stretched by as much as Student's interval is wider than the
    normal one.
    """
    count = len(values)
    drawn = np.random.default_rng((_SEED, stream)).integers(count, size=(RESAMPLES, count))
    normal = NormalDist().inv_cdf((1 + LEVEL) / 2)
    stretch = student_quantile(count - 1) / normal * math.sqrt(count / (count - 1))
    found: Floats = (values[drawn].mean(axis=1) - values.mean()) * stretch
    return found


def student_quantile(degrees_of_freedom: int) -> float:
    """Return the t that a Student-distributed value exceeds in size in 5 of 100 cases."""
    low, high = 0.0, 16.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, degrees_of_freedom) < LEVEL else (low, middle)
    return high


def _student_within(t: float, degrees_of_freedom: int) -> float:
    """Return the probability that a Student-distributed value is within -t and t (Abramowitz and Stegun, 26.7.3-4)."""
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
