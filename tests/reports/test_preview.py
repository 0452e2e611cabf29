"""Previews: the examples shown, their captions, and the files written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Dense, PointPreprocessing

import transfer
from transfer import DataSpec, RunError, UserError
from transfer.builtin.tasks import Classification
from transfer.data.targets import describe
from transfer.registry import entry_points as registry
from transfer.reports.preview import Preview


class JSONPreprocessing(PointPreprocessing):
    """Renders a batch as JSON."""

    def augment(self, encoded: torch.Tensor) -> torch.Tensor:
        return encoded + 100

    def render_batch(
        self, inputs: Any, values: Sequence[Any], captions: Sequence[str], groups: Mapping[str, Sequence[int]]
    ) -> str:
        plain = {name: list(indices) for name, indices in groups.items()}
        return json.dumps({"inputs": inputs.tolist(), "values": list(values), "captions": captions, "groups": plain})


class Rendering(Dense):
    """The tiny backbone with a preprocessing that renders batches."""

    @property
    def preprocessing(self) -> JSONPreprocessing:
        return JSONPreprocessing()


@pytest.fixture
def rendering(config: dict[str, Any]) -> dict[str, Any]:
    registry.register("backbone", "rendering")(Rendering)
    return config | {"backbone": {"name": "rendering"}}


def content(preview: Preview) -> dict[str, Any]:
    assert isinstance(preview.content, str)
    return dict(json.loads(preview.content))


def test_preview_batch_is_augmented_and_labeled(rendering: dict[str, Any]) -> None:
    seen = content(transfer.preview_batch(rendering))
    assert len(seen["captions"]) == 16
    assert set(seen["captions"]) == {"near", "far"}
    assert list(seen["groups"].values()) == [list(range(16))]
    np.testing.assert_allclose(seen["inputs"], np.array(seen["values"]) + 100, rtol=1e-5)
    assert seen == content(transfer.preview_batch(rendering))
    assert seen != content(transfer.preview_batch(rendering, ["seed=4"]))


def test_preview_batch_captions_state_mixup_weights(rendering: dict[str, Any]) -> None:
    rendering["train"]["mix"] = {"mixup": 0.5}
    seen = content(transfer.preview_batch(rendering))
    weights = [float(line.split()[0]) for line in seen["captions"][0].split("\n")]
    assert sum(weights) == pytest.approx(1, abs=0.011)
    assert seen["inputs"] != content(transfer.preview_batch(rendering, ["train.mix=null"]))["inputs"]


def test_preview_batch_is_limited_to_64_examples(rendering: dict[str, Any]) -> None:
    seen = content(transfer.preview_batch(rendering, ["train.batch_size=100"]))
    assert len(seen["captions"]) == len(seen["inputs"]) == 64
    assert list(seen["groups"]) == ["run: the first training batch, 100 examples (the first 64)"]


def test_preview_batch_refuses_unrenderable_field(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="backbone Dense cannot render point") as caught:
        transfer.preview_batch(config)
    assert caught.value.problems[0].fix == "define render_batch() in PointPreprocessing"


def test_text_preview_is_written_only_to_given_path(rendering: dict[str, Any], tmp_path: Path) -> None:
    assert transfer.preview_batch(rendering).path is None
    seen = transfer.preview_batch(rendering, output=tmp_path / "deep" / "batch.txt")
    assert (tmp_path / "deep" / "batch.txt").read_text(encoding="utf-8") == seen.content
    with pytest.raises(
        UserError, match=r"the path does not fit the preview: expected a name for a text, got 'batch\.png'"
    ):
        transfer.preview_batch(rendering, output=tmp_path / "batch.png")


def test_preview_predictions_groups_correct_wrong_and_uncertain(rendering: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(rendering, output=tmp_path)
    preview = transfer.preview_predictions(run.folder)
    assert preview.path == run.folder / "plots" / "predictions.txt"
    seen = content(preview)
    correct, wrong, least = seen["groups"].items()
    count = round(run.summary["test"]["accuracy"] * 40)
    assert correct[0] == f"correct: {count} of 40, the most confident first"
    assert wrong[0] == f"wrong: {40 - count} of 40, the most confident first"

    def parsed(indices: list[int]) -> list[list[str]]:
        return [[line.split(": ")[1] for line in seen["captions"][index].split("\n")] for index in indices]

    assert all(true == label for true, label, _ in parsed(correct[1]))
    assert all(true != label for true, label, _ in parsed(wrong[1]))
    confidences = [float(probability) for _, _, probability in parsed(least[1])]
    assert confidences == sorted(confidences)
    assert confidences[0] == min(float(p) for _, _, p in parsed(range(len(seen["captions"]))))  # type: ignore[arg-type]
    # The rendered points are those that were predicted: not augmented.
    assert np.allclose(seen["inputs"], seen["values"])
    answers = list(transfer.predict(run.folder, [",".join(map(str, value)) for value in seen["values"]]))
    assert [answer["label"] for answer in answers] == [label for _, label, _ in parsed(range(len(answers)))]  # type: ignore[arg-type]


def test_preview_predictions_groups_numbers_by_loss(rendering: dict[str, Any], tmp_path: Path) -> None:
    rendering |= {"data": {"name": "points", "target": "number"}, "task": {"name": "regression"}}
    seen = content(transfer.preview_predictions(transfer.run(rendering, output=tmp_path).folder))
    assert list(seen["groups"]) == ["smallest loss", "largest loss"]
    assert seen["captions"][0].startswith("true: first ")
    errors = [abs(float(t.split()[-1]) - float(s.split()[-1])) for t, s in (c.split("\n") for c in seen["captions"])]
    assert max(errors[:8]) < min(errors[8:])


def test_preview_predictions_refuses_an_unknown_split(rendering: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the data has no split 'dev'"):
        transfer.preview_predictions(transfer.run(rendering, output=tmp_path).folder, "dev")


@pytest.mark.parametrize(
    ("data", "target", "words"),
    [
        (DataSpec(("text",), "class", ("ants", "bees")), 1, "bees"),
        (DataSpec(("text",), "labels", ("red", "green", "blue")), [1.0, 0.0, 1.0], "red and blue"),
        (DataSpec(("text",), "labels", ("red", "green")), [0.0, 0.0], "none"),
        (DataSpec(("text",), "number", ("width", "height")), [1.5, 2.0], "width 1.5, height 2"),
    ],
)
def test_describe_formats_targets(data: DataSpec, target: Any, words: str) -> None:
    assert describe(data, target) == words


def test_preview_predictions_without_probabilities_has_no_uncertain_group(
    rendering: dict[str, Any], tmp_path: Path
) -> None:
    class Plain(Classification):
        """Returns only the class."""

        def interpret(self, outputs: torch.Tensor) -> list[dict[str, Any]]:
            return [{"label": row["label"]} for row in super().interpret(outputs)]

    registry.register("task", "plain")(Plain)
    run = transfer.run(rendering | {"task": {"name": "plain"}}, output=tmp_path)
    seen = content(transfer.preview_predictions(run.folder))
    assert [heading.split(":")[0] for heading in seen["groups"]] == ["correct", "wrong"]
    assert all(len(caption.split("\n")) == 2 for caption in seen["captions"])
