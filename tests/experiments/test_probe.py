"""Backbones side by side on cached features."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Dense, Points
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import transfer
from transfer import ConfigError, Data, Dataset, DataSpec, UserError, probe, register
from transfer.config.check import load_config
from transfer.experiments.feature_classifiers import LINEAR, MEANS, NEIGHBORS, votes_of
from transfer.experiments.frozen_features import features_of, probing_config
from transfer.experiments.probe import parse_shots
from transfer.training.build import build


class Informative(Dense):
    """Pretrained weights pass the coordinates of a point on."""

    def load_pretrained(self) -> dict[str, Any]:
        with torch.no_grad():
            for stage in self.stages:
                stage[0].weight.copy_(torch.eye(*stage[0].weight.shape))
                stage[0].bias.fill_(1.0)
        return {"weights": "informative"}


class Texts(Informative):
    """A text tower that embeds the names of the two clouds as directions from their middle."""

    def zero_shot(
        self, classes: Sequence[str], templates: Sequence[str] = ("{}",)
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        directions = torch.stack([torch.full((8,), 1.0 if "far" in name else -1.0) for name in classes])
        # The sum of the features is 24 in the middle of the near cloud, and 32 in that of the far one.
        return directions * len(templates), -28 * directions[:, 0]


class Constant(Dense):
    """Pretrained weights discard the point."""

    def load_pretrained(self) -> dict[str, Any]:
        with torch.no_grad():
            for stage in self.stages:
                stage[0].weight.zero_()
                stage[0].bias.fill_(1.0)
        return {"weights": "constant"}


class Named(Points):
    """Points with other names of the classes.

    Args:
        names: Names of the classes.
    """

    def __init__(self, *, names: tuple[str, ...] = ("left", "right")) -> None:
        super().__init__()
        self.names = names

    @property
    def spec(self) -> DataSpec:
        return DataSpec(("point",), "class", self.names)


@pytest.fixture
def configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return configs of an informative and of a constant backbone on the same data."""
    register("backbone", "informative")(Informative)
    register("backbone", "constant")(Constant)
    config["data"] |= {"count": 200, "distance": 2.0, "validation": 0.2}
    return [config | {"backbone": {"name": name}} for name in ("informative", "constant")]


def test_probe_ranks_backbones_and_numbers_of_labels(configs: list[dict[str, Any]]) -> None:
    result = probe(configs, shots=[1, 8, "full"], seeds=2)
    assert result.metric == "accuracy"
    assert [(row.config, row.classifier, row.labels) for row in result.rows[:6]] == [
        (config, classifier, "1 label per class")
        for config in ("run 1", "run 2")
        for classifier in (LINEAR, MEANS, NEIGHBORS)
    ]
    assert [row.shots for row in result.rows[::6]] == [1, 8, "full"]
    few, all_labels = result.rows[6], result.rows[12]
    assert few.examples == (16, 16)
    assert all_labels.examples == (120, 30)
    assert len(few.spread.values) == len(few.chosen) == 2
    assert len(all_labels.spread.values) == 1
    low, high = all_labels.spread.interval or (1.0, 0.0)
    assert low <= all_labels.spread.mean <= high
    assert all_labels.spread.mean > 0.9
    for row in result.rows[-3:]:  # nothing can be learned from constant features
        assert row.spread.mean == 0.5
        assert row.verdict == "worse"
    assert sum(row.verdict == "reference" for row in result.rows) == 3
    assert "best on validation with all 120 labels: run 1" in result.recommendation[0]
    assert result.recommendation[-1].startswith("fewest labels within noise of all 120 labels:")
    assert json.loads(result.json())["rows"][0]["shots"] == 1
    assert "50 test examples and 2 draws" in result.notes[0]


