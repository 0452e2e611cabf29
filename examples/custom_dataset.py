"""A custom dataset in a script: questions and statements. Run: python custom_dataset.py."""

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
    """Short questions and statements that differ only in the order of words.

    Args:
        test: Fraction of the sentences in the test split.
    """

    def __init__(self, *, test: Annotated[float, Field(gt=0, lt=1)] = 0.25) -> None:
        self.test = test  # the constructor reads no data, so that a config can be checked without it

    @property
    def spec(self) -> transfer.DataSpec:
        """One field and two classes. A dataset that reads its classes from the data leaves them out here."""
        return transfer.DataSpec(("text",), "class", CLASSES)

    def load(self) -> transfer.Data:
        """Return the splits. A column can also be a sequence that reads each value on access."""
        pairs = list(itertools.product(SUBJECTS, PREDICATES))
        texts = [f"is {subject} {predicate}" for subject, predicate in pairs]
        texts += [f"{subject} is {predicate}" for subject, predicate in pairs]
        targets = np.repeat(np.arange(2), len(pairs))  # int64 for the kind "class"; float for "labels" and "number"
        order = np.random.default_rng(0).permutation(len(texts))
        sentences = transfer.Split({"text": texts}, targets)
        test, train = np.split(order, [round(self.test * len(texts))])
        # The framework splits off a validation split from train if there is none.
        return transfer.Data(self.spec, {"train": sentences.select(train), "test": sentences.select(test)})


if __name__ == "__main__":
    backbone = "backbone={name: textcnn, variant: nonstatic, vectors: mini}"
    run = transfer.run("configs/quickstart_text.yaml", ["data={name: sentences}", backbone])
    print(run.summary["test"], list(transfer.predict(run.folder, ["is dinner gone"])), run.folder)
