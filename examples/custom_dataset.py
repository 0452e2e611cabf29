"""A dataset of one's own in a script: questions and statements. Run: python custom_dataset.py."""

from __future__ import annotations

import itertools
from typing import Annotated

import numpy as np
from pydantic import Field

import transfer

SUBJECTS = ("the train", "your sister", "the film", "this road", "the price", "dinner", "the last bus", "it")
PREDICATES = ("on time", "in town", "worth it", "too long", "right", "ready", "gone", "far away")
CLASSES = ("question", "statement")


@transfer.register("dataset", "sentences")
class Sentences(transfer.Dataset):
    """Short questions and statements; the same words in another order.

    Args:
        test: Share of the sentences that becomes the test split.
    """

    def __init__(self, *, test: Annotated[float, Field(gt=0, lt=1)] = 0.25) -> None:
        self.test = test  # a constructor reads nothing: a config is checked where the data is not

    @property
    def spec(self) -> transfer.DataSpec:
        """One field, two classes; classes that only the data tells are left out here."""
        return transfer.DataSpec(("text",), "class", CLASSES)

    def load(self) -> transfer.Data:
        """Read everything; a column may also be a sequence that reads a value when it is asked for."""
        pairs = list(itertools.product(SUBJECTS, PREDICATES))
        texts = [f"is {subject} {predicate}" for subject, predicate in pairs]
        texts += [f"{subject} is {predicate}" for subject, predicate in pairs]
        targets = np.repeat(np.arange(2), len(pairs))  # int64; floats for the kinds "labels" and "number"
        order = np.random.default_rng(0).permutation(len(texts))
        whole = transfer.Split({"text": texts}, targets)
        test, train = np.split(order, [round(self.test * len(texts))])
        # Without a validation split one is cut from train.
        return transfer.Data(self.spec, {"train": whole.select(train), "test": whole.select(test)})


if __name__ == "__main__":
    backbone = "backbone={name: textcnn, variant: nonstatic, vectors: mini}"
    run = transfer.run("configs/quickstart_text.yaml", ["data={name: sentences}", backbone])
    print(run.summary["test"], list(transfer.predict(run.folder, ["is dinner gone"])), run.folder)