def test_classifiers_agree_with_scikit_learn(configs: list[dict[str, Any]]) -> None:
    (linear, _, neighbors) = probe(configs[:1], shots=["full"]).rows
    built = build(probing_config(configs[0], []), lambda _: None)
    examples = features_of(built, lambda _: None)
    features = {name: one.features.numpy() for name, one in examples.items()}
    targets = {name: one.targets.numpy() for name, one in examples.items()}
    # The penalty is that of features with a root mean square norm of 1 and of both rows of weights.
    mean = features["train"].mean(0)
    scale = np.sqrt(np.square(features["train"] - mean).sum(1).mean())
    (strength,) = linear.chosen
    regression = LogisticRegression(C=2 / (strength * len(targets["train"])), tol=1e-8, max_iter=1000)
    regression.fit((features["train"] - mean) / scale, targets["train"])
    expected = regression.score((features["test"] - mean) / scale, targets["test"])
    assert linear.spread.mean == pytest.approx(expected)
    directions = {
        name: (rows - mean) / np.linalg.norm(rows - mean, axis=1, keepdims=True) for name, rows in features.items()
    }
    voting = KNeighborsClassifier(
        int(neighbors.chosen[0]), weights=lambda distances: np.exp(-np.square(distances) / 2 / 0.07)
    )
    voting.fit(directions["train"], targets["train"])
    assert neighbors.spread.mean == pytest.approx(voting.score(directions["test"], targets["test"]))


def test_votes_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    known, queries = (torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=1) for n in (20, 7))
    targets = torch.eye(2)[torch.arange(20) % 2]
    complete = votes_of(known, targets, queries, [1, 5])
    monkeypatch.setattr("transfer.experiments.frozen_features.MAX_SIMILARITIES", 40)
    for votes, expected in zip(votes_of(known, targets, queries, [1, 5]), complete, strict=True):
        assert torch.allclose(votes, expected)
        assert torch.allclose(votes.sum(1), torch.ones(7))


