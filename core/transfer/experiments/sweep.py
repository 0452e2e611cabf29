"""A search over a config's keys with Optuna: trials are runs, the study is a SQLite file, a killed sweep goes on.

The test split takes no part: a trial's objective is the primary metric of its best epoch on the *validation* split,
trials do not score the test split, and when all have ended it is scored once, with the model of the best trial.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field, model_validator

from transfer.config.option_schema import Block, validate
from transfer.config.run_config import located
from transfer.config.train_settings import Count
from transfer.config.yaml_document import Document, read_document
from transfer.errors import ConfigError, Problem, RunError, Stopped, TrainingError, UserError, nearest
from transfer.runs import train
from transfer.storage.run_directory import read_json, write_atomically, write_json
from transfer.system.ranks import refuse_several
from transfer.training.events import EpochEnded, Event, Note, Observer, RunStarted

if TYPE_CHECKING:
    import optuna

MOST_CHECKED = 200
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


@dataclass(frozen=True)
class Sweep:
    """A sweep whose trials have all ended.

    Args:
        folder: Of the study, its runs and its report.
        report: As in ``sweep.json``: ``best``, ``importance``, ``trials``.
    """

    folder: Path
    report: Mapping[str, Any]


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
        where = document.where((key,))
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
        where = document.where(("sweep", "sampler"))
        raise ConfigError("the sampler grid takes choices, and the space has ranges", where=where, fix="use tpe")
    with located(document.where(("sweep",))):
        _sampler(space, 0)
        _pruner(space)
    return space


def _problems_of(what: str, block: Mapping[str, Any], known: Mapping[str, str], document: Document) -> list[Problem]:
    """Check a sampler's or pruner's name and the names of its options."""
    optuna = _optuna()
    name, where = str(block.get("name")), document.where(("sweep", what))
    if name not in known:
        close = nearest(name, known)
        fix = f"did you mean {close!r}?" if close else f"choose a {what}"
        return [Problem(f"there is no {what} called {name!r}", where, tuple(known), fix)]
    handed_over = {"self", "search_space"}
    options = set(inspect.signature(getattr(getattr(optuna, f"{what}s"), known[name])).parameters) - handed_over
    return [
        Problem(f"{what} {name!r} has no option {key!r}", document.where(("sweep", what, key)), tuple(sorted(options)))
        for key in block
        if key != "name" and key not in options
    ]


def _optuna() -> Any:
    if importlib.util.find_spec("optuna") is None:
        raise UserError("sweeps need Optuna, which is not installed", fix="pip install 'transfer[optuna]'")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(space: Space, number: int) -> Any:
    """Make the sampler that draws trial ``number``: a function of seed, number and trials before, whoever draws."""
    options = {key: value for key, value in space.settings.sampler.items() if key != "name"}
    name = space.settings.sampler["name"]
    if name == "grid":
        options["search_space"] = space.grid()
    else:
        digest = hashlib.sha256(f"{options.get('seed', 0)} {number}".encode()).digest()
        options["seed"] = int.from_bytes(digest[:4], "big")
    return _make("sampler", getattr(_optuna().samplers, SAMPLERS[name]), options)


def _pruner(space: Space) -> Any:
    options = {key: value for key, value in space.settings.pruner.items() if key != "name"}
    return _make("pruner", getattr(_optuna().pruners, PRUNERS[space.settings.pruner["name"]]), options)


def _make(what: str, cls: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", _optuna().exceptions.ExperimentalWarning)
        try:
            return cls(**options)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"optuna refuses the options of the {what}: {error}") from error
        except ImportError as error:
            raise UserError(f"the {what} needs another package: {error}", fix=f"choose another {what}") from error


def _overrides(overrides: Sequence[str], values: Mapping[str, Any]) -> list[str]:
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
    if math.prod(map(len, examples.values())) <= MOST_CHECKED:
        tried += [dict(zip(examples, values, strict=True)) for values in product(*examples.values())]
    problems: list[Problem] = []
    metric = None
    for values in islice(tried, 2 * MOST_CHECKED):
        try:
            _, parts = train.check(config, _overrides(overrides, values))
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
            return replace(problem, where=f"{space.document.where((key,))} ({key}={json.dumps(value)})")
    return problem


def sweep(
    config: str | Path,
    space_file: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path = "runs",
    processes: int = 1,
    observe: Observer = lambda _: None,
) -> Sweep:
    """Try out configs until all trials have ended; asked again with the same files, go on where it was stopped.

    Trials are run in ``OUTPUT/CONFIG-SPACE/runs``; the study is ``study.db`` beside it. A trial that was interrupted is
    resumed to the result that it would have had. Several processes may work on one study at once.

    Args:
        config: The path of a YAML file.
        space_file: The path of the space's.
        overrides: ``path.to.key=value`` each, for all trials.
        output: The folder in which the sweep makes its own.
        processes: Of this machine that work on the study together; all share one feature cache.
        observe: Is told of trials that begin and end.

    Raises:
        UserError: Config, space, data or weights are not right, or the folder holds another sweep.
        TrainingError: No trial succeeded.
    """
    refuse_several("a sweep")
    optuna = _optuna()
    space = read_space(space_file)
    metric = check_space(config, space, overrides)
    folder = Path(output) / f"{Path(config).stem}-{Path(space_file).stem}"
    _claim(folder, config, space, overrides)
    worker = _Worker(
        folder, config, space, tuple(overrides), metric.name, 1 if metric.higher_is_better else -1, observe, optuna
    )
    with ExitStack() as stack:
        for number in range(2, processes + 1):
            stack.enter_context(_helper(number, folder, config, space_file, overrides, output, processes))
        worker.work()
        observe(Note("all trials have begun: waiting for those of other processes")) if worker.others() else None
    with _lock(folder / "report.lock"):
        report = _report(worker)
    return Sweep(folder, report)


def _claim(folder: Path, config: str | Path, space: Space, overrides: Sequence[str]) -> None:
    """Make the sweep's folder, or see that what is there is the same sweep."""
    checked, _ = train.check(config, overrides)
    plain = {"config": checked.plain, "space": space.document.data}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "sweep.yaml"
        with _lock(folder / "study.lock"):
            if not path.exists():
                write_atomically(path, yaml.safe_dump(plain, sort_keys=False))
            elif _without_trials(yaml.safe_load(path.read_text(encoding="utf-8"))) != _without_trials(plain):
                fix = "choose another --output, or another name for the space file"
                raise RunError(f"{folder} holds a sweep of another config or space", where=str(path), fix=fix)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}", fix="choose another --output") from error


