"""A custom task in a script: the multi-class hinge loss instead of cross-entropy. Run: python custom_task.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy

import transfer


@transfer.register("task", "hinge")
class Hinge(transfer.Task):
    """Multi-class hinge loss (Crammer and Singer 2001).

    Args:
        margin: Required difference between the score of the true class and every other score.
    """

    targets = frozenset({"class"})
    primary_metric = transfer.PrimaryMetric("accuracy", higher_is_better=True)

    def __init__(self, data: transfer.DataSpec, *, margin: float = 1.0) -> None:
        self.classes, self.margin = data.classes, margin
        self.out_features = len(data.classes)

    def loss(self, outputs, targets):
        return F.multi_margin_loss(outputs, targets, margin=self.margin, reduction="none")

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(self.out_features, average="micro")}

    def interpret(self, outputs: torch.Tensor):
        return [{"label": self.classes[int(row.argmax())], "scores": row.tolist()} for row in outputs]


if __name__ == "__main__":
    run = transfer.run("configs/quickstart_text.yaml", ["task={name: hinge, margin: 0.5}"])
    print(run.summary["test"], list(transfer.predict(run.folder, ["a film I would gladly watch again"])), run.folder)
