"""A model of texts beside TF-IDF with logistic regression."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from transfer.config.check import load_config
from transfer.experiments import pretraining_gain, tfidf
from transfer.training.build import BuiltExperiment, build
from transfer.training.events import Event, Note


class _Counts:
    """Stand-in for scikit-learn's vectorizer: binary counts of tokens."""

    def __init__(self, *, tokenizer: Any, **_: Any) -> None:
        self.tokenizer = tokenizer

    def fit_transform(self, texts: list[str]) -> np.ndarray[Any, Any]:
        self.words = sorted({token for text in texts for token in self.tokenizer(text)})
        return self.transform(texts)

    def transform(self, texts: list[str]) -> np.ndarray[Any, Any]:
        return np.array([[word in self.tokenizer(text) for word in self.words] for text in texts], dtype=np.float32)


class _Regression:
    """Stand-in for scikit-learn's logistic regression of two classes: least squares."""

    def __init__(self, **_: Any) -> None: ...

    def fit(self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> _Regression:
        self.classes_ = np.unique(y)
        self.weights = np.linalg.pinv(x) @ np.where(y == self.classes_[1], 1, -1)
        return self

    def decision_function(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return x @ self.weights

    def predict_log_proba(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        odds = np.exp(self.decision_function(x))
        return np.log(np.stack([1 / (1 + odds), odds / (1 + odds)], axis=1))


@pytest.fixture(autouse=True)
def _scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace scikit-learn by stand-ins if the extra is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        text, linear = ModuleType("sklearn.feature_extraction.text"), ModuleType("sklearn.linear_model")
        text.TfidfVectorizer, linear.LogisticRegression = _Counts, _Regression  # type: ignore[attr-defined]
        for module in (ModuleType("sklearn"), ModuleType("sklearn.feature_extraction"), text, linear):
            monkeypatch.setitem(sys.modules, module.__name__, module)


def _built(folder: Path, rows: list[str], **options: Any) -> BuiltExperiment:
    (folder / "table.csv").write_text("\n".join(["text,label,other", *rows]) + "\n", encoding="utf-8")
    task = {"name": "multilabel" if options.get("target") == "labels" else "classification"}
    config = {
        "data": {"name": "text_csv", "train": str(folder / "table.csv"), "validation": 0.25, **options},
        "backbone": {"name": "textcnn", "filters": 2, "dimensions": 4},
        "task": task,
    }
    return build(load_config(config), lambda event: None)


@pytest.mark.parametrize("words", [("good", "bad"), ("好", "坏")])
def test_classes_are_predicted_from_words(tmp_path: Path, words: tuple[str, str]) -> None:
    rows = [f"a film {word} number {index},{word},0" for index in range(20) for word in words]
    built = _built(tmp_path, rows, test_fraction=0.25)
    assert tfidf.applies(built)
    metrics = tfidf.tfidf_metrics(built)
    assert metrics["accuracy"] == 1.0
    assert set(metrics) == set(built.experiment.task.metrics())


def test_labels_are_predicted_and_constant_ones_too(tmp_path: Path) -> None:
    rows = [f"a film {word} number {index},{int(word == 'good')},1" for index in range(20) for word in ("good", "bad")]
    built = _built(tmp_path, rows, label=["label", "other"], target="labels")
    metrics = tfidf.tfidf_metrics(built)
    assert metrics[built.experiment.task.primary_metric.name] == 1.0


def test_baseline_does_not_apply_to_numbers_and_points(config: dict[str, Any]) -> None:
    assert not tfidf.applies(build(load_config(config), lambda event: None))


def test_missing_scikit_learn_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = _built(tmp_path, [f"word {index},{'ab'[index % 2]},0" for index in range(20)])
    monkeypatch.setattr(tfidf, "is_installed", lambda: False)
    events: list[Event] = []
    assert list(pretraining_gain._simple_metrics(built, events.append)) == ["majority_class"]
    (note,) = events
    assert isinstance(note, Note)
    assert "pip install 'transferkit[sklearn]'" in note.text


def test_baseline_is_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = _built(tmp_path, [f"word {'ab'[index % 2]},{'ab'[index % 2]},0" for index in range(20)])
    monkeypatch.setattr(tfidf, "is_installed", lambda: True)
    simple = pretraining_gain._simple_metrics(built, lambda event: None)
    assert list(simple) == ["majority_class", "tfidf_logistic_regression"]
    assert simple["majority_class"]["accuracy"] == 0.5
    assert simple["tfidf_logistic_regression"]["accuracy"] == 1.0


def test_baseline_without_validation_uses_test_split(tmp_path: Path) -> None:
    rows = [f"a film {word} number {index},{word},0" for index in range(20) for word in ("good", "bad")]
    built = _built(tmp_path, rows, test_fraction=0.25, validation=0)
    assert sorted(built.loaders) == ["test", "train"]
    assert tfidf.tfidf_metrics(built)["accuracy"] == 1.0
