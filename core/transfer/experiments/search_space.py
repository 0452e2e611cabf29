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
from transfer.errors import ConfigError, Problem, UserError, nearest
from transfer.runs.check import check

if TYPE_CHECKING:
    import optuna

MAX_CHECKED = 200
"""Configs of a space that are checked before anything runs."""
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "grid": "GridSampler", "cmaes": "CmaEsSampler"}
PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
}
FOLDER, DECIDED = "folder", "why"
"""Names of what the study keeps of each trial: its run, and why it failed or was pruned."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Scalar = bool | int | float | str | None


class Range(Block):
    """Values of one key between two bounds: exactly one of the four.

    Args:
        uniform: Numbers, all alike.
        log: Numbers above zero, alike on a logarithmic scale.
        integers: Whole numbers, all alike.
        log_integers: Whole numbers above zero, alike on a logarithmic scale.
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
            raise ValueError("it should rise: [lowest, highest]")
        if low <= 0 and given & {"log", "log_integers"}:
            raise ValueError("it should begin above zero, for there is no logarithm of zero")
        return self

    @property
    def bounds(self) -> tuple[Any, Any]:
        """The lowest and the highest value."""
        found: tuple[Any, Any] = next(
            b for b in (self.uniform, self.log, self.integers, self.log_integers) if b is not None
        )
        return found


class Settings(Block):
    """How a space is searched: the key ``sweep`` of a space file.

    Args:
        trials: How many configs are tried, those that fail included.
        sampler: tpe, random, grid or cmaes, with options of Optuna's class.
        pruner: none, median, percentile, successive_halving or hyperband, with options of Optuna's class.
    """

    trials: Count = 20
    sampler: dict[str, Any] = Field(default_factory=lambda: {"name": "tpe", "seed": 0})
    pruner: dict[str, Any] = Field(default_factory=lambda: {"name": "median"})


@dataclass(frozen=True)
class Space:
    """A space file, checked.

    Args:
        settings: How it is searched.
        keys: For each key of the config its choices by name, or its range.
        document: Where each value was written.
    """

    settings: Settings
    keys: Mapping[str, dict[str, Any] | Range]
    document: Document

    def examples(self, key: str) -> list[Any]:
        """Return every choice of a key, or both ends of its range."""
        values = self.keys[key]
        return list(values.values()) if isinstance(values, dict) else list(values.bounds)

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return a trial's values; what a killed process had drawn for it stays."""
        return {key: _draw(trial, key, values) for key, values in self.keys.items()}

    def grid(self) -> dict[str, list[Any]]:
        """Return the choices of each key, for the sampler ``grid``."""
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
    """Read and check a space file: a key of the config per line, its choices or its range; and ``sweep``.

    Raises:
        ConfigError: With every problem found.
    """
    document = read_document(path)
    settings, problems = validate(Settings, document.data.get("sweep") or {}, document, ("sweep",), "sweep")
    keys: dict[str, dict[str, Any] | Range] = {}
    for key, values in document.data.items():
        if key == "sweep":
            continue
        where = document.location((key,))
        if isinstance(values, list):
            named = {json.dumps(value): value for value in values}
            if len(named) < max(2, len(values)):
                problems.append(Problem(f"{key} has no two different choices, or one twice", where))
            keys[key] = named
        elif isinstance(values, dict):
            found, wrong = validate(Range, values, document, (key,), key)
            problems += wrong
            if found is not None:
                keys[key] = found
        else:
            fix = f"write {key}: [choice, choice], or {key}: {{log: [1.0e-5, 0.1]}}"
            problems.append(
                Problem(f"{key} is {values!r}, which is neither a list of choices nor a range", where, (), fix)
            )
    if not keys and not problems:
        fix = "add a line such as train.optimizer.lr: {log: [1.0e-5, 0.1]}"
        problems.append(Problem("the space names no key of the config", document.source, (), fix))
    if settings is not None:
        problems += _problems_of("sampler", settings.sampler, SAMPLERS, document)
        problems += _problems_of("pruner", settings.pruner, PRUNERS, document)
    if problems or settings is None:
        raise ConfigError.of(problems)
    space = Space(settings, keys, document)
    if settings.sampler["name"] == "grid" and any(isinstance(values, Range) for values in keys.values()):
        where = document.location(("sweep", "sampler"))
        raise ConfigError("the sampler grid takes choices, and the space has ranges", where=where, fix="use tpe")
    with error_location(document.location(("sweep",))):
        make_sampler(space, 0)
        make_pruner(space)
    return space


