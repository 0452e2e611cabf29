"""What holds on a GPU only. `make gpu` runs these tests; without a GPU they are skipped."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import transfer
from transfer import Split
from transfer.config.check import load_config
from transfer.data.loader import Loader
from transfer.models.precision import place, resolve_precision
from transfer.training.build import build
from transfer.training.events import ignore_events
from transfer_vision.images.decoding import open_image
from transfer_vision.preprocessing import ImagePreprocessing

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _restore_kernels() -> Iterator[None]:
    """Keep the kernels that a run chooses for its process from other tests."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    yield
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision(precision)


def test_auto_precision_is_close_to_fp32(config: dict[str, Any], tmp_path: Path) -> None:
    expected = "bf16" if torch.cuda.get_device_capability(CUDA)[0] >= 8 else "fp32"
    assert resolve_precision("auto", CUDA) == expected
    exact, chosen = (
        transfer.run(config, [f"train.precision={precision}"], output=tmp_path) for precision in ("fp32", "auto")
    )
    assert chosen.summary["test"]["loss"] == pytest.approx(exact.summary["test"]["loss"], rel=0.05)


def test_convolutions_are_channels_last(config: dict[str, Any]) -> None:
    model = build(load_config(config), ignore_events).experiment.model
    model.add_module("convolution", nn.Conv2d(3, 8, 3))
    place(model, CUDA)
    weight = model.get_parameter("convolution.weight")
    assert weight.is_cuda
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned(config: dict[str, Any], workers: int) -> None:
    loader = build(load_config(config, [f"train.workers={workers}"]), ignore_events).experiment.train
    loader.prepare_for(CUDA)
    batch = next(iter(loader.epoch()))
    assert batch.inputs.is_pinned()
    assert batch.targets.is_pinned()
    torch.testing.assert_close(batch.to(CUDA).inputs.cpu(), batch.to(CPU).inputs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_features_are_verified_within_a_tolerance(
    config: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    overrides = ["train.phases.0.freeze=backbone", "train.cache=verify", f"train.precision={precision}"]
    for _ in range(2):
        assert transfer.run(config, overrides, output=tmp_path).summary["cache"][0]["cached"]


def test_evaluation_repeats_the_metrics_of_the_run(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, output=tmp_path)
    assert transfer.evaluate(run.folder) == pytest.approx(run.summary["test"], abs=1e-3)


def test_gpu_decodes_the_pixels_of_the_cpu() -> None:
    files = []
    for seed, (height, width) in enumerate([(60, 90), (90, 60), (48, 48), (200, 64)]):
        coarse = np.random.default_rng(seed).integers(256, size=(5, 6, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    made = {}
    for decode in ("cpu", "gpu"):
        preprocessing = ImagePreprocessing(image_size=32, decode=decode)
        images = [open_image(content, "image") for content in files]
        split = Split({"image": images}, np.zeros(len(files), dtype=np.int64))
        loader = Loader(split, ("image",), preprocessing, batch_size=4, seed=5, training=True)
        made[decode] = next(iter(loader.epoch())).to(CUDA).inputs
    assert made["gpu"].is_cuda
    levels = (made["gpu"] - made["cpu"]).abs() * 255 * 0.23  # times the standard deviation of a channel
    assert levels.max() < 6
    assert levels.mean() < 0.5


def test_batch_size_is_found(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, ["data.count=2000", "train.batch_size=auto"], output=tmp_path)
    assert run.summary["best_epoch"] >= 1
    assert load_config(run.folder / "config.yaml").train.batch_size == 128  # the limit of eight steps per epoch
