"""Small plugins that train in less than a second, registered for one test at a time."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import yaml
from forked_python import ForkedPython
from torch import Tensor, nn

from transfer import Backbone, Data, Dataset, DataSpec, FeatureSpec, Head, Preprocessing, Split
from transfer.registry import entry_points as registry


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Keep file contents out of test ids: an archive contains the time, and workers must collect the same ids."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU on a machine without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU (CUDA)"))


# With more threads, two test processes, or a test and the command that it starts, slow each other down.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

POINT_SIZE = 4


class Points(Dataset):
    """Two clouds of points in four dimensions, one per class, which overlap a little.

    Args:
        count: Number of points; a quarter of them is the test split.
        distance: Distance between the centers of the two clouds.
        target: Whether the target is the cloud of a point or its first coordinate.
    """

    def __init__(
        self, *, count: int = 160, distance: float = 1.0, target: Literal["class", "number"] = "class"
    ) -> None:
        self.count = count
        self.distance = distance
        self.target: Literal["class", "number"] = target

    @property
    def spec(self) -> DataSpec:
        """Field ``point``; classes ``near`` and ``far``, or the number ``first``."""
        return DataSpec(("point",), self.target, ("near", "far") if self.target == "class" else ("first",))

    def load(self) -> Data:
        """Draw the points, always the same ones."""
        generator = np.random.default_rng(0)
        cloud = np.arange(self.count) % 2
        points = generator.normal(size=(self.count, POINT_SIZE)) + self.distance * cloud[:, None]
        targets = cloud if self.target == "class" else points[:, :1].astype(np.float32)
        examples = Split({"point": [row.tolist() for row in points]}, targets)
        test = self.count // 4
        indices = np.arange(self.count)
        return Data(self.spec, {"train": examples.select(indices[test:]), "test": examples.select(indices[:test])})


class PointPreprocessing(Preprocessing):
    """Points as float32 tensors (4,); a raw value may also be a text of four numbers."""

    def encode(self, values: Sequence[Any]) -> list[Tensor]:
        """Encode points; points of another size are refused."""
        for value in values:
            if len(value) != POINT_SIZE:
                raise ValueError(f"a point has {POINT_SIZE} numbers, this one has {len(value)}")
        return [torch.tensor(value, dtype=torch.float32) for value in values]

    def collate(self, encoded: Sequence[Tensor]) -> Tensor:
        """Stack to (B, 4)."""
        return torch.stack(list(encoded))

    def read(self, source: str) -> list[float]:
        """Read ``1,2,3,4``."""
        return [float(number) for number in source.split(",")]

    def read_bytes(self, content: bytes) -> list[float]:
        """Read the same text."""
        return self.read(content.decode())

    def example(self) -> list[float]:
        """Return the origin."""
        return [0.0] * POINT_SIZE

    def describe(self) -> Mapping[str, Any]:
        """Return the size."""
        return {"size": POINT_SIZE}


class Dense(Backbone):
    """Three dense stages with batch norm and dropout, (B, 4) -> (B, width).

    Args:
        width: Number of units of each stage.
        dropout: Fraction of the second stage's units that is zeroed in training.
    """

    field: ClassVar[str] = "point"

    def __init__(self, *, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__(
            {
                "first": nn.Sequential(nn.Linear(POINT_SIZE, width), nn.BatchNorm1d(width), nn.ReLU()),
                "second": nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)),
                "third": nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
            }
        )
        self.width = width

    @property
    def features(self) -> FeatureSpec:
        """A vector of ``width``."""
        return FeatureSpec("vector", self.width)

    @property
    def preprocessing(self) -> Preprocessing:
        """Points as tensors."""
        return PointPreprocessing()


class _Steps(nn.Module):
    """(B, 4) -> a pair of (B, 4, width) and a mask (B, 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, width)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(points.unsqueeze(-1)), torch.ones_like(points, dtype=torch.bool)


class Steps(Backbone):
    """A point as a sequence of its numbers, (B, 4) -> (B, 4, width) and a mask.

    Args:
        width: Number of features of each step.
    """

    field: ClassVar[str] = "point"

    def __init__(self, *, width: int = 3) -> None:
        super().__init__({"steps": _Steps(width)})
        self.width = width

    @property
    def features(self) -> FeatureSpec:
        """A sequence of ``width``."""
        return FeatureSpec("sequence", self.width)

    @property
    def preprocessing(self) -> Preprocessing:
        """Points as tensors."""
        return PointPreprocessing()


class MeanOfSteps(Head):
    """The mean over real steps, then one linear layer."""

    layouts: ClassVar[frozenset[Literal["vector", "sequence"]]] = frozenset({"sequence"})

    def __init__(self, features: FeatureSpec, out_features: int) -> None:
        super().__init__()
        self.output = nn.Linear(features.size, out_features)

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, out_features) of (B, T, D) and a mask (B, T)."""
        steps, mask = features
        weights = mask.unsqueeze(-1).to(steps.dtype)
        return self.output((steps * weights).sum(1) / weights.sum(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep cached features out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRANSFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _registered_anew() -> Iterator[None]:
    """Unregister the plugins of each test after it."""
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that creates a distribution with modules and entry points on the import path."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def distribution(
        name: str, version: str, entries: dict[str, list[str]], *, requires: Sequence[str] = (), **modules: str
    ) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        facts = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        facts += [f"Requires-Dist: {requirement}" for requirement in requires]
        (folder / "METADATA").write_text("\n".join(facts) + "\n", encoding="utf-8")
        lines = [f"[{group}]\n" + "\n".join(lines) for group, lines in entries.items()]
        (folder / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        importlib.invalidate_caches()
        registry._entry_points.cache_clear()

    yield distribution
    registry._entry_points.cache_clear()
    for module in set(sys.modules) - before:
        if getattr(sys.modules[module], "__file__", None) and str(tmp_path) in str(sys.modules[module].__file__):
            del sys.modules[module]


@pytest.fixture(scope="session")
def forked_python() -> Iterator[ForkedPython]:
    """Return a process that forks Python processes."""
    with ForkedPython() as forked:
        yield forked


@pytest.fixture(scope="session")
def python(forked_python: ForkedPython) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs ``python ARGUMENTS`` in a process of its own, see ``ForkedPython.run``."""
    return forked_python.run


@pytest.fixture(scope="session")
def zygote() -> Iterator[Any]:
    """Return a process that has imported this project, too, and forks command lines, see ``kill_harness.Zygote``."""
    from kill_harness import Zygote  # in tests/e2e, which is on the path of its tests only

    with Zygote() as process:
        yield process


@pytest.fixture
def tiny() -> None:
    """Register the plugins of this file: ``points``, ``dense``, ``steps`` and ``mean_of_steps``."""
    registry.register("dataset", "points")(Points)
    registry.register("backbone", "dense")(Dense)
    registry.register("backbone", "steps")(Steps)
    registry.register("head", "mean_of_steps")(MeanOfSteps)


@pytest.fixture
def config(tiny: None) -> dict[str, Any]:
    """Return the config of a run of at most a second."""
    return {
        "seed": 3,
        "data": {"name": "points"},
        "backbone": {"name": "dense"},
        "head": {"name": "linear"},
        "task": {"name": "classification"},
        "train": {
            "batch_size": 16,
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
            "phases": [{"epochs": 2}],
        },
    }


@pytest.fixture
def config_file(config: dict[str, Any], tmp_path: Path) -> Path:
    """Write that config as ``tiny.yaml``."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command line in this process: exit status, output, errors."""
    from transfer.cli.app import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("TRANSFER_DEBUG", raising=False)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transfer", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run
