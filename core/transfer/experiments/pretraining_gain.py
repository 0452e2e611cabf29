"""The gain of pretraining on a task: the same model and splits, with and without it, over several seeds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfer.config.check import config_of_moved_run, load_config
from transfer.config.older_versions import add_missing_options
from transfer.config.run_config import Config, RunConfig
from transfer.config.tracker_variables import read_tracker_variables, stored_config
from transfer.errors import RunError, UserError
from transfer.experiments import tfidf
from transfer.experiments.comparison import Row, compare, higher_is_better
from transfer.experiments.intervals import Spread, metric_bounds, spread
from transfer.experiments.seeds import (
    Seeds,
    recorded_outcome,
    removed_if_nothing_ran,
    seeds_of,
    spread_json,
    train_seeds,
)
from transfer.interfaces import Task
from transfer.runs.train import Run
from transfer.storage.run_directory import FORMAT, RunDirectory
from transfer.system.atomic_files import read_json, write_json
from transfer.system.file_schema import FileSchema, checked
from transfer.system.ranks import refuse_several
from transfer.training.build import BuiltExperiment, build, with_found_batch_size
from transfer.training.events import Note, Observer, ignore_events
from transfer.training.preflight import CheckedParts, preflight

VALUE = "value.json"
"""File in the folder of a comparison that contains its config, its seeds and, at the end, its result."""
CONSTANT = {"class": "majority_class", "labels": "constant", "number": "constant"}
"""Name of the best constant prediction, by the kind of target."""
RANDOM_FEATURES, LINEAR_PROBE, FROM_SCRATCH, FINE_TUNED = (
    "random_features",
    "linear_probe",
    "from_scratch",
    "fine_tuned",
)
TFIDF = "tfidf_logistic_regression"
_MIN_FREQUENCY = 1e-6
"""Frequency of a class without training examples: the logarithm of zero is not finite."""


def pretraining_gain(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    seeds: int = 5,
    output: str | Path = "runs",
    observe: Observer = ignore_events,
) -> Run:
    """Train a config's model in four ways, each with several seeds, on the same splits and for as many epochs.

    The four arms:

    * ``random_features``: a linear head on the frozen network with random weights.
    * ``linear_probe``: a linear head on the frozen pretrained network.
    * ``from_scratch``: the complete model from random weights, at the head's learning rate.
    * ``fine_tuned``: the complete model from the pretrained weights, with the config's phases. If these train only the
      head, the backbone is trained at a lower rate.

    The best constant prediction is reported with them; for classes it is the most frequent class. For texts with
    classes or labels, TF-IDF with logistic regression is reported too if scikit-learn is installed.

    The frozen arms train on examples without random augmentation, as is usual (Kornblith et al. 2019). The features of
    the pretrained network are therefore computed once for all seeds.

    Args:
        config: Path of a YAML file, or the config as a mapping.
        overrides: Changes to the config, each ``path.to.key=value``.
        seeds: Number of seeds of each arm, 2 or more, starting with the config's own.
        output: Folder in which the folder of the comparison is created.
        observe: Function that is called with every event of every run (:mod:`transfer.training.events`).

    Returns:
        The folder and the content of ``value.json``: the ``arms``, and the result in a ``sentence``.

    Raises:
        UserError: The config, the data or the weights are wrong, or the config uses nothing that is pretrained.
        TrainingError: Training failed; :func:`resume_pretraining_gain` continues it.
    """
    refuse_several("transfer pretraining-gain")
    checked = load_config(config, overrides)
    numbers = seeds_of(checked, seeds)
    arms = _arms(checked, preflight(checked))
    # Check all arms first: an error in the last arm should not appear after hours of training.
    for arm in arms.values():
        preflight(arm)
    if checked.train.batch_size == "auto":  # all arms use the batch size of the arm that needs the most memory
        size = with_found_batch_size(arms[FROM_SCRATCH], observe).train.batch_size
        assert isinstance(size, int)
        checked, arms = checked.with_batch_size(size), {name: arm.with_batch_size(size) for name, arm in arms.items()}
    built = build(checked, observe)
    if not built.pretrained:
        raise UserError(
            f"backbone {checked.backbone.plugin.name!r} loads no pretrained weights, so there is no gain to measure",
            where=checked.backbone.where,
            fix="set pretrained weights or vectors, and do not use a recipe that starts from random weights",
        )
    if not {"validation", "test"} & built.loaders.keys():
        raise UserError(
            "the arms cannot be compared: the data has neither a validation split nor a test split",
            fix="set data.validation to 0.1, for example",
        )
    folder = RunDirectory.create(Path(output), checked.name, "-value")
    with removed_if_nothing_ran(folder.path):
        return _measure(folder, checked, arms, numbers, built, observe)


def resume_pretraining_gain(
    folder: str | Path, overrides: Sequence[str] = (), *, observe: Observer = ignore_events
) -> Run:
    """Resume a comparison that :func:`pretraining_gain` started. Complete runs stay.

    Args:
        folder: Folder of the comparison.
        overrides: Changes to the data block, each ``data.key=value``, if the data has moved. Other data is refused.
        observe: Function that is called with every event of every run (:mod:`transfer.training.events`).

    Raises:
        UserError: The folder is not one of a comparison, or another process writes into it.
        TrainingError: Training failed.
    """
    refuse_several("transfer pretraining-gain")
    path = Path(folder)
    fix = "give the folder that `transfer pretraining-gain` printed last"
    content = read_json(path / VALUE, f"{path} is not a folder of `transfer pretraining-gain`", fix)
    manifest = checked(content, _Manifest, str(path / VALUE))
    if manifest.status == "complete":
        _require_printable(content, path / VALUE)
        observe(Note(f"{path} is already complete"))
        return Run(path, content)
    config = config_of_moved_run(read_tracker_variables(add_missing_options(content["config"]))[0], overrides)
    built = build(config, observe)
    return _measure(
        RunDirectory(path), config, _arms(config, preflight(config)), manifest.seeds, built, observe, overrides
    )


class _Manifest(FileSchema):
    """The file ``value.json`` of a comparison, complete or not."""

    status: str
    seeds: Seeds
    config: dict[str, Any]


class _Difference(FileSchema):
    mean: float
    interval: tuple[float, float]
    verdict: str


class _Arm(FileSchema):
    seconds: float = 0.0
    to_from_scratch: _Difference | None = None


class _Result(FileSchema):
    """The part of the file of a complete comparison that the command prints."""

    metric: str
    split: str
    arms: dict[str, dict[str, Any]]
    notes: list[str]
    sentence: str


class _Spreads(FileSchema):
    spreads: dict[str, Spread]


def _require_printable(content: Mapping[str, Any], path: Path) -> None:
    """Require that the file of a complete comparison has everything that the command prints."""
    result = checked(content, _Result, str(path))
    for arm in result.arms.values():
        checked(arm, _Arm, str(path))
        if result.metric not in checked({"spreads": arm.get(result.split)}, _Spreads, str(path)).spreads:
            raise RunError(f"the file is damaged: an arm has no {result.metric}", where=str(path))


def _measure(
    folder: RunDirectory,
    config: RunConfig,
    arms: Mapping[str, RunConfig],
    seeds: Sequence[int],
    built: BuiltExperiment,
    observe: Observer,
    overrides: Sequence[str] = (),
) -> Run:
    manifest = {"format": FORMAT, "name": config.name, "seeds": list(seeds), "config": stored_config(config.resolved)}

    def write(outcome: Mapping[str, Any]) -> None:
        write_json(folder.path / VALUE, {**manifest, **outcome})

    with folder.locked(), recorded_outcome(folder, observe, write):
        write({"status": "running"})
        simple = _simple_metrics(built, observe)
        summaries = {}
        for number, (name, arm) in enumerate(arms.items(), 1):
            observe(Note(f"{title(name)}, arm {number} of {len(arms)}"))
            path = folder.path / name
            summaries[name] = train_seeds(arm, seeds, path, overrides, quick=False, observe=observe).summary
        result = {"status": "complete", **_result(folder.path, summaries, simple, built)}
        write(result)
    return Run(folder.path, {**manifest, **result})


def title(arm: str) -> str:
    """Return the name of an arm for people."""
    return arm.replace("_", " ")


def _arms(config: RunConfig, parts: CheckedParts) -> dict[str, RunConfig]:
    """Return the config of each arm, the cheapest arms first."""
    # All arms get the same number of epochs, so that none wins by training longer.
    epochs = sum(phase.epochs for phase in parts.phases)
    groups = [group for phase in parts.phases for group in phase.groups]
    # The highest rate of the head, which the config may set per phase.
    rate = max([group.lr for group in groups if group.stage == "head"] or [group.lr for group in groups])
    phases = config.train.phases
    scheduler = config.train.scheduler or (phases[-1].scheduler if phases else None)

    def recipe(name: str, **changes: Any) -> RunConfig:
        plain = copy.deepcopy(config.resolved)
        plain["train"] |= {"phases": None, "recipe": {"name": name, "epochs": epochs}, "scheduler": scheduler}
        plain["train"]["optimizer"]["lr"] = rate
        plain["train"]["views"] = None
        plain["train"] |= changes
        # The frozen arms measure the features, not a deep head. Sequences need the head that pools them.
        if "augment" in changes and parts.backbone.features.layout == "vector" and plain["head"]["name"] != "linear":
            plain["head"] = {"name": "linear"}
        return load_config(plain)

    # Without augmentation and mixing, the features of the frozen arms are constant and can be cached.
    constant = {"augment": False, "mix": None}
    tunes = any(group.stage != "head" for group in groups)
    return {
        RANDOM_FEATURES: recipe("random_features", **constant),
        LINEAR_PROBE: recipe("feature_extraction", **constant),
        FROM_SCRATCH: recipe("scratch"),
        FINE_TUNED: config if tunes else recipe("fine_tune"),
    }


def _simple_metrics(built: BuiltExperiment, observe: Observer) -> dict[str, dict[str, float]]:
    """Return the metrics of the predictions without a network, by name: a constant, and for texts TF-IDF."""
    metrics = {}
    if (constant := _constant(built)) is not None:
        metrics[CONSTANT[built.data.target]] = constant
    if not tfidf.applies(built):
        return metrics
    if tfidf.is_installed():
        observe(Note("TF-IDF with logistic regression"))
        return {**metrics, TFIDF: tfidf.tfidf_metrics(built)}
    observe(
        Note(f"TF-IDF with logistic regression is left out, because scikit-learn is not installed: {tfidf.INSTALL}")
    )
    return metrics


def _constant(built: BuiltExperiment) -> dict[str, float] | None:
    """Return the metrics of the best constant prediction on the scored split; None if the task has other outputs.

    The constant is the most frequent class of the training split, the frequency of each label, or the median of each
    number.
    """
    task, splits = built.experiment.task, {name: loader.split for name, loader in built.loaders.items()}
    scored = splits[tfidf.scored_split(built)]
    outputs = _constant_outputs(splits["train"].targets, built.data.target, len(built.data.classes))
    if task.out_features != len(outputs):
        return None
    return tfidf.metrics_of_outputs(task, outputs.expand(len(scored), -1), scored)


def _constant_outputs(targets: np.ndarray[Any, Any], kind: str, count: int) -> Tensor:
    """Return the outputs (C,) that a task interprets as the best constant prediction."""
    if kind == "number":
        return torch.as_tensor(np.median(targets, axis=0), dtype=torch.float32)
    if kind == "class":
        frequencies = torch.as_tensor(np.bincount(targets, minlength=count) / len(targets))
        return frequencies.clamp(min=_MIN_FREQUENCY).log().float()
    # The logit of the frequency is the constant output with the lowest cross-entropy.
    frequencies = torch.as_tensor(targets.mean(axis=0))
    return frequencies.clamp(_MIN_FREQUENCY, 1 - _MIN_FREQUENCY).logit().float()


def _result(
    path: Path,
    summaries: Mapping[str, Mapping[str, Any]],
    simple: Mapping[str, Mapping[str, float]],
    built: BuiltExperiment,
) -> dict[str, Any]:
    """Compare the arms, and summarize the result in a sentence."""
    task = built.experiment.task
    metric = task.primary_metric.name
    table = compare([path / FROM_SCRATCH, *(path / name for name in summaries if name != FROM_SCRATCH)])
    to_scratch = dict(
        zip([FROM_SCRATCH, *(name for name in summaries if name != FROM_SCRATCH)], table.rows, strict=True)
    )
    (_, frozen) = compare([path / RANDOM_FEATURES, path / LINEAR_PROBE]).rows
    arms: dict[str, Any] = {}
    for name, metrics in simple.items():
        arms[name] = {table.split: {key: spread_json(spread([value])) for key, value in metrics.items()}}
    for name, summary in summaries.items():
        arms[name] = {table.split: summary[table.split], "seconds": summary["seconds"], "folder": name}
        arms[name]["to_from_scratch"] = _row_json(to_scratch[name])
    sentences = [
        _tuned_sentence(to_scratch[FINE_TUNED], task),
        _frozen_sentence(frozen, task),
    ]
    # Compared with the simple models below: a gain over a bad model is worth nothing.
    best = max(to_scratch.values(), key=lambda row: _gain(row.spread.mean, task))
    for name, metrics in simple.items():
        if _gain(best.spread.mean, task) > _gain(metrics[metric], task):
            continue
        if name == TFIDF:
            reached = f"TF-IDF with logistic regression ({metric} {metrics[metric]:.4f})"
            sentences.append(f"No arm is better than {reached}: a simple model is at least as good here.")
        else:
            reached = f"the best constant prediction ({metric} {metrics[metric]:.4f})"
            sentences.append(f"No arm is better than {reached}: nothing was learned.")
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
        "The effect of pretraining is within noise: "
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
        "Frozen under a linear head, its features do not differ from random ones by more than noise: "
        f"they give {amount} over random ones ({interval})."
    )


def _worth(row: Row, task: Task) -> tuple[str, str]:
    """Return a difference and its interval as text, with the sign changed if lower is better."""
    assert row.difference is not None
    is_fraction = metric_bounds(task, task.primary_metric.name) == (0, 1)
    scale, digits, unit = (100, 1, "points of") if is_fraction else (1, 4, "of")
    sign = "" if row.verdict == "better" else "+"
    gain = _gain(row.difference.mean, task) * scale
    amount = f"{gain:{sign}.{digits}f} {unit} {task.primary_metric.name.replace('_', ' ')}"
    if row.difference.interval is None:
        return amount, "no interval"
    low, high = sorted(_gain(end, task) * scale for end in row.difference.interval)
    return amount, f"95 % interval {low:{sign}.{digits}f} to {high:{sign}.{digits}f}"


def _gain(value: float, task: Task) -> float:
    return value if task.primary_metric.higher_is_better else -value
