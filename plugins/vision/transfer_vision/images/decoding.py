"""One picture: from bytes to a PIL image, and from any PIL image to upright RGB pixels of the wanted size."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import pil_to_tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # a release that has no decoder any more
    decode_jpeg = None

logger = logging.getLogger(__name__)

Interpolation = Literal["nearest", "bilinear", "bicubic"]

_UPRIGHT: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda pixels: pixels.flip(2),
    3: lambda pixels: pixels.flip(1, 2),
    4: lambda pixels: pixels.flip(1),
    5: lambda pixels: pixels.transpose(1, 2),
    6: lambda pixels: pixels.rot90(-1, (1, 2)),
    7: lambda pixels: pixels.transpose(1, 2).flip(1, 2),
    8: lambda pixels: pixels.rot90(1, (1, 2)),
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


def check_picture(content: bytes, name: str) -> None:
    """Decode a picture to see whether it is good. Of a JPEG all bytes are decoded, but few pixels are worked out.

    Args:
        content: The bytes of the file.
        name: What it is called in messages.

    Raises:
        ValueError, OSError: As :func:`open_picture` and :func:`decode`.
    """
    image = open_picture(content, name)
    with _pillow(name):
        image.draft(None, (1, 1))
        image.load()
        _refuse_floats(image)


def decode(image: Image.Image, shorter_side: int, interpolation: Interpolation) -> Tensor:
    """Decode, convert to RGB, resize and turn as the EXIF orientation says; the image that was given stays as it is.

    Transparency is put over white and 16-bit greys are scaled to 8 bits.

    Args:
        image: Of any mode but ``F``, whose range nothing tells.
        shorter_side: Pixels of the shorter side; the longer one keeps the aspect ratio, rounded down.
        interpolation: Torch's filter; all but ``nearest`` are antialiased.

    Returns:
        A uint8 tensor (3, H, W).

    Raises:
        ValueError, OSError: The picture is damaged, cut short, empty or too large, or has a mode that is no picture's.
    """
    with _pillow(getattr(image, "filename", None) or "a picture"):
        content = _jpeg(image)
        if content is None:
            image.load()  # before its size is asked for: a TIFF is turned by decoding it
        size = _resized(image.size, shorter_side)
        pixels = pil_to_tensor(_to_rgb(image)) if content is None else _decode_jpeg(image, content, size)
        if pixels.shape[1:] != (size[1], size[0]):
            pixels = _resize(pixels, (size[1], size[0]), interpolation)
        turn = _turn(image)
        return pixels if turn is None else turn(pixels)


def _jpeg(image: Image.Image) -> bytes | None:
    """Return the bytes of a JPEG that has not been decoded; None of any other image."""
    stream = getattr(image, "fp", None)
    if image.format == "JPEG" and getattr(image, "tile", None) and isinstance(stream, io.BytesIO):
        return stream.getvalue()
    return None


def _decode_jpeg(image: Image.Image, content: bytes, size: tuple[int, int]) -> Tensor:
    smallest = (size[0] * _DRAFT_MARGIN, size[1] * _DRAFT_MARGIN)
    whole = min(image.width // smallest[0], image.height // smallest[1]) < 2
    if whole and decode_jpeg is not None and image.mode in ("RGB", "L"):
        # The same pixels as Pillow's, in less time. What it refuses, or cannot do as it was built without a library
        # for JPEG, is left to Pillow.
        try:
            pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
            return pixels
        except RuntimeError:
            pass
    # Decoding at a smaller scale changes the image object for good, so it is done to a second one on the same bytes.
    opened = Image.open(io.BytesIO(content))
    opened.draft(None, smallest)
    rgb: Tensor = pil_to_tensor(_to_rgb(opened))
    return rgb


def _resize(pixels: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    # Not torchvision's resize, which takes another way, and rounds otherwise, on another processor.
    if interpolation == "nearest":
        return functional.interpolate(pixels[None], size, mode="nearest-exact")[0]
    return functional.interpolate(pixels[None], size, mode=interpolation, antialias=True)[0]


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
    _refuse_floats(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion cuts 16-bit values off at 255. Mode I is what older versions make of 16-bit PNGs.
        values = np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF) // 257
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _refuse_floats(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("a picture of floating-point numbers has no known range; save it with 8 or 16 bits")


def _turn(image: Image.Image) -> Callable[[Tensor], Tensor] | None:
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Damaged metadata raises nearly anything, and the pixels are good without it.
    except Exception as error:
        logger.warning("%s: unreadable EXIF, taken as upright: %s", getattr(image, "filename", "a picture"), error)
        return None


@contextmanager
def _pillow(name: str) -> Iterator[None]:
    """Log Pillow's warnings under the picture's name, and let only ValueError and OSError out."""
    with _warnings.of(name):
        try:
            yield
        except (OSError, ValueError, MemoryError):
            raise
        # Decoders raise SyntaxError, struct.error, IndexError and more on damaged files, and a bomb is none of these.
        except Exception as error:
            raise ValueError(f"cannot be decoded: {error or type(error).__name__}") from error


class _Warnings(threading.local):
    """Logs the warnings of each thread under the name of its picture.

    Python's own way to catch warnings is one for all threads, so the first thread that needs it sets it up, and the
    last one takes it down.
    """

    _lock: ClassVar = threading.Lock()
    _caught: ClassVar = contextlib.ExitStack()
    _threads: ClassVar = 0
    _name = "a picture"

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self._name = name
        cls = type(self)
        with cls._lock:
            if not cls._threads:
                cls._caught.enter_context(warnings.catch_warnings())
                warnings.simplefilter("always")
                # Torchvision's decoder will be taken out one day; until then it is the fastest.
                warnings.filterwarnings("ignore", ".*capabilities of TorchVision are deprecated")
                warnings.showwarning = self._log  # type: ignore[assignment]
            cls._threads += 1
        try:
            yield
        finally:
            with cls._lock:
                cls._threads -= 1
                if not cls._threads:
                    cls._caught.close()

    def _log(self, message: Warning | str, *_: Any) -> None:
        _log_once(self._name, str(message))


_warnings = _Warnings()


@lru_cache(maxsize=4096)
def _log_once(name: str, message: str) -> None:  # a picture is decoded in every epoch
    logger.warning("%s: %s", name, message)
