"""Images of shapes, drawn on access."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")
_CORNERS = {"circle": 96, "square": 4, "triangle": 3}
_SUPERSAMPLING = 4
_NOISE = 12.0
_CONTRAST = (60.0, 130.0)
_MAX_ROTATION = 25.0  # degrees


class ShapeImages(Sequence[Image.Image]):
    """A column of images of one shape each, in rotation. Each image is a function of the key and its index only.

    All classes have the same distributions of area, color and position, so that they only differ in the outline.

    Args:
        count: Number of images.
        image_size: Height and width of an image, in pixels.
        key: Seed of the column; other keys give other images.
    """

    def __init__(self, count: int, image_size: int, key: tuple[int, ...]) -> None:
        self._count = count
        self._image_size = image_size
        self._key = key

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """Return one PIL image of mode RGB, or a list of images for a slice."""
        indices = range(self._count)[index]
        return self._draw(indices) if isinstance(indices, int) else [self._draw(i) for i in indices]

    def targets(self) -> npt.NDArray[np.int64]:
        """Return the index in ``SHAPES`` of the shape of each image, int64 (N,)."""
        return np.arange(self._count, dtype=np.int64) % len(SHAPES)

    def _draw(self, index: int) -> Image.Image:
        random = np.random.default_rng((*self._key, index))
        size = self._image_size
        mask = self._mask(SHAPES[index % len(SHAPES)], random)[..., None]
        background = random.uniform(20, 110, 3)
        foreground = background + random.uniform(*_CONTRAST, 3)
        slope = random.uniform(-30, 30, 2)
        light = slope[0] * np.linspace(-1, 1, size)[:, None, None] + slope[1] * np.linspace(-1, 1, size)[None, :, None]
        pixels = background * (1 - mask) + foreground * mask + light + random.normal(0, _NOISE, (size, size, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def _mask(self, shape: str, random: np.random.Generator) -> npt.NDArray[np.float64]:
        """Return the fraction of each pixel that the shape covers: float (H, W) in [0, 1]."""
        size = self._image_size * _SUPERSAMPLING
        corners = _CORNERS[shape]
        area = random.uniform(0.1, 0.25) * size**2
        # The area of a regular polygon of n corners on a circle of radius r is n r^2 sin(2 pi / n) / 2.
        radius = math.sqrt(2 * area / (corners * math.sin(2 * math.pi / corners)))
        center = random.uniform(radius, size - radius, 2)
        rotation = random.uniform(-_MAX_ROTATION, _MAX_ROTATION)
        image = Image.new("L", (size, size))
        ImageDraw.Draw(image).regular_polygon((*center, radius), n_sides=corners, rotation=rotation, fill=255)
        return np.asarray(image.resize((self._image_size,) * 2, Image.Resampling.BOX)) / 255
