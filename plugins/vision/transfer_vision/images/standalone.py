"""Preprocessing of an image with only NumPy and Pillow. Exports contain a copy of this file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps


def prepare(value: str, settings: Mapping[str, Any], folder: Path) -> npt.NDArray[np.float32]:
    """Return the model's input for the image at a path, float32 (1, C, S, S).

    Resized pixels may differ by one level from those in training, which torch resizes.

    Args:
        value: Path of the image.
        settings: Settings of the preprocessing in ``model.json``.
        folder: Folder of the export.
    """
    image = ImageOps.exif_transpose(Image.open(value))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if len(settings["mean"]) == 1 else "RGB")
    size, pixels, mode = settings["image_size"], settings["resize"], settings["crop_mode"]
    short, long = min(image.size), max(image.size)
    if mode == "squash":
        resized = (pixels, pixels)
    else:
        sides = (
            (pixels, int(pixels * long / short)) if mode == "center" else (max(1, round(pixels * short / long)), pixels)
        )
        resized = sides if image.width <= image.height else sides[::-1]
    image = image.resize(resized, Image.Resampling[settings["interpolation"].upper()])
    # The crop may be larger than the image: the rest is black, or the mean color of a border.
    mean, std = np.array(settings["mean"], np.float32), np.array(settings["std"], np.float32)
    canvas = np.zeros((size, size, len(mean)), np.float32)
    if mode == "border":
        canvas += np.round(255 * mean)
    # As in torchvision: an odd padding has the smaller half in front.
    left, top = (round((side - size) / 2) if side > size else -((size - side) // 2) for side in image.size)
    values = np.asarray(image, np.float32).reshape(image.height, image.width, len(mean))
    values = values[max(top, 0) : max(top, 0) + size, max(left, 0) : max(left, 0) + size]
    canvas[max(-top, 0) : max(-top, 0) + len(values), max(-left, 0) : max(-left, 0) + values.shape[1]] = values
    return ((canvas / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