def test_kept_run_has_the_metric_of_the_probe(configs: list[dict[str, Any]], tmp_path: Path) -> None:
    result = probe(configs, shots=["full"], keep=True, output=tmp_path)
    assert result.folder is not None
    summary = json.loads((result.folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["test"]["accuracy"] == pytest.approx(result.rows[0].spread.mean)
    assert {cache["split"]: cache["cached"] for cache in summary["cache"]}["train"]
    assert transfer.evaluate(result.folder) == summary["test"]
    assert (result.folder / "report.html").is_file()
    assert load_config(result.folder / "config.yaml").backbone.plugin.name == "informative"


def test_numbers_are_probed_by_ridge_regression(configs: list[dict[str, Any]]) -> None:
    overrides = ["data.target=number", "task={name: regression}"]
    result = probe(configs, overrides, shots=[20, "full"], seeds=1)
    assert [row.classifier for row in result.rows[-2:]] == ["ridge regression", NEIGHBORS]
    assert result.rows[0].labels == "20 labels"
    assert not result.higher_is_better
    best = next(row for row in result.rows if row.shots == "full" and row.verdict == "reference")
    assert best.spread.mean < 0.3
    assert best.spread.interval is not None


def test_text_tower_gives_a_row_without_labels(configs: list[dict[str, Any]]) -> None:
    register("backbone", "texts")(Texts)
    result = probe([configs[1], configs[0] | {"backbone": {"name": "texts"}}], shots=["full"])
    first = result.rows[0]
    assert (first.config, first.labels, first.classifier) == ("run 2", "no labels", "zero shot")
    assert result.rows[0].examples == (0, 0)
    assert result.rows[0].spread.mean > 0.8
    assert len(result.rows) == 1 + 2 * 3


def test_zero_shot_head_starts_from_the_names_of_the_classes(configs: list[dict[str, Any]]) -> None:
    register("backbone", "texts")(Texts)
    config = configs[0] | {"head": {"name": "zero_shot", "templates": ["a {}", "the {}"]}}
    built = build(load_config(config, ["backbone={name: texts}"]), lambda _: None)
    linear = built.experiment.model.stages["head"].as_linear()  # type: ignore[operator]
    assert linear.weight[:, 0].tolist() == [-2.0, 2.0]
    assert linear.bias.tolist() == [28.0, -28.0]
    with pytest.raises(ConfigError, match="needs a backbone with a pretrained text tower"):
        build(load_config(config), lambda _: None)
    with pytest.raises(ConfigError, match="templates"):
        load_config(config, ["head.templates=[a photo]"])


def test_untrained_backbone_is_warned_about(configs: list[dict[str, Any]]) -> None:
    result = probe([configs[0] | {"backbone": {"name": "dense"}}], seeds=1)
    assert "loads no pretrained weights" in result.notes[1]
    assert [row.shots for row in result.rows[::3]] == [1, 4, 16, "full"]


class Unsplit(Dataset):
    """Points without a second split."""

    @property
    def spec(self) -> DataSpec:
        return Points().spec

    def load(self) -> Data:
        return Data(self.spec, {"train": Points().load().splits["train"]})


class Rare(Points):
    """Points of which only three belong to the first class."""

    def load(self) -> Data:
        data = super().load()
        train = data.splits["train"]
        rare = np.flatnonzero(train.targets == 0)[3:]
        return Data(self.spec, data.splits | {"train": train.select(np.setdiff1d(np.arange(len(train)), rare))})


class Single(Points):
    """Points of one class."""

    def load(self) -> Data:
        splits = super().load().splits
        return Data(self.spec, {name: split.select(np.flatnonzero(split.targets)) for name, split in splits.items()})


def bad_inputs(configs: list[dict[str, Any]]) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]]:
    """Return configs, arguments of :func:`probe` and the message, by case."""
    register("dataset", "named")(Named)
    register("dataset", "unsplit")(Unsplit)
    register("dataset", "rare")(Rare)
    register("dataset", "single")(Single)
    first = configs[0]

    def data(name: str) -> dict[str, Any]:
        return first | {"data": {"name": name, "validation": 0.2}}

    number = copy.deepcopy(first)
    number["data"]["target"] = "number"
    number["task"] = {"name": "regression", "loss": "absolute"}
    return {
        "no-configs": ([], {}, "nothing to probe"),
        "no-test": ([data("unsplit")], {}, "the data has no test split"),
        "no-validation": ([first], {"overrides": ["data.validation=0"]}, "the data has no validation split"),
        "one-class": ([data("single")], {}, "contains only the class 'far'"),
        "few-examples": ([data("rare")], {"shots": [4]}, r"class 'near' has too few .* expected 4 or more, got 2"),
        "other-classes": ([first, data("named")], {}, "different classes: expected near, far, .* got left, right"),
        "other-examples": (
            [first, first | {"data": first["data"] | {"validation": 0.3}}],
            {},
            "different train examples: 106 instead of the 120",
        ),
        "sequence": ([first | {"backbone": {"name": "steps"}}], {}, "expected a vector to probe"),
        "loss": ([number], {}, "not convex and smooth"),
        "no-seeds": ([first], {"seeds": 0}, "expected 1 or more, got 0"),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("no-configs", "no-test", "no-validation", "one-class", "few-examples", "other-classes", "other-examples"),
        *("sequence", "loss", "no-seeds"),
    ],
)
def test_bad_input_is_refused(configs: list[dict[str, Any]], case: str) -> None:
    sources, arguments, message = bad_inputs(configs)[case]
    with pytest.raises(UserError, match=message):
        probe(sources, **{"shots": ["full"], **arguments})


def test_command_reads_numbers_after_the_option(config_file: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = call("probe", config_file, "--shots", "2", "full", "data.count=80", "--seeds", "1", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert [row["shots"] for row in result["rows"]] == [2] * 3 + ["full"] * 3
    assert result["rows"][-1]["examples"] == [54, 6]
    status, out, err = call("probe", config_file, "--shots", "full")
    assert status == 0, err
    assert "best on validation" in out
    status, _, err = call("probe", config_file, "--shots", "0")
    assert status == 2
    assert "--shots is wrong: expected numbers of 1 or more, or full, got '0'" in err


def test_shots_are_parsed() -> None:
    assert parse_shots(["1,4", "16", "full"]) == [1, 4, 16, "full"]
