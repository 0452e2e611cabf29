"""TF-IDF with logistic regression: the baseline that a model of texts has to exceed."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.interfaces import Split, Task
from transfer.training.build import BuiltExperiment

INSTALL = "pip install 'transferkit[sklearn]'"
INVERSE_PENALTIES = (1.0, 10.0, 100.0)
"""Values of scikit-learn's C, the best of which is chosen on the validation split, as the arms choose their epoch."""
MAX_ITERATIONS = 1_000
_MIN_PROBABILITY = 1e-6
"""Probability of a class without training examples: the logarithm of zero is not finite."""


def applies(built: BuiltExperiment) -> bool:
    """Return whether the baseline applies: one field of texts, and classes or labels as targets."""
    fields = built.backbone.fields
    if len(fields) != 1 or built.data.target not in ("class", "labels"):
        return False
    is_text = isinstance(built.loaders["train"].split.column(*fields)[0], str)
    return is_text and built.experiment.task.out_features == len(built.data.classes)


def is_installed() -> bool:
    """Return whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


def tfidf_metrics(built: BuiltExperiment) -> dict[str, float]:
    """Return the metrics of TF-IDF with logistic regression on the test split, or on the validation split without one.

    The terms are single tokens and pairs of tokens, with the tokenizer of the model.

    Args:
        built: Experiment with its splits; the baseline must apply (:func:`applies`).
    """
    text, linear_model = (
        importlib.import_module(f"sklearn.{name}") for name in ("feature_extraction.text", "linear_model")
    )
    splits = {name: loader.split for name, loader in built.loaders.items()}
    task, field = built.experiment.task, built.backbone.fields[0]
    # Tokens of the model: scikit-learn's own pattern drops single characters, which are the words of Chinese texts.
    vectorizer = text.TfidfVectorizer(
        tokenizer=getattr(built.backbone.preprocessing, "tokenize", str.split),
        token_pattern=None,
        lowercase=False,
        ngram_range=(1, 2),
        sublinear_tf=True,
        dtype=np.float32,
    )
    train = vectorizer.fit_transform(list(splits["train"].column(field)))
    others = [name for name in splits if name != "train"]
    matrices = {name: vectorizer.transform(list(splits[name].column(field))) for name in others}
    sign = 1 if task.primary_metric.higher_is_better else -1

    def fit(inverse_penalty: float) -> Sequence[Any]:
        columns = _columns(splits["train"].targets)
        return [
            linear_model.LogisticRegression(C=inverse_penalty, max_iter=MAX_ITERATIONS).fit(train, column)
            if len(np.unique(column)) > 1
            else None  # a label that all training texts have, or none of them
            for column in columns
        ]

    def outputs(models: Sequence[Any], matrix: Any) -> Tensor:
        return _outputs(models, matrix, splits["train"], len(built.data.classes))

    def metrics(models: Sequence[Any], name: str) -> dict[str, float]:
        return metrics_of_outputs(task, outputs(models, matrices[name]), splits[name])

    def score(models: Sequence[Any]) -> float:
        return sign * metrics(models, "validation")[task.primary_metric.name]

    # Without a validation split nothing is selected, as in the arms, which then keep their last epoch.
    penalties = INVERSE_PENALTIES if "validation" in splits else INVERSE_PENALTIES[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optimizer that stops early gives a slightly weaker baseline
        fitted = map(fit, penalties)
        models = max(fitted, key=score) if len(penalties) > 1 else next(fitted)
    return metrics(models, scored_split(built))


def scored_split(built: BuiltExperiment) -> str:
    """Return the name of the split on which the arms are compared: the test split, if runs score it."""
    return "test" if built.experiment.test is not None or "validation" not in built.loaders else "validation"


def _columns(targets: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Return the targets of each regression: the classes (N,), or each column of labels (N, C)."""
    return [targets] if targets.ndim == 1 else list(targets.T)


def _outputs(models: Sequence[Any], matrix: Any, train: Split, count: int) -> Tensor:
    """Return outputs (N, C) that the task interprets as the predictions of the models: logarithms or log odds."""
    if train.targets.ndim == 1:
        (model,) = models
        # The model knows only classes that occur in the training split.
        outputs = np.full((matrix.shape[0], count), np.log(_MIN_PROBABILITY), dtype=np.float32)
        outputs[:, model.classes_] = np.maximum(model.predict_log_proba(matrix), np.log(_MIN_PROBABILITY))
    else:
        constant = np.where(train.targets[0] > 0, 1, -1) * -np.log(_MIN_PROBABILITY)
        columns = [
            np.full(matrix.shape[0], constant[index]) if model is None else model.decision_function(matrix)
            for index, model in enumerate(models)
        ]
        outputs = np.stack(columns, axis=1).astype(np.float32)
    return torch.from_numpy(outputs)


def metrics_of_outputs(task: Task, outputs: Tensor, split: Split) -> dict[str, float]:
    """Return the metrics of a task for given outputs (N, C) of the examples of a split."""
    predictions, inputs, targets = (
        task.predictions(outputs),
        task.metric_inputs(outputs),
        torch.as_tensor(split.targets),
    )
    values = {}
    for name, metric in task.metrics().items():
        metric.update(inputs.get(name, predictions), targets)
        values[name] = float(metric.compute())
    return values