def _problems_of(what: str, block: Mapping[str, Any], known: Mapping[str, str], document: Document) -> list[Problem]:
    """Check a sampler's or pruner's name and the names of its options."""
    optuna = import_optuna()
    name, where = str(block.get("name")), document.location(("sweep", what))
    if name not in known:
        close = nearest(name, known)
        fix = f"did you mean {close!r}?" if close else f"choose a {what}"
        return [Problem(f"there is no {what} called {name!r}", where, tuple(known), fix)]
    options_set_by_framework = {"self", "search_space"}
    options = (
        set(inspect.signature(getattr(getattr(optuna, f"{what}s"), known[name])).parameters) - options_set_by_framework
    )
    return [
        Problem(
            f"{what} {name!r} has no option {key!r}", document.location(("sweep", what, key)), tuple(sorted(options))
        )
        for key in block
        if key != "name" and key not in options
    ]


def import_optuna() -> Any:
    """Import Optuna, or raise an error that says how to install it."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("sweeps need Optuna, which is not installed", fix="pip install 'transferkit[optuna]'")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def make_sampler(space: Space, number: int) -> Any:
    """Make the sampler that draws trial ``number``: a function of seed, number and trials before, whoever draws."""
    options = {key: value for key, value in space.settings.sampler.items() if key != "name"}
    name = space.settings.sampler["name"]
    if name == "grid":
        options["search_space"] = space.grid()
    else:
        digest = hashlib.sha256(f"{options.get('seed', 0)} {number}".encode()).digest()
        options["seed"] = int.from_bytes(digest[:4], "big")
    return _make("sampler", getattr(import_optuna().samplers, SAMPLERS[name]), options)


def make_pruner(space: Space) -> Any:
    """Build the pruner of a search space."""
    options = {key: value for key, value in space.settings.pruner.items() if key != "name"}
    return _make("pruner", getattr(import_optuna().pruners, PRUNERS[space.settings.pruner["name"]]), options)


def _make(what: str, cls: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", import_optuna().exceptions.ExperimentalWarning)
        try:
            return cls(**options)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"optuna refuses the options of the {what}: {error}") from error
        except ImportError as error:
            raise UserError(f"the {what} needs another package: {error}", fix=f"choose another {what}") from error


def trial_overrides(overrides: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Return the overrides of a trial: those of the command, then the drawn values."""
    drawn = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return [*overrides, *drawn, "train.score_test=false", "train.report=false"]


def check_space(config: str | Path, space: Space, overrides: Sequence[str] = ()) -> Any:
    """Check what the space makes of the config: every choice and both ends of every range, all combinations if few.

    Returns:
        The primary metric that trials are compared by.

    Raises:
        ConfigError: A config is not right; the message names the line of the space.
    """
    examples = {key: space.examples(key) for key in space.keys}
    first = {key: values[0] for key, values in examples.items()}
    tried = [first, *({**first, key: value} for key, values in examples.items() for value in values[1:])]
    if math.prod(map(len, examples.values())) <= MAX_CHECKED:
        tried += [dict(zip(examples, values, strict=True)) for values in product(*examples.values())]
    problems: list[Problem] = []
    metric = None
    for values in islice(tried, 2 * MAX_CHECKED):
        try:
            _, parts = check(config, trial_overrides(overrides, values))
            metric = parts.task.primary_metric
        except ConfigError as error:
            problems += [_in_space(problem, values, space) for problem in error.problems]
    if problems:
        raise ConfigError.of(list({(p.where, p.message): p for p in problems}.values()))
    return metric


def _in_space(problem: Problem, values: Mapping[str, Any], space: Space) -> Problem:
    """Name the space's line where the config's problem is with a value that the space gave."""
    for key, value in values.items():
        if problem.where and problem.where.startswith(f"override '{key}="):
            return replace(problem, where=f"{space.document.location((key,))} ({key}={json.dumps(value)})")
    return problem
