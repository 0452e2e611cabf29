"""The estimator of scikit-learn: its parameters, labels and inputs, and scikit-learn's own checks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import transfer
from transfer import Classifier, DataError, UserError

sklearn = pytest.importorskip("sklearn")
from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.utils import estimator_checks  # noqa: E402

TRAIN = {"epochs": 2, "batch_size": 4, "cache": "off", "optimizer": {"lr": 0.01}}
POINTS = [[4.0 * (i % 2), 0.01 * i, 0.0, 1.0] for i in range(24)]
LABELS = [10 if i % 2 else 9 for i in range(24)]

# The other checks of scikit-learn fit matrices of random numbers, which are neither texts nor images: scikit-learn
# skips them for an estimator with the tag `two_d_array=False`.
CHECKS = (
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_tags_renamed,
    estimator_checks.check_valid_tag_types,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_estimators_unfitted,
    estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    estimator_checks.check_n_features_in_after_fitting,
    estimator_checks.check_mixin_order,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_set_params,
    estimator_checks.check_parameters_default_constructible,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_classifier_passes_the_check_of_scikit_learn(check: Callable[..., None]) -> None:
    check("Classifier", Classifier("textcnn"))


def test_classifier_without_a_matrix_is_skipped_by_the_other_checks() -> None:
    with pytest.warns(estimator_checks.SkipTestWarning):
        assert not list(estimator_checks._yield_all_checks(Classifier(), legacy=True))


@pytest.mark.usefixtures("tiny")
def test_labels_keep_their_type_and_order(tmp_path: Path) -> None:
    classifier = Classifier("dense", train=TRAIN, output=tmp_path).fit(POINTS, LABELS)
    assert classifier.classes_.tolist() == [9, 10]
    assert classifier.predict(POINTS[:2]).tolist() == [9, 10]
    probabilities = classifier.predict_proba(np.array(POINTS))
    assert probabilities.shape == (24, 2)
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert classifier.score(POINTS, LABELS) == 1.0
    assert (classifier.run_ / "report.html").is_file()
    words = clone(classifier).set_params(output=None).fit(POINTS, np.array(["x", "w"] * 12))
    assert not hasattr(words, "run_")
    assert pickle.loads(pickle.dumps(words)).predict(POINTS[:2]).tolist() == ["x", "w"]


@pytest.mark.usefixtures("tiny")
def test_classifier_is_searched_and_cross_validated() -> None:
    classifier = Classifier("dense", train=TRAIN)
    assert len(cross_val_score(classifier, POINTS, LABELS, cv=2, error_score="raise")) == 2
    heads = ["linear", {"name": "mlp"}]
    search = GridSearchCV(classifier, {"head": heads}, cv=2, refit=False, error_score="raise")
    search.fit(POINTS, LABELS)
    assert len(search.cv_results_["params"]) == 2


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_texts_and_images_are_inputs(kind: str) -> None:
    texts = [f"{'good great' if i % 2 else 'bad awful'} film {i}" for i in range(24)]
    arrays = [np.full((12, 12, 3), 200 * (i % 2), dtype=np.uint8) for i in range(24)]
    images = [array if i % 4 else Image.fromarray(array) for i, array in enumerate(arrays)]
    backbone: Any = (
        "textcnn"
        if kind == "texts"
        else {"name": "torchvision", "model": "squeezenet1_1", "weights": None, "image_size": 32}
    )
    values: Any = np.array(texts) if kind == "texts" else images
    classifier = Classifier(backbone, train={"epochs": 1}, validation=0).fit(values, LABELS)
    assert set(classifier.predict(values)) <= {9, 10}


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (["a"] * 3, [0, 1], "X and y differ in length: 3 examples and 2 labels"),
        ([], [], "the table contains no rows"),
        (["a", "b"], [0, 0], "contains only the class"),
        (["a", "b"], ["x", None], "the labels are of the wrong type"),
        (["a", "b"], [0.5, float("nan")], "y is wrong: expected classes, got numbers"),
        (["a", "b"], [[0], [1]], "y is wrong: expected one label per example"),
        ("a text", ["x"], "X is wrong: expected a list of texts or images, got str"),
        ([{"a": 1}, "b"], [0, 1], "expected text, got dict"),
    ],
)
def test_wrong_examples_and_labels_are_refused(values: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Classifier("textcnn").fit(values, labels)


def test_unfitted_classifier_and_unknown_backbone_are_refused() -> None:
    with pytest.raises(NotFittedError, match="this Classifier is not fitted"):
        Classifier("textcnn").predict(["a"])
    with pytest.raises(UserError, match="unknown backbone 'textcn'"):
        transfer.Classifier("textcn").fit(["a", "b"], [0, 1])
