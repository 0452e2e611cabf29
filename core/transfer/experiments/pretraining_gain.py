"""What pretraining is worth on a task: the same model and the same splits, with and without it, over several seeds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfer.config.check import load_config
from transfer.config.run_config import Config, RunConfig
from transfer.errors import UserError
from transfer.experiments.comparison import Row, compare, higher_is_better
from transfer.experiments.intervals import spread
from transfer.experiments.seeds import removed_if_nothing_ran, saying_how_it_ended, seeds_of, spread_json, train_seeds
from transfer.interfaces import Task
from transfer.runs.train import Run
from transfer.storage.run_directory import FORMAT, RunDirectory
from transfer.system.atomic_files import read_json, write_json
from transfer.system.ranks import refuse_several
from transfer.training.build import BuiltExperiment, build, with_found_batch_size
from transfer.training.events import Note, Observer, ignore_events
from transfer.training.preflight import CheckedParts, preflight

VALUE = "value.json"
"""Says what a folder of arms holds or is to hold and, at the end, what came of it."""
CONSTANT = {"class": "majority_class", "labels": "constant", "number": "constant"}
"""What the best constant answer is called, by the kind of target."""
RANDOM_FEATURES, LINEAR_PROBE, FROM_SCRATCH, FINE_TUNED = (
    "random_features",
    "linear_probe",
    "from_scratch",
    "fine_tuned",
)
_SMALLEST_SHARE = 1e-6


def pretraining_gain(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    seeds: int = 5,
    output: str | Path = "runs",
    observe: Observer = ignore_events,
) -> Run:
    """Train a config's model in four ways, each with several seeds, on the same splits and for as many epochs.

    ``random_features``: a linear head over the network with random weights, which stay. ``linear_probe``: a linear head
    over the pretrained network, which stays. ``from_scratch``: everything from random weights, at the head's learning
    rate. ``fine_tuned``: everything from the pretrained weights, as the config's phases say, or where they train
    nothing but the head, with the backbone at a tenth of its rate. Beside them the best constant answer: for classes,
    the most frequent one.

    Heads alone see examples without random augmentation, as is the custom (Kornblith et al. 2019): so the features of
    the pretrained network are computed once, and all seeds share them.

    Args:
        config: The path of a YAML file, or the config as plain data.
        overrides: ``path.to.key=value`` each.
        seeds: How many, 2 or more, beginning with the config's own.
        output: The folder in which the runs get one of their own.
        observe: Is called with every event of every run (:mod:`transfer.training.events`).

    Returns:
        The folder, and what ``value.json`` holds: the ``arms``, and the answer in a ``sentence``.

    Raises:
        UserError: The config, the data or the weights are not right, or nothing in the config is pretrained.
        TrainingError: Training cannot go on; :func:`resume_pretraining_gain` does.
    """
    refuse_several("transfer value")
    checked = load_config(config, overrides)
    numbers = seeds_of(checked, seeds)
    arms = _arms(checked, preflight(checked))
    for arm in arms.values():
        preflight(arm)
    if checked.train.batch_size == "auto":  # that of the arm which needs most memory, for all of them
        size = with_found_batch_size(arms[FROM_SCRATCH], observe).train.batch_size
        assert isinstance(size, int)
        checked, arms = checked.with_batch_size(size), {name: arm.with_batch_size(size) for name, arm in arms.items()}
    built = build(checked, observe)
    if not built.pretrained:
        raise UserError(
            f"backbone {checked.backbone.plugin.name!r} reads nothing pretrained here, so there is nothing to value",
            where=checked.backbone.where,
            fix="name pretrained weights or vectors, and leave recipes that begin from random weights out",
        )
    folder = RunDirectory.create(Path(output), checked.name, "-value")
    with removed_if_nothing_ran(folder.path):
        return _measure(folder, checked, arms, numbers, built, observe)


def resume_pretraining_gain(folder: str | Path, *, observe: Observer = ignore_events) -> Run:
    """Go on with what :func:`pretraining_gain` began: runs that are complete stay.

    Raises:
        UserError: It is no such folder, or another process writes into it.
        TrainingError: Training cannot go on.
    """
    refuse_several("transfer value")
    path = Path(folder)
    manifest = read_json(path / VALUE, f"{path} is not of `transfer value`", "give the folder that was printed last")
    if manifest["status"] == "complete":
        observe(Note(f"{path} is complete: there is nothing to do"))
        return Run(path, manifest)
    config = load_config(manifest["config"])
    built = build(config, observe)
    return _measure(RunDirectory(path), config, _arms(config, preflight(config)), manifest["seeds"], built, observe)


def _measure(
    folder: RunDirectory,
    config: RunConfig,
    arms: Mapping[str, RunConfig],
    seeds: Sequence[int],
    built: BuiltExperiment,
    observe: Observer,
) -> Run:
    manifest = {"format": FORMAT, "name": config.name, "seeds": list(seeds), "config": config.resolved}

    def write(what: Mapping[str, Any]) -> None:
        write_json(folder.path / VALUE, {**manifest, **what})

    with folder.locked(), saying_how_it_ended(folder, observe, write):
        write({"status": "running"})
        summaries = {}
        for number, (name, arm) in enumerate(arms.items(), 1):
            observe(Note(f"{title(name)}, arm {number} of {len(arms)}"))
            path = folder.path / name
            summaries[name] = train_seeds(arm, seeds, path, quick=False, observe=observe).summary
        found = {"status": "complete", **_answer(folder.path, summaries, _constant(built), built)}
        write(found)
    return Run(folder.path, {**manifest, **found})


def title(arm: str) -> str:
    """Return what a person calls an arm."""
    return arm.replace("_", " ")


def _arms(config: RunConfig, parts: CheckedParts) -> dict[str, RunConfig]:
    """Return the config of each arm, the cheap ones first."""
    epochs = sum(phase.epochs for phase in parts.phases)
    groups = [group for phase in parts.phases for group in phase.groups]
    rate = max([group.lr for group in groups if group.stage == "head"] or [group.lr for group in groups])
    phases = config.train.phases
    scheduler = config.train.scheduler or (phases[-1].scheduler if phases else None)

    def recipe(name: str, **changes: Any) -> RunConfig:
        plain = copy.deepcopy(config.resolved)
        plain["train"] |= {"phases": None, "recipe": {"name": name, "epochs": epochs}, "scheduler": scheduler}
        plain["train"]["optimizer"]["lr"] = rate
        plain["train"]["views"] = None
        plain["train"] |= changes
        if "augment" in changes and parts.backbone.features.layout == "vector" and plain["head"]["name"] != "linear":
            plain["head"] = {"name": "linear"}
        return load_config(plain)

    # What is not augmented or blended is computed once.
    still = {"augment": False, "mix": None}
    tunes = any(group.stage != "head" for group in groups)
    return {
        RANDOM_FEATURES: recipe("random_features", **still),
        LINEAR_PROBE: recipe("feature_extraction", **still),
        FROM_SCRATCH: recipe("scratch"),
        FINE_TUNED: config if tunes else recipe("fine_tune"),
    }


def _constant(built: BuiltExperiment) -> dict[str, float] | None:
    """Return the metrics of the best constant answer on the split that is scored; None where the task has no such one.

    For classes that is the most frequent one in the training split, for labels their shares, for numbers the medians.
    """
    task, splits = built.experiment.task, {name: loader.split for name, loader in built.loaders.items()}
    scored = splits.get("test", splits["validation"])
    outputs = _constant_outputs(splits["train"].targets, built.data.target, len(built.data.classes))
    if task.out_features != len(outputs):
        return None
    predictions = task.predictions(outputs.expand(len(scored), -1))
    targets = torch.as_tensor(scored.targets)
    found = {}
    for name, metric in task.metrics().items():
        metric.update(predictions, targets)
        found[name] = float(metric.compute())
    return found


def _constant_outputs(targets: np.ndarray[Any, Any], kind: str, count: int) -> Tensor:
    if kind == "number":
        return torch.as_tensor(np.median(targets, axis=0), dtype=torch.float32)
    if kind == "class":
        shares = torch.as_tensor(np.bincount(targets, minlength=count) / len(targets))
        return shares.clamp(min=_SMALLEST_SHARE).log().float()
    shares = torch.as_tensor(targets.mean(axis=0))
    return shares.clamp(_SMALLEST_SHARE, 1 - _SMALLEST_SHARE).logit().float()


def _answer(
    path: Path, summaries: Mapping[str, Mapping[str, Any]], constant: Mapping[str, float] | None, built: BuiltExperiment
) -> dict[str, Any]:
    """Compare the arms, and say in a sentence what comes of it."""
    task = built.experiment.task
    metric = task.primary_metric.name
    table = compare([path / FROM_SCRATCH, *(path / name for name in summaries if name != FROM_SCRATCH)])
    to_scratch = dict(
        zip([FROM_SCRATCH, *(name for name in summaries if name != FROM_SCRATCH)], table.rows, strict=True)
    )
    (_, frozen) = compare([path / RANDOM_FEATURES, path / LINEAR_PROBE]).rows
    arms: dict[str, Any] = {}
    if constant is not None:
        arms[CONSTANT[built.data.target]] = {
            table.split: {name: spread_json(spread([value])) for name, value in constant.items()}
        }
    for name, summary in summaries.items():
        arms[name] = {table.split: summary[table.split], "seconds": summary["seconds"], "folder": name}
        arms[name]["to_from_scratch"] = _row_json(to_scratch[name])
    sentences = [
        _tuned_sentence(to_scratch[FINE_TUNED], task),
        _frozen_sentence(frozen, task),
    ]
    best = max(to_scratch.values(), key=lambda row: _gain(row.spread.mean, task))
    if constant is not None and not _gain(best.spread.mean, task) > _gain(constant[metric], task):
        sentences.append(
            f"No arm beats the best constant answer ({metric} {constant[metric]:.4f}): nothing was learned."
        )
    return {
        "metric": metric,
        "higher_is_better": higher_is_better(task, metric),
        "split": table.split,
        "arms": arms,
        "linear_probe_to_random_features": _row_json(frozen),
        "negative_transfer": to_scratch[FINE_TUNED].verdict == "worse" or frozen.verdict == "worse",
        "notes": list(table.notes),
        "sentence": " ".join(sentences),
    }


def _row_json(row: Row) -> dict[str, Any] | None:
    if row.difference is None:
        return None
    interval = row.difference.interval
    return {"mean": row.difference.mean, "interval": interval and list(interval), "verdict": row.verdict}


def _tuned_sentence(row: Row, task: Task) -> str:
    amount, interval = _worth(row, task)
    if row.verdict == "better":
        return f"Pretraining is worth {amount} over training from scratch ({interval})."
    if row.verdict == "worse":
        return f"Negative transfer: fine-tuning gives {amount} over training from scratch ({interval})."
    return (
        "Whether pretraining helps cannot be told from noise: "
        f"fine-tuning gives {amount} over training from scratch ({interval})."
    )


def _frozen_sentence(row: Row, task: Task) -> str:
    amount, interval = _worth(row, task)
    if row.verdict == "better":
        return f"Frozen under a linear head, its features are worth {amount} over random ones ({interval})."
    if row.verdict == "worse":
        return (
            f"Negative transfer: frozen under a linear head, its features give {amount} over random ones ({interval})."
        )
    return (
        "Frozen under a linear head, its features cannot be told from random ones: "
        f"they give {amount} over those ({interval})."
    )


def _worth(row: Row, task: Task) -> tuple[str, str]:
    """Return a difference and its interval in words; positive is better whatever the metric's direction."""
    assert row.difference is not None
    metric = task.metrics()[task.primary_metric.name]
    bounds = (getattr(metric, "plot_lower_bound", None), getattr(metric, "plot_upper_bound", None))
    scale, digits, unit = (100, 1, "points of") if bounds == (0, 1) else (1, 4, "of")
    sign = "" if row.verdict == "better" else "+"
    gain = _gain(row.difference.mean, task) * scale
    of = f"{gain:{sign}.{digits}f} {unit} {task.primary_metric.name.replace('_', ' ')}"
    if row.difference.interval is None:
        return of, "no interval"
    low, high = sorted(_gain(end, task) * scale for end in row.difference.interval)
    return of, f"95 % interval {low:{sign}.{digits}f} to {high:{sign}.{digits}f}"


def _gain(figure: float, task: Task) -> float:
    return figure if task.primary_metric.higher_is_better else -figure
