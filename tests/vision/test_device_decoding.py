"""JPEG files that are decoded where the model is. torchvision's decoder for the CPU takes the place of nvJPEG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import transfer
from transfer import ConfigError, DataError, Split
from transfer.data.batch import Batch
from transfer.data.loader import Loader
from transfer.models.saved_model import read_model
from transfer_vision.images import device_decoding
from transfer_vision.images.decoding import open_image
from transfer_vision.images.device_decoding import EncodedJpeg
from transfer_vision.models.backbones import Torchvision
from transfer_vision.preprocessing import ImagePreprocessing

CPU = torch.device("cpu")
SIZE = 32


def jpeg(height: int, width: int, *, orientation: int = 1, mode: str = "RGB", seed: int = 0) -> bytes:
    coarse = np.random.default_rng(seed).integers(256, size=(5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=95, exif=exif)
    return file.getvalue()


FILES = [jpeg(60, 90, orientation=o, seed=o) for o in range(1, 9)] + [jpeg(50, 47, mode="L"), jpeg(20, 400)]


class Images(list[Any]):
    """Column of PIL images that are opened at every access."""

    def __getitem__(self, index: Any) -> Any:
        return open_image(super().__getitem__(index), f"{index}.jpg")


def loader(preprocessing: ImagePreprocessing, files: list[bytes], *, training: bool) -> Loader:
    split = Split({"image": Images(files)}, np.zeros(len(files), dtype=np.int64))
    return Loader(split, ("image",), preprocessing, batch_size=4, seed=5, training=training)


def inputs(batches: Iterator[Batch]) -> Tensor:
    return torch.cat([batch.to(CPU).inputs for batch in batches])


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_decoding, "can_decode_on_gpu", lambda: True)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("crop_mode", ["center", "border"])
def test_device_makes_the_pixels_of_the_cpu(training: bool, crop_mode: Any) -> None:
    options: dict[str, Any] = {"image_size": SIZE, "crop_mode": crop_mode}
    on_cpu = loader(ImagePreprocessing(**options), FILES, training=training)
    on_device = loader(ImagePreprocessing(**options, decode="gpu"), FILES, training=training)
    for epoch in (0, 1):
        expected, made = (inputs(one.epoch(epoch)) for one in (on_cpu, on_device))
        assert made.shape == (len(FILES), 3, SIZE, SIZE)
        assert made.dtype == torch.float32
        assert made.is_contiguous(memory_format=torch.channels_last)
        levels = (made - expected).abs() * 255 * 0.23  # times the standard deviation of a channel
        assert levels.max() < 2.1
        assert levels.mean() < 0.1


@pytest.mark.usefixtures("on_gpu")
def test_cpu_decodes_other_formats_and_broken_files() -> None:
    png = io.BytesIO()
    Image.new("RGB", (40, 50), "red").save(png, format="PNG")
    broken = jpeg(60, 90)[:-300]
    preprocessing = ImagePreprocessing(image_size=SIZE, decode="gpu")
    encoded = preprocessing.encode([open_image(content, "one") for content in (FILES[0], png.getvalue())])
    assert [isinstance(value, EncodedJpeg) for value in encoded] == [True, False]
    expected = ImagePreprocessing(image_size=SIZE).model_inputs(encoded[1:])
    torch.testing.assert_close(preprocessing.model_inputs(encoded)[1:], expected)
    messages = []
    for one in (preprocessing, ImagePreprocessing(image_size=SIZE)):
        with pytest.raises(DataError) as caught:
            list(loader(one, [FILES[0], broken], training=True).epoch())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "truncated" in messages[0]


@pytest.mark.usefixtures("on_gpu")
def test_pillow_decodes_files_that_the_device_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessing = ImagePreprocessing(image_size=SIZE, decode="gpu")
    batch = preprocessing.collate(preprocessing.encode([open_image(content, "one") for content in FILES[:2]]))
    expected = preprocessing.to_device(batch, CPU)

    def refuse(*_: Any) -> None:
        raise RuntimeError("nvJPEG refuses it")

    monkeypatch.setattr(device_decoding, "decode_jpeg", refuse)
    torch.testing.assert_close(preprocessing.to_device(batch, CPU), expected, atol=0.1, rtol=0)
    content, rows = batch
    content[200:] = 0
    with pytest.raises(DataError, match="an image of the data cannot be decoded"):
        preprocessing.to_device((content, rows), CPU)


def test_gpu_is_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="decode: gpu is not possible: there is no GPU"):
        Torchvision(model="squeezenet1_1", weights=None, image_size=SIZE, decode="gpu")
    assert Torchvision(model="squeezenet1_1", weights=None, image_size=SIZE).preprocessing.describe()["decode"] == "cpu"


@pytest.mark.usefixtures("on_gpu")
def test_gpu_is_chosen_for_the_default_augmentation_only() -> None:
    assert ImagePreprocessing(decode="auto").describe()["decode"] == "gpu"
    assert ImagePreprocessing(decode="auto", augmentation="strong").describe()["decode"] == "cpu"
    with pytest.raises(ConfigError, match="neither default nor none"):
        ImagePreprocessing(decode="gpu", augmentation="strong")


def test_run_records_the_decoder_and_predicts_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            path = tmp_path / "images" / split / f"class{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(40, 50, seed=number))
    config: dict[str, Any] = {
        "data": {"name": "image_folder", "root": str(tmp_path / "images"), "val": "val", "test_fraction": 0},
        "backbone": {"name": "torchvision", "model": "squeezenet1_1", "weights": None, "image_size": SIZE},
        "head": {"name": "linear"},
        "task": {"name": "classification"},
        "train": {"batch_size": 2, "device": "cpu", "report": False, "phases": [{"epochs": 1, "freeze": "backbone"}]},
    }
    monkeypatch.setattr(device_decoding, "can_decode_on_gpu", lambda: True)
    run = transfer.run(config, ["backbone.decode=gpu"], output=tmp_path / "runs")
    assert read_model(run.folder / "model").backbone.preprocessing.describe()["decode"] == "gpu"
    monkeypatch.setattr(device_decoding, "can_decode_on_gpu", lambda: False)
    with pytest.warns(UserWarning, match="decoded by a GPU, and there is no GPU"):
        assert read_model(run.folder / "model").backbone.preprocessing.describe()["decode"] == "cpu"
    run = transfer.run(config, output=tmp_path / "runs")
    monkeypatch.setattr(device_decoding, "can_decode_on_gpu", lambda: True)
    assert read_model(run.folder / "model").backbone.preprocessing.describe()["decode"] == "cpu"