def _without_trials(plain: Any) -> Any:
    """Leave out the number of trials: a sweep may be made longer."""
    space = {key: value for key, value in plain["space"].items() if key != "sweep"}
    settings = {key: value for key, value in (plain["space"].get("sweep") or {}).items() if key != "trials"}
    return json.loads(json.dumps({**plain, "space": [list(space.items()), settings]}))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _helper(
    number: int,
    folder: Path,
    config: str | Path,
    space: str | Path,
    overrides: Sequence[str],
    output: str | Path,
    of: int,
) -> Iterator[None]:
    """Let another process work on the same study while this one does; it ends with it."""
    command = [sys.executable, "-m", "transfer", "sweep", str(config), str(space), *overrides, "--output", str(output)]
    threads = str(max(1, (os.cpu_count() or 1) // of))
    with (folder / f"process-{number}.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603  # this very program
            command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": threads, **os.environ}
        )
        try:
            yield
        except BaseException:
            process.terminate()  # it saves its trial, which goes on next time
            process.wait()
            raise
        process.wait()


@dataclass
class _Worker:
    """One process's part in a sweep: takes trials until there are enough."""

    folder: Path
    config: str | Path
    space: Space
    overrides: tuple[str, ...]
    metric: str
    sign: int
    observe: Observer
    optuna: Any

    def __post_init__(self) -> None:
        url = f"sqlite:///{self.folder.resolve() / 'study.db'}"
        storage = self.optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        with _lock(self.folder / "study.lock"):
            self.study = self.optuna.create_study(
                storage=storage,
                study_name="sweep",
                direction="maximize" if self.sign > 0 else "minimize",
                pruner=_pruner(self.space),
                load_if_exists=True,
            )

    def work(self) -> None:
        while (taken := self._take()) is not None:
            trial, lock = taken
            with lock:
                self._run(trial)

    def others(self) -> bool:
        """Tell whether other processes still have trials."""
        return any(
            trial.state == self.optuna.trial.TrialState.RUNNING for trial in self.study.get_trials(deepcopy=False)
        )

    def _take(self) -> tuple[optuna.Trial, Any] | None:
        """Take a trial that a process left when it ended, else a new one; None where there are enough."""
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        with _lock(self.folder / "study.lock"):
            trials = self.study.get_trials(deepcopy=False)
            left = [trial for trial in trials if trial.state == self.optuna.trial.TrialState.RUNNING]
            for frozen in left:
                lock = (locks / str(frozen.number)).open("a")
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:  # a process works on it
                    lock.close()
                    continue
                self.study.sampler = _sampler(self.space, frozen.number)
                return self.optuna.trial.Trial(self.study, frozen._trial_id), lock
            if len(trials) >= self.space.settings.trials:
                return None
            self.study.sampler = _sampler(self.space, len(trials))
            trial = self.study.ask()
            lock = (locks / str(trial.number)).open("a")
            fcntl.lockf(lock, fcntl.LOCK_EX)
            self.space.draw(trial)
            return trial, lock

    def _run(self, trial: optuna.Trial) -> None:
        """Run or resume a trial, and tell the study what came of it."""
        values = self.space.draw(trial)
        name = f"trial {trial.number + 1}/{self.space.settings.trials}"
        drawn = "  ".join(f"{key}={_short(value)}" for key, value in values.items())
        states = self.optuna.trial.TrialState
        before = trial.user_attrs.get(FOLDER)
        try:
            if before is not None and (self.folder / before / "config.yaml").is_file():
                self.observe(Note(f"{name} goes on: {drawn}"))
                ended = train.resume(self.folder / before, observe=lambda event: self._watch(trial, event))
            else:
                self.observe(Note(f"{name}: {drawn}"))
                ended = train.run(
                    self.config,
                    _overrides(self.overrides, values),
                    output=self.folder / "runs",
                    observe=lambda event: self._watch(trial, event),
                )
        except Stopped as stopped:
            self._decide(trial, str(stopped))
            self.study.tell(trial, state=states.PRUNED)
            self.observe(Note(f"{name} pruned: {stopped}"))
        except (ConfigError, TrainingError) as error:
            self._decide(trial, error.problems[0].message)
            self.study.tell(trial, state=states.FAIL)
            self.observe(Note(f"{name} failed: {error.problems[0].message}"))
        else:
            value = ended.summary["validation"][self.metric]
            trial.set_user_attr(FOLDER, str(ended.folder.relative_to(self.folder)))
            self.study.tell(trial, value)
            self.observe(Note(f"{name}: validation {self.metric} {value:.4f}, best so far {self.study.best_value:.4f}"))

    def _decide(self, trial: optuna.Trial, why: str) -> None:
        trial.set_user_attr(DECIDED, why)

    def _watch(self, trial: optuna.Trial, event: Event) -> None:
        """Note the trial's folder and report its epochs; stop it where the pruner says so."""
        if isinstance(event, RunStarted):
            trial.set_user_attr(FOLDER, str(event.folder.relative_to(self.folder)))
        if not isinstance(event, EpochEnded):
            return
        epoch = int(event.record["epoch"])
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if epoch not in known:  # a process that was killed may have reported it
            trial.report(event.record["validation"][self.metric], epoch)
        if trial.should_prune():
            pruner = self.space.settings.pruner["name"]
            raise Stopped(f"after epoch {epoch}, by the pruner {pruner}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _report(worker: _Worker) -> dict[str, Any]:
    """Score the test split once with the best trial, and write ``sweep.json`` and ``report.md``."""
    optuna, study, folder = worker.optuna, worker.study, worker.folder
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if not complete:
        whys = [trial.user_attrs.get(DECIDED) for trial in trials]
        raise TrainingError(f"none of {len(trials)} trials succeeded; the last: {next(filter(None, whys[::-1]), '?')}")
    best = study.best_trial
    path = folder / "sweep.json"
    before = read_json(path, "there is no report yet") if path.exists() else {}
    if before.get("best", {}).get("trial") == best.number:  # the test split is scored once
        test = before["best"]["test"]
    else:
        test = _score_test(folder / best.user_attrs[FOLDER], worker.observe)
    report = {
        "metric": worker.metric,
        "best": {
            "trial": best.number,
            "run": best.user_attrs[FOLDER],
            "values": _values(worker.space, best),
            "validation": best.value,
            "test": test,
        },
        "importance": _importance(optuna, study),
        "trials": [
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                "validation": trial.value if trial in complete else None,
                "epochs": len(trial.intermediate_values),
                "values": _values(worker.space, trial),
                "run": trial.user_attrs.get(FOLDER),
                "why": trial.user_attrs.get(DECIDED),
            }
            for trial in trials
        ],
    }
    write_json(path, report)
    write_atomically(folder / "report.md", _markdown(report))
    return report


def _values(space: Space, trial: Any) -> dict[str, Any]:
    return {
        key: space.keys[key][value] if isinstance(space.keys[key], dict) else value  # type: ignore[index]
        for key, value in trial.params.items()
    }


def _score_test(run: Path, observe: Observer) -> dict[str, float] | None:
    try:
        return train.evaluate(run, "test", observe=lambda _: None)
    except RunError:  # the data has no test split
        observe(Note("the data has no test split: the validation figures stand alone"))
        return None


def _importance(optuna: Any, study: Any) -> dict[str, float] | None:
    """Return each key's share in the differences between trials (PED-ANOVA, Watanabe et al. 2023), if they tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError, ZeroDivisionError):  # too few trials, or all alike
            return None
    return dict(found) if found and all(map(math.isfinite, found.values())) else None


def _markdown(report: Mapping[str, Any]) -> str:
    best, importance, metric = report["best"], report["importance"], report["metric"]
    states = [trial["state"] for trial in report["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = ["# Sweep", "", f"{len(states)} trials: {counts}. Compared by the validation split's {metric}.", ""]
    lines += [
        "## Best",
        "",
        f"Trial {best['trial'] + 1}, `{best['run']}`: validation {metric} {best['validation']:.4f}",
    ]
    if best["test"]:
        lines += [
            "",
            "Test (scored once, for this trial alone): " + ", ".join(f"{k} {v:.4f}" for k, v in best["test"].items()),
        ]
    lines += ["", "```", *(f"{key}={json.dumps(value)}" for key, value in best["values"].items()), "```", ""]
    lines += ["## Importance of each key", "", "Share in the differences between trials (PED-ANOVA).", ""]
    if importance is None:
        lines.append("The trials are too few, or too much alike, to tell.")
    else:
        lines += ["| key | share |", "|---|---|", *(f"| `{key}` | {share:.2f} |" for key, share in importance.items())]
    keys = list(best["values"])
    lines += ["", "## Trials", "", f"| trial | {' | '.join(keys)} | validation {metric} | epochs | |"]
    lines.append("|" + "---|" * (len(keys) + 4))
    order = sorted(report["trials"], key=lambda t: (t["validation"] is None, t["trial"]))
    for trial in order:
        values = " | ".join(_short(trial["values"].get(key)) for key in keys)
        score = "" if trial["validation"] is None else f"{trial['validation']:.4f}"
        note = trial["state"] if trial["why"] is None else f"{trial['state']}: {trial['why']}"
        lines.append(f"| {trial['trial'] + 1} | {values} | {score} | {trial['epochs']} | {note} |")
    return "\n".join([*lines, ""])
