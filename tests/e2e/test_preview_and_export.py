"""The commands preview, evaluate --images and export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import transfer
from transfer.cli import app as cli

CONFIG = {
    "data": {"name": "shapes", "per_class": 8, "image_size": 32},
    "backbone": {"name": "resnet18", "weights": None, "image_size": 32, "resize": 32},
    "head": {"name": "linear"},
    "task": {"name": "classification"},
    "train": {"batch_size": 12, "phases": [{"epochs": 1, "freeze": "backbone"}]},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transfer.run(CONFIG, output=tmp_path_factory.mktemp("runs")).folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Return a function that runs the command line in a folder of its own: status, output, errors."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transfer", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_preview_writes_the_same_image_every_time(call: Any, tmp_path: Path) -> None:
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    status, out, err = call("preview", "shapes.yaml")
    assert (status, out.splitlines()[-1]) == (0, "shapes-batch.png"), err
    first = (tmp_path / "shapes-batch.png").read_bytes()
    with Image.open(tmp_path / "shapes-batch.png") as image:
        assert image.size == (6 + 8 * (128 + 6), 6 + 22 + 2 * (128 + 15 + 6))  # twelve cells of four times 32 pixels
    call("preview", "shapes.yaml", "--output", "again.png")
    assert (tmp_path / "again.png").read_bytes() == first
    call("preview", "shapes.yaml", "seed=1", "--output", "other.png")
    assert (tmp_path / "other.png").read_bytes() != first


def test_evaluate_draws_predictions(call: Any, run: Path) -> None:
    status, out, err = call("evaluate", run, "--images", "--json")
    assert status == 0
    assert json.loads(out).keys() == {"test"}
    assert err.splitlines()[-1] == f"predictions: {run / 'plots' / 'predictions.png'}"
    with Image.open(run / "plots" / "predictions.png") as image:
        assert image.format == "PNG"


def test_export_dry_run_lists_the_files(call: Any, run: Path, tmp_path: Path) -> None:
    status, out, _ = call("export", run, "--format", "torchvision", "--output", "model", "--dry-run")
    assert status == 0
    for part in ("would write", "model.safetensors, model.json", "README.md"):
        assert part in out
    assert list(tmp_path.iterdir()) == []


def test_export_suggests_the_nearest_format(call: Any, run: Path) -> None:
    status, out, err = call("export", run, "--format", "onx")
    assert (status, out) == (2, "")
    assert "did you mean 'onnx'?" in err
    assert "onnx, safetensors, torch_export, torchvision" in err
