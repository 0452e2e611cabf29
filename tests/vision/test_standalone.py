"""The preprocessing in exports, which needs neither torch nor this package, equals that of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfer_vision.images.decoding import CropMode
from transfer_vision.images.standalone import prepare
from transfer_vision.preprocessing import ImagePreprocessing


@pytest.mark.parametrize("size", [(100, 97), (97, 100), (100, 40), (60, 61)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_image_is_prepared_as_in_training(crop_mode: CropMode, size: tuple[int, int], tmp_path: Path) -> None:
    # Smooth, because resized pixels may differ by one level.
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8)).save(tmp_path / "a.png")
    preprocessing = ImagePreprocessing(image_size=40, resize=43 if crop_mode == "center" else 40, crop_mode=crop_mode)
    image = preprocessing.read(str(tmp_path / "a.png"))
    expected = preprocessing.model_inputs(preprocessing.encode([image])).numpy()
    actual = prepare(str(tmp_path / "a.png"), preprocessing.describe(), tmp_path)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 2.1 / 255 / 0.224
