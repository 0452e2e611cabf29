"""Audit of a dataset: labels that are probably wrong, near duplicates, and examples unlike all others.

Everything is computed from the features of a frozen backbone, as they are in the feature cache. Each example is judged
by a linear head that was fitted to other examples (out-of-fold probabilities).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from transfer.config.run_config import Config
from transfer.data.splits import fold_numbers
from transfer.errors import ConfigError, UserError
from transfer.experiments.frozen_features import Examples, cosines, features_of, probing_config
from transfer.interfaces import Split, Task
from transfer.registry.requirements import CORE_DISTRIBUTION, unmet
from transfer.runs.prediction_files import replaced_file
from transfer.system.ranks import refuse_several
from transfer.training.build import BuiltExperiment, build
from transfer.training.events import Note, Observer, ignore_events
from transfer.training.solver import solve_on_features

NEIGHBORS = 10
"""Number of nearest examples whose mean distance tells outliers from others."""
OUTLIER_FENCE = 3.0
"""An outlier is this many interquartile ranges above the upper quartile of the distances (Tukey's outer fence)."""
SIMILARITY = 0.97
"""Default of the smallest cosine of near duplicates, after the mean of all features is subtracted."""
COLUMNS = (
    *("split", "index", "name", "label", "suggested", "probability", "issues"),
    *("duplicate_of", "similarity", "distance", "exclude"),
)
"""Columns of the CSV file."""
_CLEAN_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Finding:
    """An example with an issue.

    Args:
        split: Name of the split.
        index: Index of the example in the split.
        name: Name of the example.
        label: Name of its class.
        suggested: Most probable class according to the other examples.
        probability: Out-of-fold probability of its label.
        issues: Names of the issues: ``label``, ``duplicate``, ``leak`` (a duplicate in another split) or ``outlier``.
        duplicate_of: Name of the most similar example, with its split. Empty if there is no near duplicate.
        similarity: Cosine of the features of these two. None without a near duplicate.
        distance: Mean cosine distance to the nearest examples.
        exclude: Whether ``data.exclude`` leaves the example out: wrong labels of the training and the validation split,
            and all but one of several near duplicates. Examples of the test split are never left out.
    """

    split: str
    index: int
    name: str
    label: str
    suggested: str
    probability: float
    issues: tuple[str, ...]
    duplicate_of: str
    similarity: float | None
    distance: float
    exclude: bool


@dataclass(frozen=True)
class Audit:
    """The result of :func:`audit`.

    Args:
        findings: Examples with an issue, the most probably wrong labels first.
        examples: Number of audited examples of each split.
        accuracy: Out-of-fold accuracy of the linear head: findings are as good as its features.
    """

    findings: tuple[Finding, ...]
    examples: Mapping[str, int]
    accuracy: float

    def counts(self) -> dict[str, int]:
        """Return the number of examples with each issue."""
        names = ("label", "duplicate", "leak", "outlier")
        return {name: sum(name in finding.issues for finding in self.findings) for name in names}

    def write_csv(self, path: str | Path) -> None:
        """Write a row for each example with an issue. ``data.exclude`` reads the columns split, name and exclude."""
        with replaced_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for one in self.findings:
                similarity = "" if one.similarity is None else f"{one.similarity:.4f}"
                issues, exclude = " ".join(one.issues), "yes" if one.exclude else "no"
                row = [one.split, one.index, one.name, one.label, one.suggested, f"{one.probability:.4f}", issues]
                writer.writerow([*row, one.duplicate_of, similarity, f"{one.distance:.4f}", exclude])


def audit(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    folds: int = 5,
    similarity: float = SIMILARITY,
    device: str | None = None,
    observe: Observer = ignore_events,
) -> Audit:
    """Look for wrong labels, near duplicates and outliers in the data of a config.

    Wrong labels are found by confident learning (Northcutt et al. 2021, cleanlab) from out-of-fold probabilities.

    Args:
        config: Path of a YAML file, or the config as a mapping. Only its data and its pretrained backbone are used.
        overrides: Changes to the config, each ``path.to.key=value``.
        folds: Number of folds, 2 or more.
        similarity: Smallest cosine of the features of near duplicates, between 0 and 1.
        device: Device to compute on. None uses the ``train.device`` of the config.
        observe: Function that is called with notes and the progress of computing features.

    Raises:
        UserError: The config or the data is wrong, an example does not have exactly one class, or cleanlab is missing.
        TrainingError: Features are not finite.
    """
    refuse_several("transfer audit")
    if problem := unmet(CORE_DISTRIBUTION, ("audit",)):
        raise UserError(f"audit needs an extra: {problem.message}", fix=problem.fix)
    if not 0 < similarity <= 1:
        raise UserError(f"the similarity is wrong: expected a cosine above 0, at most 1, got {similarity}")
    checked = probing_config(config, [*overrides, *([] if device is None else [f"train.device={device}"])])
    built = build(checked, lambda event: None if isinstance(event, Note) else observe(event))
    if built.data.target != "class":
        raise ConfigError(
            f"the targets cannot be audited: expected one class per example, got {built.data.target}",
            where=checked.data.where,
        )
    if not built.pretrained:
        observe(Note("warning: the backbone loads no pretrained weights: features of random weights find little"))
    features = features_of(built, observe)
    splits = {name: loader.split for name, loader in built.loaders.items()}
    everything = Examples(
        torch.cat([one.features for one in features.values()]), torch.cat([one.targets for one in features.values()])
    )
    # A group is divided over no two folds: images of one patient would reveal each other's label.
    groups = [split.groups for split in splits.values()]
    together = None if any(one is None for one in groups) else np.concatenate([g for g in groups if g is not None])
    targets = everything.targets.cpu().numpy()
    numbers = fold_numbers(Split({}, targets, groups=together), folds)
    probabilities = _out_of_fold(built.experiment.task, everything, numbers)
    is_wrong, suggested = _label_issues(targets, probabilities)
    is_test = torch.tensor([name == "test" for name, split in splits.items() for _ in range(len(split))])
    neighbors = _neighbors(everything.features, is_test.to(everything.features.device), similarity)
    findings = _findings(splits, built, probabilities, is_wrong, suggested, neighbors, similarity)
    accuracy = float((probabilities.argmax(1) == targets).mean())
    ranked = sorted(findings, key=lambda one: ("label" not in one.issues, one.probability))
    return Audit(tuple(ranked), {name: len(split) for name, split in splits.items()}, accuracy)


def _out_of_fold(task: Task, examples: Examples, folds: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the probability of each class for each example, by a head that was fitted to the other folds, (N, C)."""
    probabilities = torch.empty(len(folds), task.out_features, dtype=torch.float64)
    for number in np.unique(folds):
        inside = torch.from_numpy(folds == number).to(examples.features.device)
        train = examples.features[~inside].clone(), examples.targets[~inside]
        task.prepare(train[1].cpu().numpy())
        indices = torch.arange(len(train[1]))
        solved = solve_on_features(task, None, train, None, indices=indices)
        weight, bias = (tensor.to(examples.features) for tensor in (solved.weight, solved.bias))
        outputs = F.linear(examples.features[inside], weight, bias)
        probabilities[inside.cpu()] = task.scores(outputs.float()).double().cpu()
    return np.asarray(probabilities.numpy())


def _label_issues(
    targets: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return whether the label of each example is probably wrong, and the most probable class of each example."""
    from cleanlab.filter import find_label_issues

    # Without processes of its own, which would import everything again.
    issues = find_label_issues(targets, probabilities, filter_by="prune_by_noise_rate", n_jobs=1)
    return np.asarray(issues, dtype=bool), probabilities.argmax(1)


@dataclass(frozen=True)
class _Neighbors:
    """The most similar other examples of each of N examples.

    Args:
        nearest: Index of the most similar one, int64 (N,).
        similarity: Cosine of these two, (N,).
        distance: Mean cosine distance to the nearest ones, (N,).
        is_spare: Whether an earlier example or one of the test split is a near duplicate, (N,).
    """

    nearest: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float64]
    distance: npt.NDArray[np.float64]
    is_spare: npt.NDArray[np.bool_]


def _neighbors(features: Tensor, is_test: Tensor, similarity: float) -> _Neighbors:
    """Return the neighbors of examples by the cosine of their features (N, D), after their mean is subtracted."""
    directions = F.normalize((features - features.mean(0)).float(), dim=1)
    positions = torch.arange(len(directions), device=directions.device)
    columns: list[tuple[Tensor, ...]] = []
    for start, block in cosines(directions, directions):
        own = positions[start : start + len(block), None]
        block = block.masked_fill(positions == own, -2.0)  # an example is not its own neighbor
        values, indices = block.topk(min(NEIGHBORS, len(directions) - 1), dim=1)
        is_spare = ((block >= similarity) & ((positions < own) | is_test)).any(1)
        columns.append((indices[:, 0], values[:, 0].double(), (1 - values).mean(1).double(), is_spare))
    return _Neighbors(*(torch.cat(parts).cpu().numpy() for parts in zip(*columns, strict=True)))


def _findings(
    splits: Mapping[str, Split],
    built: BuiltExperiment,
    probabilities: npt.NDArray[np.float64],
    is_wrong: npt.NDArray[np.bool_],
    suggested: npt.NDArray[np.int64],
    neighbors: _Neighbors,
    similarity: float,
) -> Iterator[Finding]:
    low, high = np.quantile(neighbors.distance, [0.25, 0.75])
    is_outlier = neighbors.distance > high + OUTLIER_FENCE * (high - low)
    where = [(name, index) for name, split in splits.items() for index in range(len(split))]
    for position, (name, index) in enumerate(where):
        issues = ["label"] * bool(is_wrong[position])
        cosine = float(neighbors.similarity[position])
        twin = where[neighbors.nearest[position]] if cosine >= similarity else None
        if twin is not None:
            issues += ["duplicate", *["leak"] * (twin[0] != name)]
        issues += ["outlier"] * bool(is_outlier[position])
        if not issues:
            continue
        split, label = splits[name], int(splits[name].targets[index])
        yield Finding(
            split=name,
            index=index,
            name=split.name(index),
            label=built.data.classes[label],
            suggested=built.data.classes[int(suggested[position])],
            probability=float(probabilities[position, label]),
            issues=tuple(issues),
            duplicate_of="" if twin is None else f"{twin[0]}: {splits[twin[0]].name(twin[1])}",
            similarity=None if twin is None else cosine,
            distance=float(neighbors.distance[position]),
            # Of several duplicates the first remains; the test split is never changed.
            exclude=name in _CLEAN_SPLITS and ("label" in issues or bool(neighbors.is_spare[position])),
        )
