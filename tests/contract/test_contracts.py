"""Every contract of every built-in plugin, and of the shipped configs: the kit that a third party uses."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
from backbone_cases import CONTRACTS, OTHER_DEPTHS, SLOW, name_of
from PIL import Image

from transfer.registry import entry_points as registry
from transfer.testing import Contract
from transfer.testing.cases import TEXTS

PUBLISHED = {
    "imdb": "aclImdb",
    "hymenoptera": "hymenoptera_data",
    "hotdog": "hotdog",
    "torchvision_dataset": "cifar-10-batches-py",
}
"""Datasets that are read where they are, and are not downloaded by a test."""


def marks(contract: Contract) -> list[Any]:
    name = name_of(contract.case)
    found: list[Any] = []
    if name in OTHER_DEPTHS or (contract.cost == "training" and name in SLOW):
        found.append(pytest.mark.slow)
    if contract.cost == "data" and name in PUBLISHED:
        here = any(Path(os.environ.get("TRANSFER_DATA", "nowhere")).glob(f"{PUBLISHED[name]}*"))
        found += [pytest.mark.data, pytest.mark.skipif(not here, reason=f"TRANSFER_DATA lacks {name}")]
    if contract.cost == "data" and name == "imdb":
        found.append(pytest.mark.slow)
    return found


@pytest.fixture(scope="module", autouse=True)
def _files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make the small files that ``DATASETS`` names, and work beside them."""
    folder = tmp_path_factory.mktemp("files")
    rows = [(f"{text} {number}", label) for label in ("bad", "good") for number, text in enumerate(TEXTS * 2)]
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    with (folder / "images.csv").open("w", encoding="utf-8", newline="") as file:
        paths = [(f"images/{label}/{number}.png", text, label) for number, (text, label) in enumerate(rows)]
        csv.writer(file).writerows([("path", "text", "label"), *paths])
    for number, (text, label) in enumerate(rows):
        for kind in ("texts", "images"):
            (folder / kind / label).mkdir(parents=True, exist_ok=True)
        (folder / "texts" / label / f"{number}.txt").write_text(text, encoding="utf-8")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / label / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.mark.parametrize("contract", [pytest.param(c, id=str(c), marks=marks(c)) for c in CONTRACTS])
def test_contract(contract: Contract) -> None:
    contract.check()


def test_every_built_in_plugin_is_here() -> None:
    tested = {(c.case.kind, c.case.name) for c in CONTRACTS}
    installed = [p for p in registry.plugins() if p.distribution == "transferkit" and not (p.extras and p.unavailable)]
    assert tested == {(p.kind, p.qualified_name) for p in installed}
    assert len(tested) >= 22
    assert len(CONTRACTS) > 250
