"""The report of a sweep."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfer.errors import RunError, TrainingError
from transfer.experiments.search_space import DECIDED, FOLDER, Space
from transfer.runs.evaluate import evaluate
from transfer.system.atomic_files import read_json, write_atomically, write_json
from transfer.training.events import Note, Observer

if TYPE_CHECKING:
    from transfer.experiments.sweep import Worker


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
    optuna, study, folder = worker.optuna, worker.study, worker.folder
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if not complete:
        reasons = [trial.user_attrs.get(DECIDED) for trial in trials]
        last = next(filter(None, reversed(reasons)), "unknown")
        raise TrainingError(f"all {len(trials)} trials failed or were pruned; the last reason: {last}")
    best = study.best_trial
    path = folder / "sweep.json"
    previous = read_json(path, "there is no report yet") if path.exists() else {}
    if previous.get("best", {}).get("trial") == best.number:  # an earlier call has scored the test split
        test = previous["best"]["test"]
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
        return evaluate(run, "test", observe=lambda _: None)
    except RunError:  # the data has no test split
        observe(Note("the data has no test split; only validation metrics are reported"))
        return None


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
        values = " | ".join(short(trial["values"].get(key)) for key in keys)
        score = "" if trial["validation"] is None else f"{trial['validation']:.4f}"
        note = trial["state"] if trial["why"] is None else f"{trial['state']}: {trial['why']}"
        lines.append(f"| {trial['trial'] + 1} | {values} | {score} | {trial['epochs']} | {note} |")
    return "\n".join([*lines, ""])
