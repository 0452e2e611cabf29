"""What pretraining is worth."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Dense

from transfer import DataSpec, Task, UserError, pretraining_gain, register, resume_pretraining_gain
from transfer.builtin.tasks import Classification, Regression
from transfer.config.check import load_config
from transfer.experiments import pretraining_gain as value
from transfer.experiments.comparison import Row, verdict
from transfer.experiments.intervals import Difference, spread
from transfer.runs import train as workflow


class Given(Dense):
    """Its pretrained weights pass the coordinates on, which the two clouds differ in, or nothing at all.

    Args:
        good: Which of the two.
    """

    def __init__(self, *, good: bool = True, dropout: float = 0.0) -> None:
        super().__init__(width=8, dropout=dropout)
        self.good = good

    def load_pretrained(self) -> dict[str, Any]:
        """Set every dense layer."""
        with torch.no_grad():
            for stage in self.stages:
                dense = stage[0]
                dense.weight.copy_(torch.eye(*dense.weight.shape) if self.good else torch.zeros_like(dense.weight))
                dense.bias.fill_(1.0 if self.good else 0.0)
        return {"weights": "good" if self.good else "bad"}


@pytest.fixture
def given(config: dict[str, Any]) -> dict[str, Any]:
    register("backbone", "given")(Given)
    config = copy.deepcopy(config)
    config["data"] |= {"distance": 2.0}
    config["backbone"] = {"name": "given"}
    config["train"]["phases"] = [{"epochs": 1}]
    return config


def test_all_arms_on_the_same_splits(given: dict[str, Any], tmp_path: Path) -> None:
    notes: list[str] = []
    found = pretraining_gain(given, seeds=2, output=tmp_path, observe=lambda event: notes.append(str(event)))
    result = json.loads((found.folder / "value.json").read_text(encoding="utf-8"))
    assert result == found.summary
    assert result["status"] == "complete"
    arms = ["random_features", "linear_probe", "from_scratch", "fine_tuned"]
    assert list(result["arms"]) == ["majority_class", *arms]
    # Test holds as many of the one class as of the other.
    assert result["arms"]["majority_class"]["test"]["accuracy"]["mean"] == 0.5
    digests = set()
    for arm in arms:
        for seed in (3, 4):
            run = json.loads((found.folder / arm / f"seed-{seed}" / "summary.json").read_text(encoding="utf-8"))
            digests.add(json.dumps(run["digests"]))
            assert run["epochs"] == 1
            assert bool(run["pretrained"]) == (arm in ("linear_probe", "fine_tuned"))
            trained = run["parameters"]["trainable"]
            assert (trained == 18) == (arm in ("random_features", "linear_probe"))
    assert len(digests) == 1
    assert resume_pretraining_gain(found.folder).summary == result


def test_the_frozen_arms_share_their_features(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    pretraining_gain(given, seeds=3, output=tmp_path / "runs")
    # Three splits of the pretrained network once for all seeds, and of each random one.
    assert len(list((tmp_path / "cache").glob("*/entry.json"))) == 3 + 3 * 3


CLASSIFICATION = Classification(DataSpec(("point",), "class", ("near", "far")))
REGRESSION = Regression(DataSpec(("point",), "number", ("first",)))


@pytest.mark.parametrize(
    ("task", "difference", "says"),
    [
        (
            CLASSIFICATION,
            Difference(0.081, (0.03, 0.13)),
            "Pretraining is worth 8.1 points of accuracy over training from scratch (95 % interval 3.0 to 13.0).",
        ),
        (
            CLASSIFICATION,
            Difference(-0.081, (-0.13, -0.03)),
            "Negative transfer: fine-tuning gives -8.1 points of accuracy over training from scratch "
            "(95 % interval -13.0 to -3.0).",
        ),
        (
            CLASSIFICATION,
            Difference(0.01, (-0.02, 0.04)),
            "The effect of pretraining is within noise: fine-tuning gives +1.0 points of accuracy "
            "over training from scratch (95 % interval -2.0 to +4.0).",
        ),
        (
            REGRESSION,  # an error: less is better
            Difference(-0.5, (-0.75, -0.25)),
            "Pretraining is worth 0.5000 of mean absolute error over training from scratch "
            "(95 % interval 0.2500 to 0.7500).",
        ),
    ],
)
def test_it_says_what_pretraining_is_worth(task: Task, difference: Difference, says: str) -> None:
    judged = verdict(difference, higher_is_better=task.primary_metric.higher_is_better)
    assert value._tuned_sentence(Row("fine_tuned", spread([0.8, 0.9]), difference, judged), task) == says


def test_features_that_say_nothing_are_negative_transfer(given: dict[str, Any], tmp_path: Path) -> None:
    overrides = ["backbone.good=false", "data.distance=3.0", "train.optimizer.lr=0.2", "train.phases=[{epochs: 3}]"]
    found = pretraining_gain(given, overrides, seeds=3, output=tmp_path).summary
    assert found["linear_probe_to_random_features"]["verdict"] == "worse"
    assert found["negative_transfer"] is True
    assert "Negative transfer: frozen under a linear head" in found["sentence"]


def test_without_anything_pretrained_there_is_nothing_to_value(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loads no pretrained weights"):
        pretraining_gain(config, seeds=2, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_it_goes_on_where_it_was_stopped(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, calls = workflow.fit, []

    def stop_at_the_fourth(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(workflow, "fit", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        pretraining_gain(given, seeds=2, output=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "value.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    assert resume_pretraining_gain(folder).summary["status"] == "complete"
    assert len(calls) == 4 + 5


def test_numbers_are_compared_to_the_median(given: dict[str, Any], tmp_path: Path) -> None:
    overrides = ["data.target=number", "task={name: regression}"]
    found = pretraining_gain(given, overrides, seeds=2, output=tmp_path).summary
    assert found["higher_is_better"] is False
    assert 0.5 < found["arms"]["constant"]["test"]["mean_absolute_error"]["mean"] < 1.5


def test_from_scratch_texts_have_tuned_random_vectors() -> None:
    text = {
        "data": {"name": "mini_reviews"},
        "backbone": {"name": "textcnn", "variant": "multichannel", "vectors": "mini"},
        "train": {"recipe": {"name": "scratch", "epochs": 1}},
    }
    checked = load_config(text)
    block = checked.resolved["backbone"]
    assert (block["variant"], block["vectors"]) == ("rand", None)
    assert block["dimensions"] == checked.backbone.options["dimensions"] > 0
    again = load_config(checked.resolved)
    assert again.resolved == checked.resolved
