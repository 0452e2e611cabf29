"""LR finder: train a few steps at increasing learning rates, and suggest a rate that is safely below divergence."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from transfer.config.check import load_config
from transfer.config.run_config import RunConfig
from transfer.data.batch import Batch
from transfer.errors import RunError, TrainingError
from transfer.feature_cache.loader import StageInputs
from transfer.reports import charts
from transfer.system.atomic_files import write_atomically
from transfer.system.ranks import refuse_several
from transfer.training import freezing
from transfer.training.build import build
from transfer.training.engine import Trainer
from transfer.training.events import Note, Observer
from transfer.training.experiment import Experiment
from transfer.training.optimizer import ParameterGroup

LOWEST, HIGHEST, STEPS = 1e-7, 10.0, 100
SMOOTHING = 0.95
"""Decay of the moving average of the loss, per step of the default number of steps."""
DIVERGED = 4.0
"""The test stops if the smoothed loss exceeds its minimum by this factor."""
MIN_STEPS = 10
WIDTH = 5.0
"""Standard deviation of the Gaussian that smooths the curve, in steps of the default number of steps. It is centered: a
moving average lags behind, which moved the suggestion up by a factor of ten or more."""
SAFETY = 4.0
"""The suggestion is at most this fraction of the highest rate without a rise of the loss (Smith 2017: a third or a
quarter)."""
RISE = 5.0
"""Rise of the smoothed loss above its minimum, in standard errors, that is more than noise."""
MIN_FALL = 5.0
"""Fall of the smoothed loss, in standard errors, from which its slope is more than noise."""


@dataclass(frozen=True)
class RangeTest:
    """Result of a learning-rate range test.

    Args:
        rates: Learning rate of each step, for the parameter group with the highest rate. The rates of other groups are
            proportional.
        losses: Mean loss over the examples of each step.
        smoothed: Losses smoothed by a centered Gaussian, after clipping at twice the first losses.
        steepest: Learning rate at which the smoothed loss falls fastest.
        tenth_of_lowest: A tenth of the learning rate at which the smoothed loss is lowest.
        assignment: Override ``key=value`` that sets the learning rate to ``suggestion``, and others in proportion.
        diverged: Whether the loss diverged before the highest learning rate.
        plot: Path of the SVG file with the curve.
        suggestion: Suggested learning rate: ``steepest``, but at most a quarter of the highest rate at which the
            smoothed loss has not risen.
        falls: Whether the smoothed loss falls by more than noise. Otherwise ``steepest`` is not used.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: float
    tenth_of_lowest: float
    assignment: str
    diverged: bool
    plot: Path
    suggestion: float
    falls: bool


