"""The search space of a sweep: its YAML file, samplers and pruners."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from transfer.config.component import error_location
from transfer.config.option_schema import Block, validate
from transfer.config.train_settings import Count
from transfer.config.yaml_document import Document, read_document
from transfer.errors import ConfigError, Problem, UserError, unknown_name
from transfer.runs.check import check

if TYPE_CHECKING:
    import optuna

MAX_CHECKED_CONFIGS = 200
"""Maximum number of configs of a space that are checked before the first trial."""
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "grid": "GridSampler", "cmaes": "CmaEsSampler"}
PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
}
FOLDER, DECIDED = "folder", "why"
"""Trial attributes in the study: the folder of its run, and the reason why it failed or was pruned."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Scalar = bool | int | float | str | None


class Range(Block):
    """Range of values of one key. Exactly one of the four forms is given.

    Args:
        uniform: Bounds of a number that is drawn uniformly.
        log: Bounds of a positive number that is drawn uniformly on a logarithmic scale.
        integers: Bounds of an integer that is drawn uniformly.
        log_integers: Bounds of a positive integer that is drawn uniformly on a logarithmic scale.
    """

    uniform: tuple[Number, Number] | None = None
    log: tuple[Number, Number] | None = None
    integers: tuple[int, int] | None = None
    log_integers: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _one(self) -> Range:
        if len(given := self.model_fields_set) != 1:
            raise ValueError(
                "it should be one of {uniform: [a, b]}, {log: [a, b]}, {integers: [a, b]}, {log_integers: [a, b]}"
            )
        low, high = self.bounds
        if not low < high:
            raise ValueError("it should be ascending: [lowest, highest]")
        if low <= 0 and given & {"log", "log_integers"}:
            raise ValueError("it should start above zero, because the logarithm of zero is not finite")
        return self

    @property
    def bounds(self) -> tuple[Any, Any]:
        """Lowest and highest value."""
        forms = (self.uniform, self.log, self.integers, self.log_integers)
        bounds: tuple[Any, Any] = next(form for form in forms if form is not None)
        return bounds


class Settings(Block):
    """Settings of the search: the key ``sweep`` of a space file.

    Args:
        trials: Number of trials, failed trials included.
        sampler: Sampler by name (tpe, random, grid or cmaes) with the options of Optuna's class.
        pruner: Pruner by name (none, median, percentile, successive_halving or hyperband) with the options of Optuna's
            class.
    """

    trials: Count = 20
    sampler: dict[str, Any] = Field(default_factory=lambda: {"name": "tpe", "seed": 0})
    pruner: dict[str, Any] = Field(default_factory=lambda: {"name": "median"})


