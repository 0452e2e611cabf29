"""Simple classifiers on features: a solved linear model, the nearest class mean, and k nearest neighbors.

The last two compare features by their cosine after the mean of the training features is subtracted (SimpleShot, Wang et
al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer.experiments.frozen_features import Examples, cosines
from transfer.interfaces import Task
from transfer.training.build import BuiltExperiment
from transfer.training.solver import STRENGTHS, solve_on_features

LINEAR, MEANS, NEIGHBORS = "logistic regression", "class means", "nearest neighbors"
LINEAR_NAMES = {"class": LINEAR, "labels": LINEAR, "number": "ridge regression"}
"""Name of the linear model, by the kind of target."""
NEIGHBOR_COUNTS = (1, 3, 5, 10, 20, 50)
"""Candidates for k."""
TEMPERATURE = 0.07
"""The vote of a neighbor is exp(cosine / temperature) (Wu et al. 2018, section 3.4)."""
_MIN_PROBABILITY = 1e-6
"""Probability of a class without votes: the logarithm of zero is not finite."""

Predict = Callable[[Tensor, Sequence[float]], list[Tensor]]
"""Function of features (N, D) and parameters that returns outputs (N, C) for each parameter."""


def fitted_classifiers(
    built: BuiltExperiment, task: Task, train: Examples, validation: Examples, few: bool
) -> dict[str, tuple[Predict, Sequence[float]]]:
    """Return the classifiers by name, fitted to training examples, and the candidates for their parameters.

    Args:
        built: Experiment, for the kind of its targets.
        task: Task: loss and scaling of the outputs.
        train: Training examples.
        validation: Examples that choose the strength of the L2 penalty.
        few: Whether there are few training examples, which need fewer candidates for the strength.
    """
    # With few examples the strength matters little, and a third of the candidates is solved in a third of the time.
    strengths = STRENGTHS[::3] if few else STRENGTHS
    pairs = (train.features.clone(), train.targets), (validation.features, validation.targets)
    scaling = task.output_scaling()
    solved = solve_on_features(task, scaling, *pairs, strengths=strengths)
    weight, bias = (tensor.to(train.features) for tensor in (solved.weight, solved.bias))

    def linear(features: Tensor, parameters: Sequence[float]) -> list[Tensor]:
        outputs = F.linear(features, weight, bias).float()
        if scaling is not None:
            outputs = scaling[0].to(outputs.device) + scaling[1].to(outputs.device) * outputs
        return [outputs for _ in parameters]

    kind = built.data.target
    mean = train.features.mean(0)

    def directions(features: Tensor) -> Tensor:
        return F.normalize((features - mean).float(), dim=1)

    known = directions(train.features)
    targets = train.targets.float()
    if kind == "class":
        targets = F.one_hot(train.targets, task.out_features).float()

    def neighbors(features: Tensor, parameters: Sequence[float]) -> list[Tensor]:
        return [_as_outputs(votes, kind) for votes in votes_of(known, targets, directions(features), parameters)]

    counts = [count for count in NEIGHBOR_COUNTS if count <= len(known)]
    classifiers: dict[str, tuple[Predict, Sequence[float]]] = {LINEAR_NAMES[kind]: (linear, [solved.strength])}
    if kind == "class":
        sums = targets.T @ known
        means = F.normalize(sums, dim=1)

        def class_means(features: Tensor, parameters: Sequence[float]) -> list[Tensor]:
            outputs = directions(features) @ means.T / TEMPERATURE
            # A class without training examples has no mean, and is not predicted.
            return [outputs.masked_fill(~targets.any(0), -1 / TEMPERATURE) for _ in parameters]

        classifiers[MEANS] = class_means, [0]
    classifiers[NEIGHBORS] = neighbors, counts
    return classifiers


def votes_of(known: Tensor, targets: Tensor, queries: Tensor, counts: Sequence[float]) -> list[Tensor]:
    """Return the weighted mean of the targets of the nearest neighbors, (N, C), for each number of neighbors.

    Args:
        known: Normalized features of the training examples, (M, D).
        targets: Their targets, (M, C): one-hot classes, labels or numbers.
        queries: Normalized features of the examples to predict, (N, D).
        counts: Numbers of neighbors.
    """
    votes: list[list[Tensor]] = [[] for _ in counts]
    for _, block in cosines(queries, known):
        highest, indices = block.topk(int(max(counts)), dim=1)
        for index, count in enumerate(map(int, counts)):
            # The largest exponent is 0, so that the sum is at least 1.
            weights = ((highest[:, :count] - highest[:, :1]) / TEMPERATURE).exp()
            total = torch.einsum("nk,nkc->nc", weights, targets[indices[:, :count]])
            votes[index].append(total / weights.sum(1, keepdim=True))
    return [torch.cat(parts) for parts in votes]


def _as_outputs(votes: Tensor, kind: str) -> Tensor:
    """Return the outputs (N, C) that a task interprets as votes: logarithms, log odds, or the numbers themselves."""
    if kind == "number":
        return votes
    if kind == "class":
        return votes.clamp(min=_MIN_PROBABILITY).log()
    return votes.clamp(_MIN_PROBABILITY, 1 - _MIN_PROBABILITY).logit()
