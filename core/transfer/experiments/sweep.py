"""A search over a config's keys with Optuna: trials are runs, the study is a SQLite file, a killed sweep goes on.

The test split takes no part: a trial's objective is the primary metric of its best epoch on the *validation* split,
trials do not score the test split, and when all have ended it is scored once, with the model of the best trial.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from transfer.errors import ConfigError, RunError, StoppedByObserver, TrainingError
from transfer.runs import train
from transfer.runs.check import check
from transfer.system.atomic_files import write_atomically
from transfer.system.ranks import refuse_several
from transfer.training.events import EpochEnded, Event, Note, Observer, RunStarted

if TYPE_CHECKING:
    import optuna
from transfer.experiments.search_space import (
    DECIDED,
    FOLDER,
    Space,
    check_space,
    import_optuna,
    make_pruner,
    make_sampler,
    read_space,
    trial_overrides,
)
from transfer.experiments.sweep_report import short, write_sweep_report


@dataclass(frozen=True)
class Sweep:
    """A sweep whose trials have all ended.

    Args:
        folder: Of the study, its runs and its report.
        report: As in ``sweep.json``: ``best``, ``importance``, ``trials``.
    """

    folder: Path
    report: Mapping[str, Any]


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
    optuna = import_optuna()
    space = read_space(space_file)
    metric = check_space(config, space, overrides)
    folder = Path(output) / f"{Path(config).stem}-{Path(space_file).stem}"
    _claim(folder, config, space, overrides)
    worker = Worker(
        folder, config, space, tuple(overrides), metric.name, 1 if metric.higher_is_better else -1, observe, optuna
    )
    with ExitStack() as stack:
        for number in range(2, processes + 1):
            stack.enter_context(_helper(number, folder, config, space_file, overrides, output, processes))
        worker.work()
        observe(Note("all trials have begun: waiting for those of other processes")) if worker.others() else None
    with _lock(folder / "report.lock"):
        report = write_sweep_report(worker)
    return Sweep(folder, report)


def _claim(folder: Path, config: str | Path, space: Space, overrides: Sequence[str]) -> None:
    """Make the sweep's folder, or see that what is there is the same sweep."""
    checked, _ = check(config, overrides)
    plain = {"config": checked.resolved, "space": space.document.data}
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
class Worker:
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
                pruner=make_pruner(self.space),
                load_if_exists=True,
            )

    def work(self) -> None:
        """Run trials until the study is complete."""
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
                self.study.sampler = make_sampler(self.space, frozen.number)
                return self.optuna.trial.Trial(self.study, frozen._trial_id), lock
            if len(trials) >= self.space.settings.trials:
                return None
            self.study.sampler = make_sampler(self.space, len(trials))
            trial = self.study.ask()
            lock = (locks / str(trial.number)).open("a")
            fcntl.lockf(lock, fcntl.LOCK_EX)
            self.space.draw(trial)
            return trial, lock

    def _run(self, trial: optuna.Trial) -> None:
        """Run or resume a trial, and tell the study what came of it."""
        values = self.space.draw(trial)
        name = f"trial {trial.number + 1}/{self.space.settings.trials}"
        drawn = "  ".join(f"{key}={short(value)}" for key, value in values.items())
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
                    trial_overrides(self.overrides, values),
                    output=self.folder / "runs",
                    observe=lambda event: self._watch(trial, event),
                )
        except StoppedByObserver as stopped:
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
            raise StoppedByObserver(f"after epoch {epoch}, by the pruner {pruner}")