@dataclass(frozen=True)
class Space:
    """A checked space file.

    Args:
        settings: Settings of the search.
        keys: Choices by name, or range, of each config key.
        document: Parsed file with the location of each value.
    """

    settings: Settings
    keys: Mapping[str, dict[str, Any] | Range]
    document: Document

    def examples(self, key: str) -> list[Any]:
        """Return all choices of a key, or both ends of its range."""
        values = self.keys[key]
        return list(values.values()) if isinstance(values, dict) else list(values.bounds)

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return the values of a trial. Values that a killed process drew for the trial are returned again."""
        return {key: _draw(trial, key, values) for key, values in self.keys.items()}

    def grid(self) -> dict[str, list[Any]]:
        """Return the choices of each key for the sampler ``grid``."""
        return {
            key: list(values) if isinstance(values, dict) else list(values.bounds) for key, values in self.keys.items()
        }


def _draw(trial: optuna.Trial, key: str, values: dict[str, Any] | Range) -> Any:
    if isinstance(values, dict):
        return values[trial.suggest_categorical(key, list(values))]
    low, high = values.bounds
    if values.integers is not None or values.log_integers is not None:
        return trial.suggest_int(key, low, high, log=values.log_integers is not None)
    return trial.suggest_float(key, low, high, log=values.log is not None)


def read_space(path: str | Path) -> Space:
    """Read and check a space file: choices or a range for each config key, and optionally the key ``sweep``.

    Raises:
        ConfigError: The file has problems; the error contains all of them.
    """
    document = read_document(path)
    settings, problems = validate(Settings, document.data.get("sweep") or {}, document, ("sweep",), "sweep")
    keys: dict[str, dict[str, Any] | Range] = {}
    for key, values in document.data.items():
        if key == "sweep":
            continue
        where = document.location((key,))
        if isinstance(values, list):
            # Optuna stores scalar choices only; the JSON text is the name of a choice of any type.
            named = {json.dumps(value): value for value in values}
            if len(named) < max(2, len(values)):
                problems.append(Problem(f"{key} has too few choices: expected 2 or more different values", where))
            keys[key] = named
        elif isinstance(values, dict):
            bounds, range_problems = validate(Range, values, document, (key,), key)
            problems += range_problems
            if bounds is not None:
                keys[key] = bounds
        else:
            fix = f"write {key}: [choice, choice], or {key}: {{log: [1.0e-5, 0.1]}}"
            problems.append(
                Problem(f"{key} is wrong: expected a list of choices or a range, got {values!r}", where, (), fix)
            )
    if not keys and not problems:
        fix = "add a line such as train.optimizer.lr: {log: [1.0e-5, 0.1]}"
        problems.append(
            Problem("the space is empty: expected a config key with choices or a range", document.source, (), fix)
        )
    if settings is not None:
        problems += _problems_of("sampler", settings.sampler, SAMPLERS, document)
        problems += _problems_of("pruner", settings.pruner, PRUNERS, document)
    if problems or settings is None:
        raise ConfigError.of(problems)
    space = Space(settings, keys, document)
    if settings.sampler["name"] == "grid" and any(isinstance(values, Range) for values in keys.values()):
        where = document.location(("sweep", "sampler"))
        raise ConfigError(
            "sampler 'grid' is not possible here: expected choices only, got a range", where=where, fix="use tpe"
        )
    # Constructing them checks the values of their options.
    with error_location(document.location(("sweep",))):
        make_sampler(space, 0)
        make_pruner(space)
    return space


def _problems_of(what: str, block: Mapping[str, Any], classes: Mapping[str, str], document: Document) -> list[Problem]:
    """Return the problems with the name of a sampler or pruner and the names of its options."""
    optuna = import_optuna()
    name, where = str(block.get("name")), document.location(("sweep", what))
    if name not in classes:
        return [unknown_name(what, name, classes, where=where, fix=f"choose a {what}")]
    cls = getattr(getattr(optuna, f"{what}s"), classes[name])
    options = sorted(set(inspect.signature(cls).parameters) - {"self", "search_space"})  # core sets the search space
    return [
        Problem(f"{what} {name!r} has no option {key!r}", document.location(("sweep", what, key)), tuple(options))
        for key in block
        if key != "name" and key not in options
    ]


def import_optuna() -> Any:
    """Import Optuna, or raise an error with the command that installs it."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("sweeps need Optuna, which is not installed", fix="pip install 'transferkit[optuna]'")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def make_sampler(space: Space, number: int) -> Any:
    """Return the sampler that draws trial ``number``.

    Its random seed is derived from the configured seed and the number, so that the values of a trial do not depend on
    the process that draws them.
    """
    options = {key: value for key, value in space.settings.sampler.items() if key != "name"}
    name = space.settings.sampler["name"]
    if name == "grid":
        options["search_space"] = space.grid()
    else:
        digest = hashlib.sha256(f"{options.get('seed', 0)} {number}".encode()).digest()
        options["seed"] = int.from_bytes(digest[:4], "big")
    return _make("sampler", getattr(import_optuna().samplers, SAMPLERS[name]), options)


def make_pruner(space: Space) -> Any:
    """Return the pruner of a search space."""
    options = {key: value for key, value in space.settings.pruner.items() if key != "name"}
    return _make("pruner", getattr(import_optuna().pruners, PRUNERS[space.settings.pruner["name"]]), options)


def _make(what: str, cls: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", import_optuna().exceptions.ExperimentalWarning)
        try:
            return cls(**options)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the options of the {what} are wrong: {error}") from error
        except ImportError as error:
            raise UserError(
                f"the {what} needs a package that is not installed: {error}", fix=f"choose another {what}"
            ) from error


def trial_overrides(overrides: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Return the overrides of a trial: the overrides of the sweep, then the drawn values."""
    drawn = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return [*overrides, *drawn, "train.score_test=false", "train.report=false"]


def check_space(config: str | Path, space: Space, overrides: Sequence[str] = ()) -> Any:
    """Check the configs of a space: each choice and both ends of each range, and all combinations if they are few.

    Returns:
        The primary metric, by which trials are compared.

    Raises:
        ConfigError: A config has problems; the error contains the line of the space.
    """
    examples = {key: space.examples(key) for key in space.keys}
    # One change from the first values at a time finds every wrong value, even if there are too many combinations.
    first = {key: values[0] for key, values in examples.items()}
    combinations = [first, *({**first, key: value} for key, values in examples.items() for value in values[1:])]
    if math.prod(map(len, examples.values())) <= MAX_CHECKED_CONFIGS:
        combinations += [dict(zip(examples, values, strict=True)) for values in product(*examples.values())]
    problems: list[Problem] = []
    metric = None
    for values in islice(combinations, 2 * MAX_CHECKED_CONFIGS):
        try:
            _, parts = check(config, trial_overrides(overrides, values))
            metric = parts.task.primary_metric
        except ConfigError as error:
            problems += [_in_space(problem, values, space) for problem in error.problems]
    if problems:
        # A wrong value is found once for each combination that contains it.
        raise ConfigError.of(list({(p.where, p.message): p for p in problems}.values()))
    return metric


def _in_space(problem: Problem, values: Mapping[str, Any], space: Space) -> Problem:
    """Return the problem with the line of the space as its location, if the space set the wrong value."""
    for key, value in values.items():
        if problem.where and problem.where.startswith(f"override '{key}="):
            return replace(problem, where=f"{space.document.location((key,))} ({key}={json.dumps(value)})")
    return problem
