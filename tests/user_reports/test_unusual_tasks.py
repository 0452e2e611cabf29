"""Tasks and inputs that differ from classes with one output each and from images and texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Dense, PointPreprocessing
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MultilabelF1Score

import transfer
from transfer import DataSpec, MeanOf, Occlusion, PrimaryMetric, Task
from transfer.builtin.tasks import Classification, MultiLabel
from transfer.data.targets import describe
from transfer.registry import entry_points as registry

PNG = b"\x89PNG\r\n\x1a\n rendered"


class WithThumbnail(PointPreprocessing):
    """Points that are drawn, and explained by numbers that are covered."""

    def thumbnail(self, value: Any) -> bytes:
        """Return the same image for all points but those with a large first coordinate."""
        if value[0] > 1.5:
            raise ValueError("this point cannot be rendered")
        return PNG

    def occlusions(self, value: Any) -> Iterator[Occlusion]:
        """Yield each coordinate by its index."""
        for index in range(len(value)):
            yield Occlusion([index, index + 1], [0.0 if i == index else x for i, x in enumerate(value)])


class Drawn(Dense):
    """The backbone with this preprocessing."""

    @property
    def preprocessing(self) -> WithThumbnail:
        """Points that are drawn."""
        return WithThumbnail()


class OpenSet(Classification):
    """Classification with one more output for inputs of no class."""

    def __init__(self, data: DataSpec) -> None:
        super().__init__(data)
        self.out_features = len(data.classes) + 1

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the additional output for half of the examples."""
        return torch.where(outputs[:, 0] > 0, outputs.argmax(1), len(self.classes))

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Return the index of the output."""
        return [{"output": int(index)} for index in self.predictions(outputs)]


class Interval(Task):
    """The lower and the upper bound of each number."""

    targets = frozenset({"number"})
    primary_metric = PrimaryMetric("width", higher_is_better=False)

    def __init__(self, data: DataSpec) -> None:
        self.out_features = 2 * len(data.classes)

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return bounds (B, C, 2)."""
        return outputs.view(len(outputs), -1, 2)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean distance of both bounds."""
        return (self.predictions(outputs) - targets.unsqueeze(2)).abs().mean((1, 2))

    def metrics(self) -> Mapping[str, Any]:
        """Return the mean width."""
        return {"width": MeanOf(lambda predictions, _: (predictions[..., 1] - predictions[..., 0]).abs())}

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Return the bounds."""
        return [{"bounds": row} for row in outputs.tolist()]


class Ranked(Classification):
    """Classification with a metric of the probabilities."""

    primary_metric = PrimaryMetric("auroc", higher_is_better=True)

    def metrics(self) -> Mapping[str, Any]:
        """Return a metric of the classes and one of the probabilities."""
        return {"accuracy": MulticlassAccuracy(2, average="micro"), "auroc": MulticlassAUROC(2, thresholds=20)}

    def metric_inputs(self, outputs: Tensor) -> Mapping[str, Tensor]:
        """Return the probabilities."""
        return {"auroc": outputs.softmax(1)}


def run(config: dict[str, Any], output: Path, name: str, task: type[Task], **data: Any) -> transfer.Run:
    registry.register("task", name)(task)
    config["data"] |= data
    return transfer.run(config | {"task": {"name": name}}, output=output)


def test_report_of_thumbnails_with_explanations(config: dict[str, Any], tmp_path: Path) -> None:
    registry.register("backbone", "drawn")(Drawn)
    done = transfer.run(config | {"backbone": {"name": "drawn"}}, ["train.report=false"], output=tmp_path)
    page = transfer.report(done.folder).read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "Pieces that speak" in page
    assert "one word" not in page
    assert "[0, 1]" in page  # a piece in the list of the largest changes


def test_report_with_more_outputs_than_classes(config: dict[str, Any], tmp_path: Path) -> None:
    done = run(config, tmp_path, "open_set", OpenSet)
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert "output 2" in page


def test_report_with_several_outputs_per_number(config: dict[str, Any], tmp_path: Path) -> None:
    done = run(config, tmp_path, "interval", Interval, target="number")
    assert (done.folder / "report.html").exists()


def test_metric_takes_its_own_input(config: dict[str, Any], tmp_path: Path) -> None:
    config["train"]["report"] = False
    done = run(config, tmp_path, "ranked", Ranked, distance=1.0)
    assert done.summary["test"]["auroc"] > done.summary["test"]["accuracy"]
    assert transfer.evaluate(done.folder) == done.summary["test"]
    assert transfer.compare([done.folder, done.folder], metric="auroc").rows[1].verdict in (
        "cannot tell",
        "within noise",
    )


def test_description_of_targets_of_another_shape() -> None:
    classes, numbers = DataSpec(("x",), "class", ("no", "yes")), DataSpec(("x",), "number", ("price",))
    assert [describe(classes, index) for index in (0, 2, -1)] == ["no", "output 2", "output -1"]
    assert describe(numbers, torch.tensor([[1.0, 2.5]])) == "1, 2.5"
    assert describe(numbers, torch.tensor([1.0])) == "price 1"


def test_macro_f1_ignores_labels_without_examples_and_predictions() -> None:
    # The last label is absent and never predicted; the third is absent, and predicted once.
    outputs = torch.tensor([[5.0, -5, -5, -5], [5.0, 5, 5, -5], [-5.0, 5, -5, -5]])
    targets = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]])
    task = MultiLabel(DataSpec(("x",), "labels", ("a", "b", "c", "d")))
    metric = task.metrics()["f1_macro"]
    metric.update(outputs.sigmoid(), targets)
    assert float(metric.compute()) == pytest.approx(2 / 3)
    oracle = MultilabelF1Score(4, average="none")
    oracle.update(outputs.sigmoid(), targets)
    assert oracle.compute().tolist() == [1, 1, 0, 0]
    metric.reset()
    metric.update(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.long))
    assert float(metric.compute()) == 0.0


def test_single_predicted_class_is_reported(config: dict[str, Any], tmp_path: Path) -> None:
    # Without training, one class is more probable for all points near the origin.
    config["train"] |= {"optimizer": {"name": "sgd", "lr": 1e-9}, "report": False}
    config["head"] = {"name": "biased"}
    registry.register("head", "biased")(Biased)
    done = transfer.run(config, output=tmp_path)
    (warning,) = (text for text in done.summary["warnings"] if "only the class" in text)
    assert warning.startswith("the model predicts only the class 'near' on the test split")


class Biased(transfer.Head):
    """A linear layer with a large bias of the first output."""

    def __init__(self, features: transfer.FeatureSpec, out_features: int) -> None:
        super().__init__()
        self.output = torch.nn.Linear(features.size, out_features)
        with torch.no_grad():
            self.output.bias[0] = 100.0

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, out_features)."""
        return self.output(features)  # type: ignore[no-any-return]