def find_learning_rate(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    steps: int = STEPS,
    output: str | Path | None = None,
    observe: Observer = lambda _: None,
) -> RangeTest:
    """Train the first phase of a config at exponentially increasing learning rates, and suggest a rate (Smith 2017).

    The model is built for the test only; warm-up and scheduler are disabled. The suggestion is the rate at which the
    smoothed loss falls fastest, but at most a quarter of the highest rate at which it has not risen. If the loss falls
    by less than its noise, it is that quarter.

    Args:
        config: Path of a YAML file, or the config as a mapping.
        overrides: Changes to the config, each ``path.to.key=value``.
        lowest: Learning rate of the first step, for the parameter group with the highest rate.
        highest: Learning rate of the last step, for the same group.
        steps: Number of optimizer steps. If the training split has fewer batches, it is repeated.
        output: Path of the SVG file of the curve. None writes ``NAME-find-lr.svg``.
        observe: Function that is called with notes on data and weights.

    Raises:
        UserError: The config, the data or the weights are wrong, or the bounds are invalid.
        TrainingError: The loss was not finite in the first steps.
    """
    refuse_several("transfer find-lr")
    if not 0 < lowest < highest < math.inf or steps < MIN_STEPS:
        raise RunError(
            f"the range test is invalid: expected 0 < lowest < highest and {MIN_STEPS} steps or more, "
            f"got {lowest:g} to {highest:g} in {steps} steps",
            fix="change --lowest, --highest or --steps",
        )
    checked = load_config(config, overrides)
    path = Path(output or f"{checked.name}-find-lr.svg")
    experiment = build(checked, observe).experiment
    if experiment.phases[0].solver == "lbfgs":
        raise RunError(
            "the first phase has no learning rate: its head is solved by L-BFGS",
            fix="add train.recipe.solver=gradient" if checked.train.recipe else "remove solver from the phase",
        )
    rates, losses = _rise(experiment, np.geomspace(lowest, highest, steps).tolist(), observe)
    width = WIDTH * steps / STEPS  # the same part of the curve for any number of steps
    smoothed = _centered(losses, width)
    steepest, bottom = _steepest(rates, smoothed), rates[int(np.argmin(smoothed))]
    bound, falls = _highest_safe(rates, losses, smoothed, width)
    suggestion = min(steepest, bound) if falls else bound
    result = RangeTest(
        tuple(rates),
        tuple(losses),
        tuple(smoothed),
        steepest,
        bottom / 10,
        _assignment(checked, experiment.phases[0].groups, suggestion),
        len(rates) < steps,
        path,
        suggestion,
        falls,
    )
    try:
        write_atomically(path, draw(result, f"{checked.name}: loss at increasing learning rates"))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}", fix="choose another --output") from error
    return result


def _rise(experiment: Experiment, rates: Sequence[float], observe: Observer) -> tuple[list[float], list[float]]:
    """Make a step of the optimizer at each rate until the loss leaves all bounds; return rates and losses."""
    # The test takes a few steps with the current weights: no compilation, no moving average.
    experiment = replace(experiment, options=replace(experiment.options, compile=False, ema=None))
    phase, accumulate = experiment.phases[0], experiment.options.accumulate
    trainer = Trainer(experiment)
    stages = freezing.prefix_length(experiment.model, phase.frozen)
    source = experiment.batches_for(experiment.train, stages, training=True, observe=observe)
    if stages:
        observe(Note(f"training examples {source}"))
    trainer.prepare_phase(phase)
    optimizer = trainer.state.optimizer
    assert optimizer is not None
    fastest = max(group["lr"] for group in optimizer.param_groups)
    fractions = [group["lr"] / fastest for group in optimizer.param_groups]
    batches, done, losses = _batches(source), list[float](), list[float]()
    for rate in rates:
        for group, fraction in zip(optimizer.param_groups, fractions, strict=True):
            group["lr"] = rate * fraction
        step_batches = list(itertools.islice(batches, accumulate))
        examples = sum(len(batch.indices) for batch in step_batches)
        step_losses = trainer.train_step(step_batches, examples=examples, first_stage=source.first_stage)
        loss = sum(batch_loss.item() for batch_loss in step_losses) / examples
        if not math.isfinite(loss):
            break
        done, losses = [*done, rate], [*losses, loss]
        smoothed = _smooth(losses, SMOOTHING ** (STEPS / len(rates)))
        if len(losses) >= MIN_STEPS and smoothed[-1] > DIVERGED * min(smoothed):
            break
    if len(losses) < MIN_STEPS:
        raise TrainingError(
            f"the loss was not finite after {len(losses)} steps, at a learning rate of {rates[len(losses)]:.2g}",
            fix="start at a lower rate (--lowest), or look at the data with transfer preview",
        )
    return done, losses


def _batches(source: StageInputs) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from source.loader.epoch(epoch)


def _smooth(losses: Sequence[float], weight: float) -> list[float]:
    """Return the exponential moving average of the losses, with bias correction."""
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses, 1):
        average = weight * average + (1 - weight) * loss
        smoothed.append(average / (1 - weight**count))
    return smoothed


