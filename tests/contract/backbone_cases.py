"""Every registered backbone with options that make it small, and raw values of its field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MeanOfSteps
from PIL import Image

from transfer import Backbone, FeatureSpec, Head, registry
from transfer.heads import Linear

PICTURES = {"weights": None, "image_size": 32, "resize": 36}
WORDS = {"kernel_sizes": [1, 3], "filters": 4}
OPTIONS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    **{f"resnet{depth}": [PICTURES] for depth in (18, 34, 50, 101, 152)},
    "textcnn": [
        {"variant": "rand", "dimensions": 6, **WORDS},
        *({"variant": variant, "vectors": "mini", **WORDS} for variant in ("static", "nonstatic", "multichannel")),
    ],
    "bilstm": [
        {"variant": "rand", "dimensions": 6, "hidden_size": 5},
        {"variant": "static", "vectors": "mini", "hidden_size": 5, "layers": 1},
        {"variant": "nonstatic", "vectors": "mini", "hidden_size": 5, "readout": "sequence"},
    ],
}
"""A backbone that is not listed is tried with its defaults."""
SLOW = {"resnet34", "resnet101", "resnet152"}
"""Of the same build as another one that is trained every time."""
TEXTS = (
    "a warm , funny film that i would gladly watch again",
    "two hours of my life",
    "dull",
    "not a good film , but a warm one all the same",
)


@dataclass(frozen=True)
class Case:
    """A backbone and its options."""

    name: str
    index: int

    @property
    def cls(self) -> type[Backbone]:
        return registry.load("backbone", self.name)

    @property
    def options(self) -> dict[str, Any]:
        found = OPTIONS.get(self.name, [{}])[self.index]
        return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}

    @property
    def values(self) -> Sequence[Any]:
        """Four raw values of the backbone's field, which differ."""
        if self.cls.field == "text":
            return TEXTS
        assert self.cls.field == "image", f"say here what the values of a field {self.cls.field!r} look like"
        generator = np.random.default_rng(0)
        return [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(4)]

    def make(self) -> Backbone:
        """Build it with random weights, the same ones every time."""
        torch.manual_seed(0)
        return self.cls.from_data(self.values, **self.options)

    def inputs(self, backbone: Backbone) -> Any:
        """Return a batch of the four values."""
        preprocessing = backbone.preprocessing
        return preprocessing.collate(preprocessing.encode(self.values))


def head(features: FeatureSpec) -> Head:
    """Return a head with three outputs for any layout."""
    return Linear(features, 3, dropout=0.1) if features.layout == "vector" else MeanOfSteps(features, 3)


def cases(*, training: bool = False) -> list[Any]:
    """Return every registered backbone as parameters of a test, the costly ones marked where they are to be trained."""
    found = []
    for plugin in registry.plugins("backbone"):
        for index, options in enumerate(OPTIONS.get(plugin.name, [{}])):
            marks = [pytest.mark.slow] if training and plugin.name in SLOW else []
            name = "-".join(filter(None, (plugin.name, options.get("variant"))))
            found.append(pytest.param(Case(plugin.name, index), id=name, marks=marks))
    return found
