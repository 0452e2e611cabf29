"""One picture: from bytes to a PIL image, and from any PIL image to upright RGB of the wanted size."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A JPEG decoded at least this many times larger than needed, and then resized, looks as if it had been decoded in full.
_DRAFT_MARGIN = 2


def open_picture(content: bytes, name: str) -> Image.Image:
    """Open a picture without decoding its pixels.

    Args:
        content: The bytes of the file.
        name: What it is called in messages.

    Raises:
        ValueError, OSError: It is no picture that Pillow can read, or larger than Pillow's limit.
    """
    with _pillow(name):
        try:
            image = Image.open(io.BytesIO(content))
        except UnidentifiedImageError as error:  # whose own message names a buffer in memory
            what = f"it begins with {content[:8]!r}" if content else "the file is empty"
            raise OSError(f"not a picture that can be read: {what}") from error
        image.filename = name  # as if Pillow had opened the file itself
    return image


def to_upright_rgb(image: Image.Image, shorter_side: int, resampling: Image.Resampling) -> Image.Image:
    """Decode, convert to RGB, resize and turn as the EXIF orientation says; the image that was given stays as it is.

    Transparency is put over white and 16-bit greys are scaled to 8 bits.

    Args:
        image: Of any mode but ``F``, whose range nothing tells.
        shorter_side: Pixels of the shorter side; the longer one keeps the aspect ratio, rounded down.
        resampling: Pillow's filter; all but ``NEAREST`` are antialiased.

    Raises:
        ValueError, OSError: The picture is damaged, cut short, empty or too large, or has a mode that is no picture's.
    """
    with _pillow(getattr(image, "filename", None) or "a picture"):
        opened = _reopened_jpeg(image)
        if opened is None:
            image.load()  # before its size is asked for: a TIFF is turned by decoding it
            size = _resized(image.size, shorter_side)
        else:
            size = _resized(image.size, shorter_side)
            opened.draft(None, (size[0] * _DRAFT_MARGIN, size[1] * _DRAFT_MARGIN))
            opened.load()
            image = opened
        rgb = _to_rgb(image)
        if rgb.size != size:
            rgb = rgb.resize(size, resampling)
        turn = _turn(image)
        return rgb if turn is None else rgb.transpose(turn)


def _reopened_jpeg(image: Image.Image) -> Image.Image | None:
    # Decoding at a smaller scale changes the image object for good, so it is done to a second one on the same bytes.
    stream = getattr(image, "fp", None)
    if image.format == "JPEG" and getattr(image, "tile", None) and isinstance(stream, io.BytesIO):
        return Image.open(io.BytesIO(stream.getvalue()))
    return None


def _resized(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    short, long = min(size), max(size)
    if short == 0:
        raise ValueError(f"the picture is empty: {size[0]} x {size[1]} pixels")
    other = int(shorter_side * long / short)  # as torchvision rounds
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and shorter_side * other > limit:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels is too long and thin: with a shorter side of {shorter_side} "
            f"it would have {shorter_side * other} pixels, over Pillow's limit of {limit}"
        )
    return (shorter_side, other) if size[0] <= size[1] else (other, shorter_side)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("a picture of floating-point numbers has no known range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion cuts 16-bit values off at 255. Mode I is what older versions make of 16-bit PNGs.
        values = np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF) // 257
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Damaged metadata raises nearly anything, and the pixels are good without it.
    except Exception as error:
        logger.warning("%s: unreadable EXIF, taken as upright: %s", getattr(image, "filename", "a picture"), error)
        return None


@contextmanager
def _pillow(name: str) -> Iterator[None]:
    """Log Pillow's warnings under the picture's name, and let only ValueError and OSError out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except (OSError, ValueError, MemoryError):
            raise
        # Decoders raise SyntaxError, struct.error, IndexError and more on damaged files, and a bomb is none of these.
        except Exception as error:
            raise ValueError(f"cannot be decoded: {error or type(error).__name__}") from error
        finally:
            for warning in caught:
                _log_once(name, str(warning.message))


@lru_cache(maxsize=4096)
def _log_once(name: str, message: str) -> None:  # a picture is decoded in every epoch
    logger.warning("%s: %s", name, message)
