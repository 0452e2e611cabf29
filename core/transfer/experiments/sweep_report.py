"""The report of a sweep: ``sweep.json`` and ``report.md``."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfer.errors import RunError, TrainingError
from transfer.experiments.search_space import DECIDED, Space
from transfer.experiments.study import study_errors, trial_folder
from transfer.runs.evaluate import evaluate
from transfer.runs.summary_html import html_table
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import read_json, write_atomically, write_json
from transfer.system.file_schema import FileSchema, checked
from transfer.system.formatting import format_value
from transfer.system.templates import environment
from transfer.training.events import Note, Observer

if TYPE_CHECKING:
    import optuna

    from transfer.experiments.sweep import Worker


REPORT = "sweep.json"


def short(value: Any) -> str:
    """Return a config value as text: a float with four significant digits, anything else as JSON.

    The text is part of ``key=value`` in notes and of tables of trials, so ``null`` and ``true`` stay as in a config.
    """
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def write_sweep_report(worker: Worker) -> dict[str, Any]:
    """Score the test split once with the best trial, and write ``sweep.json`` and ``report.md``.

    Raises:
        TrainingError: All trials failed.
    """
    with study_errors(worker.folder):
        best, run = _best_trial(worker)
    previous = _previous_best(worker.folder / REPORT)
    if previous is not None and previous.trial == best.number:  # an earlier call has scored the test split
        test = previous.test
    else:
        test = _score_test(worker.folder / run, worker.observe)
    with study_errors(worker.folder):
        report = _report(worker, best, run, test)
    write_json(worker.folder / REPORT, report)
    write_atomically(worker.folder / "report.md", _markdown(report))
    return report


def _best_trial(worker: Worker) -> tuple[optuna.trial.FrozenTrial, str]:
    """Return the best trial and the folder of its run."""
    optuna, study = worker.optuna, worker.study
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if not complete:
        reasons = [trial.user_attrs.get(DECIDED) for trial in trials]
        last = next(filter(None, reversed(reasons)), "unknown")
        raise TrainingError(f"all {len(trials)} trials failed or were pruned; the last reason: {last}")
    best = study.best_trial
    run = trial_folder(best)
    if run is None:
        raise RunError(
            f"the study is damaged: trial {best.number} is complete and has no run", where=str(worker.folder)
        )
    return best, run


def _report(
    worker: Worker, best: optuna.trial.FrozenTrial, run: str, test: Mapping[str, float] | None
) -> dict[str, Any]:
    study, trials = worker.study, worker.study.get_trials(deepcopy=False)
    return {
        "metric": worker.metric,
        "best": {
            "trial": best.number,
            "run": run,
            "values": _values(worker.space, best),
            "validation": best.value,
            "test": test,
        },
        "importance": _importance(worker.optuna, study),
        "trials": [
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                "validation": trial.value if trial.state == worker.optuna.trial.TrialState.COMPLETE else None,
                "epochs": len(trial.intermediate_values),
                "values": _values(worker.space, trial),
                "run": trial_folder(trial),
                "why": trial.user_attrs.get(DECIDED),
            }
            for trial in trials
        ],
    }


class _Best(FileSchema):
    trial: int
    test: dict[str, float] | None


class _Report(FileSchema):
    """The part of ``sweep.json`` that is read."""

    best: _Best


def _previous_best(path: Path) -> _Best | None:
    """Return the best trial of the previous report; None if there is none, or the file is damaged."""
    try:
        return checked(read_json(path, "there is no report yet"), _Report, str(path)).best
    except RunError:
        return None


def _values(space: Space, trial: Any) -> dict[str, Any]:
    return {
        key: space.keys[key][value] if isinstance(space.keys[key], dict) else value  # type: ignore[index]
        for key, value in trial.params.items()
    }


def _score_test(run: Path, observe: Observer) -> dict[str, float] | None:
    if "test" not in RunDirectory(run).summary().get("examples", {}):
        observe(Note("the data has no test split; only validation metrics are reported"))
        return None
    return evaluate(run, "test", observe=lambda _: None)


def _importance(optuna: Any, study: Any) -> dict[str, float] | None:
    """Return the importance of each key (PED-ANOVA, Watanabe et al. 2023); None if the trials do not determine it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            importance = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError, ZeroDivisionError):  # too few trials, or equal scores
            return None
    return dict(importance) if importance and all(map(math.isfinite, importance.values())) else None


def sweep_html(report: Mapping[str, Any]) -> str:
    """Return the trials of a sweep as an HTML table: the best one first, the others in order.

    Args:
        report: Content of ``sweep.json``.
    """
    keys = list(report["best"]["values"])
    # Trials without a score, such as pruned ones, come last.
    trials = sorted(
        report["trials"],
        key=lambda trial: (trial["trial"] != report["best"]["trial"], trial["validation"] is None, trial["trial"]),
    )
    rows = [
        (trial["trial"], trial["state"], trial["validation"], *(short(trial["values"].get(key)) for key in keys))
        for trial in trials
    ]
    title = f"best trial {report['best']['trial']}, test {format_value(report['best']['test'])}"
    return html_table(title, rows, ("trial", "state", f"validation {report['metric']}", *keys))


def _markdown(report: Mapping[str, Any]) -> str:
    states = [trial["state"] for trial in report["trials"]]
    return (
        environment("transfer.experiments")
        .get_template("sweep_report.md.j2")
        .render(
            metric=report["metric"],
            best=report["best"],
            assignments=[f"{key}={json.dumps(value)}" for key, value in report["best"]["values"].items()],
            importance=report["importance"],
            keys=list(report["best"]["values"]),
            counts=", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
            # Trials without a score, such as pruned ones, come last.
            trials=sorted(report["trials"], key=lambda trial: (trial["validation"] is None, trial["trial"])),
            short=short,
        )
    )
