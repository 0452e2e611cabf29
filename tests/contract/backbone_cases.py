"""Every contract of the built-in plugins, with options that make them small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

import transfer
from transfer.testing import Case, contracts

IMAGES = {"weights": None, "image_size": 32, "resize": 36}
SMALL_IMAGE_PART = {"name": "torchvision", "model": "shufflenet_v2_x0_5", **IMAGES}
WORDS = {"kernel_sizes": [1, 3], "filters": 4}
OPTIONS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    **{f"resnet{depth}": [IMAGES] for depth in (18, 34, 50, 101, 152)},
    "torchvision": [
        {"model": "shufflenet_v2_x0_5", **IMAGES},
        {"model": "squeezenet1_1", "in_channels": 1, **IMAGES},
        {"model": "swin_t", "readout": "sequence", **IMAGES},
    ],
    "textcnn": [
        {"variant": "rand", "dimensions": 6, **WORDS},
        *({"variant": variant, "vectors": "mini", **WORDS} for variant in ("static", "nonstatic", "multichannel")),
        {"variant": "multichannel", "vectors": "mini", "vectors_vocabulary": True, **WORDS},
    ],
    "bilstm": [
        {"variant": "static", "vectors": "mini", "hidden_size": 5, "layers": 1},
        {"variant": "nonstatic", "vectors": "mini", "hidden_size": 5, "readout": "sequence"},
        *(
            {"variant": "rand", "dimensions": 6, "hidden_size": 5, "readout": readout}
            for readout in ("first_last", "last_states", "max", "mean", "sequence")
        ),
    ],
    "fusion": [
        {"parts": {"image": SMALL_IMAGE_PART, "text": {"name": "textcnn", "variant": "rand", **WORDS}}},
        {
            "parts": {
                "text": {"name": "bilstm", "variant": "rand", "hidden_size": 5},
                "image": SMALL_IMAGE_PART,
            },
            "join": "gate",
            "size": 7,
        },
    ],
}
"""A backbone that is not listed is tried with its defaults."""
OTHER_DEPTHS = {"resnet34", "resnet50", "resnet101", "resnet152"}
"""Deeper variants of ResNet-18: all their contracts are slow tests."""
SLOW = OTHER_DEPTHS | {"swin_t"}
"""Large, or of the same build as another one that is trained every time."""

TABLE = transfer.table({"text": [f"a {word} film" for word in ("good", "bad") * 6], "label": ["pos", "neg"] * 6})
DATASETS: Mapping[str, Mapping[str, Any]] = {
    "image_folder": {"root": "images"},
    "image_csv": {"train": "images.csv", "test_fraction": 0.25},
    "multimodal_csv": {"train": "images.csv", "image": "path", "test_fraction": 0.25},
    "torchvision_dataset": {"dataset": "cifar10"},
    "text_folder": {"root": "texts"},
    "shapes": {"per_class": 4},
    "in_memory": {name: value for name, value in TABLE.block.items() if name != "name"},
    "text_csv": {"train": "reviews.csv"},
    "huggingface": {"dataset": "reviews.csv", "text": "text", "label": "label"},
}
"""Small ones, over the files that ``test_contracts.py`` makes."""

CONTRACTS = contracts("transferkit", OPTIONS | DATASETS)
BACKBONES = list(dict.fromkeys(contract.case for contract in CONTRACTS if contract.case.kind == "backbone"))


def name_of(case: Case) -> str:
    return str(case.options.get("model", case.name.removeprefix("transferkit:")))


def trained() -> list[Any]:
    """Return the backbones as parameters of a test that trains them, the costly ones marked."""
    marks = {case: [pytest.mark.slow] if name_of(case) in SLOW else [] for case in BACKBONES}
    return [pytest.param(case, id=str(case), marks=marks[case]) for case in BACKBONES]
