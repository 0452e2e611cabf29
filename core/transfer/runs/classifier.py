"""A classifier with the interface of scikit-learn on top of :func:`transfer.run`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.data.in_memory import IMAGE, TEXT, InMemoryTable
from transfer.errors import ConfigError, DataError
from transfer.registry import entry_points
from transfer.runs.predictor import Predictor, load
from transfer.runs.train import run
from transfer.training.events import Observer, ignore_events

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.exceptions import NotFittedError
except ImportError:  # without scikit-learn the class cannot be cloned or searched, which only scikit-learn does

    class BaseEstimator:  # type: ignore[no-redef]
        """Stand-in for the base class of scikit-learn."""

    class ClassifierMixin:  # type: ignore[no-redef]
        """Stand-in for the classifier of scikit-learn."""

    class NotFittedError(ValueError):  # type: ignore[no-redef]
        """Stand-in for the exception of scikit-learn."""


Block = str | Mapping[str, Any]


class Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Pretrained backbone and new head as an estimator of scikit-learn, for texts or images.

    ``X`` is a list, an array of objects or a column of texts, or of images: PIL images, uint8 arrays (H, W, C), paths.
    ``y`` contains one label per example, of any type that can be sorted.

    Args:
        backbone: Name of the backbone, or its block in a config (``{"name": "resnet18", "image_size": 128}``).
        head: Name or block of the head. None uses the default of the backbone.
        adapter: Block of an adapter. None trains the weights themselves.
        train: Block ``train`` of a config (``{"epochs": 5, "optimizer": {"lr": 1e-4}}``). None uses the defaults.
        validation: Fraction of the examples by which the best epoch is selected; 0 keeps the last epoch.
        random_state: Seed of all random number generators.
        output: Folder in which the run directory is created (``run_``). None keeps only the model, in memory.
        observe: Function that is called with every event of the training. None reports nothing.
    """

    def __init__(
        self,
        backbone: Block = "resnet18",
        *,
        head: Block | None = None,
        adapter: Mapping[str, Any] | None = None,
        train: Mapping[str, Any] | None = None,
        validation: float = 0.1,
        random_state: int = 0,
        output: str | Path | None = None,
        observe: Observer | None = None,
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.adapter = adapter
        self.train = train
        self.validation = validation
        self.random_state = random_state
        self.output = output
        self.observe = observe

    def fit(self, X: Any, y: Any) -> Classifier:  # noqa: N803  # the names of scikit-learn
        """Train on examples ``X`` and their labels ``y``.

        Raises:
            UserError: The configuration or the data is wrong; one class, no examples and missing labels are refused.
        """
        values, labels = _values(X), _labels(y)
        if len(values) != len(labels):
            raise DataError(f"X and y differ in length: {len(values)} examples and {len(labels)} labels")
        try:
            classes, targets = np.unique(labels, return_inverse=True)
        except TypeError:
            raise DataError("the labels are of the wrong type: expected values of one type, without None") from None
        field = self._field()
        # The names are indices, padded so that their alphabetical order is that of the classes.
        names = np.array([f"{index:06d}" for index in range(len(classes))], dtype=object)
        table = InMemoryTable({"train": {"X": values, "y": names[targets]}}, {field: "X"}, "y")
        # Nobody reads the report of a run directory that is removed.
        train = {"report": False} if self.output is None else {}
        config: dict[str, Any] = {"seed": self.random_state, "data": {"validation": self.validation}}
        config |= {"backbone": _block(self.backbone), "train": train | dict(self.train or {})}
        config |= {name: _block(block) for name, block in (("head", self.head), ("adapter", self.adapter)) if block}
        with tempfile.TemporaryDirectory(prefix="transfer-") as temporary:
            done = run(config, data=table, output=self.output or temporary, observe=self.observe or ignore_events)
            self._predictor: Predictor = load(done.folder)
        self.classes_ = classes
        if self.output is not None:
            self.run_ = done.folder
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:  # noqa: N803
        """Return the probability of each class, float64 (N, C), in the order of ``classes_``.

        Raises:
            NotFittedError: The classifier has not been fitted.
            UserError: A value cannot be read, or is blank.
        """
        if not hasattr(self, "classes_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted: call fit first")
        predictor, values = self._predictor, _values(X)
        if self._field() == IMAGE:
            values = [Path(value) if isinstance(value, str) else value for value in values]
        answers = list(predictor.answers(predictor.inputs(values), all_probabilities=True))
        if not answers:
            raise DataError("X is empty: expected at least one example")
        rows = []
        for answer in answers:
            if (probabilities := answer["probabilities"]) is None:
                # No word is in the vocabulary: the classes are equally probable.
                probabilities = dict.fromkeys(predictor.classes, 1 / len(predictor.classes))
            rows.append([probabilities[name] for name in predictor.classes])
        return np.array(rows, dtype=np.float64)

    def predict(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803
        """Return the most probable class of each example, in the type of the labels."""
        probabilities = self.predict_proba(X)
        chosen: npt.NDArray[Any] = self.classes_[probabilities.argmax(axis=1)]
        return chosen

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:  # noqa: N803
        """Return the accuracy on examples ``X`` with the labels ``y``."""
        return float(np.average(self.predict(X) == _labels(y), weights=sample_weight))

    def _field(self) -> str:
        """Return the field that the backbone takes as input: ``text`` or ``image``."""
        name = str(_block(self.backbone).get("name"))
        field = getattr(entry_points.load("backbone", name), "field", None)
        if not isinstance(field, str):
            raise ConfigError(f"backbone {name!r} takes several fields: expected one", available=(TEXT, IMAGE))
        return field

    def __sklearn_tags__(self) -> Any:
        """Return the tags of scikit-learn: texts and images are no matrix of numbers."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.string, tags.no_validation = False, True, True
        tags.non_deterministic = False
        return tags


def _block(block: Block) -> dict[str, Any]:
    return {"name": block} if isinstance(block, str) else dict(block)


def _values(X: Any) -> list[Any]:  # noqa: N803
    """Return the examples of a list, an array or a column, without copying images."""
    if isinstance(X, str | bytes | Mapping) or not hasattr(X, "__len__"):
        raise DataError(f"X is wrong: expected a list of texts or images, got {type(X).__name__}")
    if type(X).__name__ == "DataFrame":
        raise DataError("X is a table: expected one column, such as frame['text']")
    return list(X)


def _labels(y: Sequence[Any]) -> npt.NDArray[Any]:
    labels = np.asarray(y)
    if labels.ndim != 1:
        raise DataError(f"y is wrong: expected one label per example, got an array of shape {labels.shape}")
    if labels.dtype.kind == "f" and not (np.isfinite(labels) & (labels == labels.round())).all():
        raise DataError("y is wrong: expected classes, got numbers that are not finite integers")
    return labels