def _centered(losses: Sequence[float], width: float) -> list[float]:
    """Return the losses, clipped at twice the first ones, smoothed by a Gaussian with this standard deviation."""
    # A loss that diverges by orders of magnitude would otherwise reach back over the steps before it.
    clipped = np.minimum(losses, 2 * np.median(losses[:MIN_STEPS]))
    steps = np.arange(len(losses))
    weights = np.exp(-0.5 * ((steps[:, None] - steps[None]) / width) ** 2)
    return [float(value) for value in weights @ clipped / weights.sum(1)]


def _highest_safe(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], width: float
) -> tuple[float, bool]:
    """Return a quarter of the highest rate without a rise of the loss, and whether the loss falls by more than noise.

    The standard error of the smoothed loss is estimated from differences of successive losses before the minimum.
    """
    # The first values are means over one side of the Gaussian: one of them may be low by chance.
    first = len(smoothed) // 10
    bottom = first + int(np.argmin(smoothed[first:]))
    differences = np.diff(losses[: max(bottom + 1, MIN_STEPS)])
    # The smoothing averages over 2 * sqrt(pi) * width independent losses.
    error = float(np.std(differences)) / math.sqrt(2) / math.sqrt(max(1.0, 2 * math.sqrt(math.pi) * width))
    last = max(index for index, loss in enumerate(smoothed) if loss <= smoothed[bottom] + RISE * error)
    return rates[last] / SAFETY, smoothed[0] - smoothed[bottom] > MIN_FALL * error


def _steepest(rates: Sequence[float], smoothed: Sequence[float]) -> float:
    """Return the rate with the steepest descent of the loss over log(rate), before the minimum of the loss."""
    # The first values are means over one side of the Gaussian: too noisy for a slope.
    first = min(len(smoothed) // 10, int(np.argmin(smoothed)))
    last = max(int(np.argmin(smoothed)) + 1, first + 2)
    slopes = np.gradient(np.asarray(smoothed[first:last]), np.log(rates[first:last]))
    return rates[first + int(np.argmin(slopes))]


def _assignment(config: RunConfig, groups: Sequence[ParameterGroup], rate: float) -> str:
    """Return the override that sets this rate for the group with the highest rate, and other groups in proportion."""
    phase = config.train.phases[0] if config.train.phases else None
    has_phase_rate = phase is not None and phase.lr is not None
    lr = phase.lr if phase is not None and phase.lr is not None else config.optimizer_options.lr
    # All groups are scaled by one factor; layer_decay is a ratio, not a rate.
    factor = rate / max(group.lr for group in groups)

    def scaled(value: float) -> float:
        return float(f"{value * factor:.2g}")

    new = {k: v if k == "layer_decay" else scaled(v) for k, v in lr.items()} if isinstance(lr, Mapping) else scaled(lr)
    return f"{'train.phases.0.lr' if has_phase_rate else 'train.optimizer.lr'}={json.dumps(new)}"


def draw(result: RangeTest, title: str) -> str:
    """Return the curve as SVG: the loss of each step, the smoothed loss, and the two suggested rates."""
    # If training diverged, single losses are huge: the y axis fits the smoothed curve up to its minimum.
    bottom = min(result.losses)
    top = min(max(result.losses), 2 * max(result.smoothed[: int(np.argmin(result.smoothed)) + 1]) - bottom)
    series = {
        name: [(rate, min(loss, top)) for rate, loss in zip(result.rates, losses, strict=True)]
        for name, losses in (("loss", result.losses), ("smoothed", result.smoothed))
    }
    suggested = {result.tenth_of_lowest: "lowest / 10", result.suggestion: "suggestion"}
    marks = {
        rate: f"{name} {rate:.2g}" for rate, name in suggested.items() if result.rates[0] <= rate <= result.rates[-1]
    }
    return charts.standalone(charts.lines(title, series, x_label="learning rate", marks=marks, log_x=True))
