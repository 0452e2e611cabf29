"""Hyperparameter search with Optuna: trials are runs, the study is a SQLite file, and a killed sweep can be resumed.

The objective of a trial is the primary metric of its best epoch on the *validation* split. Trials do not score the test
split. It is scored once at the end, with the model of the best trial.
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

import torch

from transfer.config.tracker_variables import mask, mask_trackers
from transfer.config.yaml_document import dump, read_plain
from transfer.errors import ConfigError, RunError, StoppedByObserver, TrainingError
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
from transfer.experiments.study import STUDY, study_errors, trial_folder
from transfer.experiments.sweep_report import short, sweep_html, write_sweep_report
from transfer.runs import train
from transfer.runs.check import check
from transfer.system.atomic_files import is_disk_full, refuse_special_entries, write_atomically
from transfer.system.ranks import refuse_several
from transfer.training.events import EpochEnded, Event, Note, Observer, RunStarted

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Sweep:
    """A completed sweep.

    Args:
        folder: Folder of the study, its runs and its report.
        report: Content of ``sweep.json``: ``best``, ``importance`` and ``trials``.
    """

    folder: Path
    report: Mapping[str, Any]

    def _repr_html_(self) -> str:
        """Return a table of the trials, best first, which notebooks show."""
        return sweep_html(self.report)


def sweep(
    config: str | Path,
    space_file: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path = "runs",
    processes: int = 1,
    observe: Observer = lambda _: None,
) -> Sweep:
    """Run trials until the sweep is complete. The same call with the same files resumes an interrupted sweep.

    Trials are run in ``OUTPUT/CONFIG-SPACE/runs``; the study is ``OUTPUT/CONFIG-SPACE/study.db``. A trial that was
    interrupted is resumed, with the same result as without the interruption. Several processes may run one sweep.

    Args:
        config: Path of a YAML file.
        space_file: Path of the YAML file of the search space.
        overrides: Changes to the config of all trials, each ``path.to.key=value``.
        output: Folder in which the folder of the sweep is created.
        processes: Number of processes on this machine that run trials, with a GPU each if there are several. They use
            the same feature cache.
        observe: Function that is called with the events of the trials of this process.

    Raises:
        UserError: The config, the space, the data or the weights are wrong, or the folder contains another sweep.
        TrainingError: All trials failed.
    """
    # Ranks of a launcher would each run a sweep; `processes` starts helpers that run one.
    refuse_several("a sweep")
    optuna = import_optuna()
    space = read_space(space_file)
    metric = check_space(config, space, overrides)
    folder = Path(output) / f"{Path(config).stem}-{Path(space_file).stem}"
    device = _claim(folder, config, space, overrides)
    worker = Worker(
        folder, config, space, tuple(overrides), metric.name, 1 if metric.higher_is_better else -1, observe, optuna
    )
    with ExitStack() as stack:
        for number in range(2, processes + 1):
            stack.enter_context(_helper(number, folder, config, space_file, overrides, output, processes, device))
        worker.work()
        if worker.others():
            observe(Note("all trials have started; waiting for the trials of other processes"))
    # Processes of one sweep may end at the same time, and each writes the report.
    with _lock(folder / "report.lock"):
        report = write_sweep_report(worker)
    return Sweep(folder, report)


def _claim(folder: Path, config: str | Path, space: Space, overrides: Sequence[str]) -> str:
    """Create the folder of the sweep, or check that an existing folder contains the same sweep.

    Returns:
        The config's ``train.device``.
    """
    checked, _ = check(config, overrides)
    if not checked.data_options.validation:
        raise ConfigError(
            "a sweep compares its trials on a validation split, and data.validation is 0",
            where=checked.document.location(("data", "validation")),
            fix="set data.validation to 0.1, for example; train the best trial again with 0",
        )
    plain = {"config": mask_trackers(checked.resolved), "space": space.document.data}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_special_entries(folder)
        path = folder / "sweep.yaml"
        with _lock(folder / "study.lock"):
            if not path.exists():
                write_atomically(path, dump(plain))
            elif _without_trials(read_plain(path)) != _without_trials(plain):
                fix = "choose another --output, or another name for the space file"
                raise RunError(f"{folder} contains a sweep of another config or space", where=str(path), fix=fix)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}", fix="choose another --output") from error
    return checked.train.device


def _without_trials(plain: Mapping[str, Any]) -> Any:
    """Return the settings of a sweep without the number of trials, which may be raised later."""
    written = plain.get("space")
    written = written if isinstance(written, dict) else {}  # the file may have been edited
    settings = written.get("sweep") or {}
    space = {key: value for key, value in written.items() if key != "sweep"}
    settings = {key: value for key, value in settings.items() if key != "trials"} if isinstance(settings, dict) else {}
    # JSON makes tuples and lists equal, and keeps the order of the keys, which the sampler depends on.
    # Masked, because sweeps of older versions contain the values of environment variables.
    return json.loads(mask(json.dumps({**plain, "space": [list(space.items()), settings]})))


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
    processes: int,
    device: str,
) -> Iterator[None]:
    """Start another process that runs trials of the same sweep, and wait for it at the end of the block."""
    command = [sys.executable, "-m", "transfer", "sweep", str(config), str(space), *overrides, "--output", str(output)]
    # Processes that each use all cores would slow each other down.
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    with (folder / f"process-{number}.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603  # the same program
            command,
            stdout=log,
            stderr=log,
            env={"OMP_NUM_THREADS": threads, **os.environ, **_gpu_of_process(number, device)},
        )
        try:
            yield
        except BaseException:
            process.terminate()  # the process saves its trial, which the next call resumes
            process.wait()
            raise
        process.wait()


def _gpu_of_process(number: int, device: str) -> dict[str, str]:
    """Return environment variables that give a process of a sweep its own GPU; empty if there are not several GPUs.

    Args:
        number: Number of the process, from 1; process 1 is the one that starts the others and uses the first GPU.
        device: The config's ``train.device``. A config that selects one GPU by its index keeps it in all processes.
    """
    count = torch.cuda.device_count()
    if count < 2 or device not in ("auto", "cuda"):
        return {}
    # CUDA counts only the visible devices: the variable may already restrict this process to some GPUs.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = [name.strip() for name in visible.split(",")] if visible else [str(index) for index in range(count)]
    return {"CUDA_VISIBLE_DEVICES": gpus[(number - 1) % count]}


@dataclass
class Worker:
    """The part of one process in a sweep: it runs trials until the study is complete.

    Args:
        folder: Folder of the sweep.
        config: Path of the config.
        space: Search space.
        overrides: Changes to the config of all trials.
        metric: Name of the primary metric.
        sign: 1 if higher values of the metric are better, -1 otherwise.
        observe: Function that is called with the events of the trials.
        optuna: Module ``optuna``, which is imported only if it is needed.
    """

    folder: Path
    config: str | Path
    space: Space
    overrides: tuple[str, ...]
    metric: str
    sign: int
    observe: Observer
    optuna: Any

    def __post_init__(self) -> None:
        url = f"sqlite:///{self.folder.resolve() / STUDY}"
        with _lock(self.folder / "study.lock"), study_errors(self.folder):
            storage = self.optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
            self.study = self.optuna.create_study(
                storage=storage,
                study_name="sweep",
                direction="maximize" if self.sign > 0 else "minimize",
                pruner=make_pruner(self.space),
                load_if_exists=True,
            )
            for trial in self.study.get_trials(deepcopy=False):
                trial_folder(trial)

    def work(self) -> None:
        """Run trials until the study is complete."""
        while (taken := self._take()) is not None:
            trial, lock = taken
            with lock:
                self._run(trial)

    def others(self) -> bool:
        """Return whether other processes are still running trials."""
        with study_errors(self.folder):
            trials = self.study.get_trials(deepcopy=False)
        return any(trial.state == self.optuna.trial.TrialState.RUNNING for trial in trials)

    def _take(self) -> tuple[optuna.Trial, Any] | None:
        """Return an unfinished trial or a new one, with its lock; None if the study has enough trials."""
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        with _lock(self.folder / "study.lock"), study_errors(self.folder):
            trials = self.study.get_trials(deepcopy=False)
            unfinished = [trial for trial in trials if trial.state == self.optuna.trial.TrialState.RUNNING]
            for frozen in unfinished:
                lock = (locks / str(frozen.number)).open("a")
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:  # a live process holds the lock and runs the trial
                    lock.close()
                    continue
                self.study.sampler = make_sampler(self.space, frozen.number)
                return self.optuna.trial.Trial(self.study, frozen._trial_id), lock
            if len(trials) >= self.space.settings.trials:
                return None
            self.study.sampler = make_sampler(self.space, len(trials))
            trial = self.study.ask()
            # The lock is released when this process ends, however it ends; the trial can then be resumed.
            lock = (locks / str(trial.number)).open("a")
            fcntl.lockf(lock, fcntl.LOCK_EX)
            # Drawn inside the lock, so that the values are stored before another process can resume the trial.
            self.space.draw(trial)
            return trial, lock

    def _run(self, trial: optuna.Trial) -> None:
        """Run or resume a trial, and record its result in the study."""
        with study_errors(self.folder):
            values = self.space.draw(trial)
        name = f"trial {trial.number + 1}/{self.space.settings.trials}"
        drawn = "  ".join(f"{key}={short(value)}" for key, value in values.items())
        states = self.optuna.trial.TrialState
        previous = trial_folder(trial)
        try:
            if previous is not None and (self.folder / previous / "config.yaml").is_file():
                self.observe(Note(f"{name} resumes: {drawn}"))
                run = train.resume(self.folder / previous, observe=lambda event: self._watch(trial, event))
            else:
                self.observe(Note(f"{name}: {drawn}"))
                run = train.run(
                    self.config,
                    trial_overrides(self.overrides, values),
                    output=self.folder / "runs",
                    observe=lambda event: self._watch(trial, event),
                )
        except StoppedByObserver as stopped:
            self._tell(trial, reason=str(stopped), state=states.PRUNED)
            self.observe(Note(f"{name} pruned: {stopped}"))
        # Other errors, such as wrong data, would fail every trial: they end the sweep.
        except (ConfigError, TrainingError) as error:
            if is_disk_full(error):  # so would a full disk; the same command resumes this trial
                raise
            self._tell(trial, reason=error.problems[0].message, state=states.FAIL)
            self.observe(Note(f"{name} failed: {error.problems[0].message}"))
        else:
            value = run.summary["validation"][self.metric]
            self._tell(trial, folder=run.folder, values=value)
            with study_errors(self.folder):
                best = self.study.best_value
            self.observe(Note(f"{name}: validation {self.metric} {value:.4f}, best so far {best:.4f}"))

    def _tell(
        self, trial: optuna.Trial, *, reason: str | None = None, folder: Path | None = None, **result: Any
    ) -> None:
        """Record the end of a trial in the study."""
        with study_errors(self.folder):
            if reason is not None:
                trial.set_user_attr(DECIDED, reason)
            if folder is not None:
                trial.set_user_attr(FOLDER, str(folder.relative_to(self.folder)))
            self.study.tell(trial, **result)

    def _watch(self, trial: optuna.Trial, event: Event) -> None:
        """Record the folder of the trial, report its epochs, and stop it if the pruner decides so."""
        if isinstance(event, RunStarted):
            with study_errors(self.folder):
                trial.set_user_attr(FOLDER, str(event.folder.relative_to(self.folder)))
        if not isinstance(event, EpochEnded):
            return
        epoch = int(event.record["epoch"])
        with study_errors(self.folder):
            reported = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
            if epoch not in reported:  # a killed process may have reported the epoch before
                trial.report(event.record["validation"][self.metric], epoch)
            should_prune = trial.should_prune()
        if should_prune:
            pruner = self.space.settings.pruner["name"]
            raise StoppedByObserver(f"after epoch {epoch}, by the pruner {pruner}")
