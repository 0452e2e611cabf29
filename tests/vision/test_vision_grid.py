"""Grids of images: what is drawn, where, and the same bytes every time."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from transfer_vision.images.image_grid import GAP_PIXELS, HEADING_PIXELS, LINE_PIXELS, draw_grid
from transfer_vision.preprocessing import ImagePreprocessing

COLORS = ("red", "lime", "blue")


def opened(content: bytes) -> npt.NDArray[np.uint8]:
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def squares(count: int, size: int = 128) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), COLORS[i % 3]) for i in range(count)]


def test_grid_has_rows_of_eight_with_headings() -> None:
    drawn = opened(draw_grid(squares(11), ["one\ntwo"] * 11, {"first": range(10), "second": [10]}))
    across, down = 128 + GAP_PIXELS, 128 + 2 * LINE_PIXELS + GAP_PIXELS
    assert drawn.shape == (GAP_PIXELS + 2 * HEADING_PIXELS + 3 * down, GAP_PIXELS + 8 * across, 3)
    top = GAP_PIXELS + HEADING_PIXELS
    assert drawn[top, GAP_PIXELS].tolist() == [255, 0, 0]
    assert drawn[top, GAP_PIXELS + across].tolist() == [0, 255, 0]
    assert drawn[top + down + 127, GAP_PIXELS + across + 127].tolist() == [255, 0, 0]  # the tenth
    assert drawn[top + 2 * down + HEADING_PIXELS, GAP_PIXELS].tolist() == [0, 255, 0]  # the eleventh


def test_small_images_are_enlarged_by_integer_factors() -> None:
    drawn = opened(draw_grid(squares(1, size=50), [""], {"": [0]}))
    assert drawn.shape[1] == GAP_PIXELS + 100 + GAP_PIXELS


def test_a_caption_stays_within_its_image() -> None:
    drawn = opened(draw_grid(squares(2), ["a very long name of a class that goes on and on", ""], {"": [0, 1]}))
    caption = drawn[GAP_PIXELS + HEADING_PIXELS + 128 :]
    assert (caption[:, GAP_PIXELS : GAP_PIXELS + 128] < 128).any()
    assert (caption[:, GAP_PIXELS + 128 :] == 255).all()


def test_non_ascii_captions_differ() -> None:
    drawn = [opened(draw_grid(squares(1), [name], {"": [0]})) for name in ("\u732b", "\u72ac")]
    assert (drawn[0] != drawn[1]).any()


def test_a_group_may_be_empty() -> None:
    assert opened(draw_grid(squares(1), ["x"], {"none here": [], "one here": [0]})).ndim == 3


def test_render_batch_inverts_normalization_deterministically() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    preprocessing = ImagePreprocessing(image_size=128, resize=128)
    image = Image.fromarray(pixels)
    inputs = preprocessing.model_inputs(preprocessing.encode([image]))
    content = preprocessing.render_batch(inputs, [image], ["noise"], {"": [0]})
    top, left = GAP_PIXELS + HEADING_PIXELS, GAP_PIXELS
    assert np.array_equal(opened(content)[top : top + 128, left : left + 128], pixels)
    assert content == preprocessing.render_batch(inputs, [image], ["noise"], {"": [0]})


@pytest.mark.parametrize(("channels", "drawn"), [(1, [200, 200, 200]), (2, [200, 200, 200]), (5, [200, 150, 100])])
def test_other_numbers_of_channels_are_drawn_too(channels: int, drawn: list[int]) -> None:
    preprocessing = ImagePreprocessing(image_size=32, resize=32, mean=(0.5,) * channels, std=(0.5,) * channels)
    value = np.full((32, 32, channels), [200, 150, 100, 50, 0][:channels], dtype=np.uint8)
    inputs = preprocessing.model_inputs(preprocessing.encode([value]))
    content = preprocessing.render_batch(inputs, [value], [""], {"": [0]})
    assert opened(content)[GAP_PIXELS + HEADING_PIXELS, GAP_PIXELS].tolist() == drawn
