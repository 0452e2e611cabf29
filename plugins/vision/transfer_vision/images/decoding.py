"""Decoding of one image: from bytes to a PIL image, and from any PIL image to upright RGB pixels of a given size."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import pil_to_tensor

try:
    from torchvision.io import ImageReadMode as ImageReadMode, decode_jpeg as decode_jpeg
except ImportError:  # newer torchvision releases have no decoder
    decode_jpeg = None

logger = logging.getLogger(__name__)

Interpolation = Literal["nearest", "bilinear", "bicubic"]
CropMode = Literal["center", "squash", "border"]

ORIENTATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda pixels: pixels.flip(2),
    3: lambda pixels: pixels.flip(1, 2),
    4: lambda pixels: pixels.flip(1),
    5: lambda pixels: pixels.transpose(1, 2),
    6: lambda pixels: pixels.rot90(-1, (1, 2)),
    7: lambda pixels: pixels.transpose(1, 2).flip(1, 2),
    8: lambda pixels: pixels.rot90(1, (1, 2)),
}
# Decoding a JPEG at a reduced scale is invisible if the result is at least this many times larger than needed.
_DRAFT_MARGIN = 2


UPLOAD_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
"""Formats of images from a network. Others are rare, and some start a program (Ghostscript decodes EPS)."""
MAX_UPLOAD_PIXELS = 50_000_000
"""Maximum number of pixels of an image from a network: a few kilobytes can describe gigabytes of pixels."""
MAX_UPLOAD_SCANNED_PIXELS = 250_000_000
"""Maximum number of pixels times scans of a progressive JPEG from a network: each scan passes over all pixels."""
_START_OF_SCAN = b"\xff\xda"


def open_upload(content: bytes, name: str) -> Image.Image:
    """Open an image from a network without decoding its pixels, within limits on its format and its decoding time.

    Args:
        content: The bytes of the file.
        name: The name of the image in messages.

    Raises:
        ValueError, OSError: See :func:`open_image`; or the image exceeds a limit.
    """
    Image.init()  # registers all formats
    image = open_image(content, name, [name for name in UPLOAD_FORMATS if name in Image.OPEN])
    pixels = image.width * image.height
    # In the data of a scan, a byte 0xff is always followed by 0: the marker occurs only where a scan starts.
    scans = content.count(_START_OF_SCAN) if image.format in ("JPEG", "MPO") else 1
    if pixels > MAX_UPLOAD_PIXELS or pixels * scans > MAX_UPLOAD_SCANNED_PIXELS:
        size = f"{image.width} x {image.height} pixels" + (f" in {scans} scans" if scans > 1 else "")
        raise ValueError(f"it is too large: expected at most {MAX_UPLOAD_PIXELS // 10**6} million pixels, got {size}")
    return image


def open_image(content: bytes, name: str, formats: list[str] | None = None) -> Image.Image:
    """Open an image without decoding its pixels.

    Args:
        content: The bytes of the file.
        name: The name of the image in messages.
        formats: Formats that are tried, in Pillow's names; None tries all.

    Raises:
        ValueError, OSError: Pillow cannot read the content as an image, or it is larger than Pillow's limit.
    """
    with _pillow_errors(name):
        try:
            image = Image.open(io.BytesIO(content), formats=formats)
        except UnidentifiedImageError as error:  # its own message only names a buffer in memory
            reason = f"it starts with {content[:8]!r}" if content else "the file is empty"
            raise OSError(f"not an image that can be read: {reason}") from error
        image.filename = name  # Pillow sets it if it opens the file itself
    return image


def check_image(content: bytes, name: str) -> None:
    """Decode an image to check it. All bytes of a JPEG are decoded, but at its smallest scale.

    Args:
        content: The bytes of the file.
        name: The name of the image in messages.

    Raises:
        ValueError, OSError: See :func:`open_image` and :func:`decode`.
    """
    image = open_image(content, name)
    with _pillow_errors(name):
        image.draft(None, (1, 1))
        image.load()
        _refuse_floats(image)


def decode(
    image: Image.Image, pixels_per_side: int, interpolation: Interpolation, crop_mode: CropMode = "center"
) -> Tensor:
    """Decode, convert to RGB, resize and apply the EXIF orientation; ``image`` itself does not change.

    Transparent pixels are blended with white, and 16-bit gray values are scaled to 8 bits.

    Args:
        image: An image of any mode except ``F``, whose value range is unknown.
        pixels_per_side: Pixels of the resized side; see :func:`resized_size`.
        interpolation: The filter of the resize; all except ``nearest`` are antialiased.
        crop_mode: The sides that are resized to ``pixels_per_side``.

    Returns:
        A uint8 tensor (3, H, W).

    Raises:
        ValueError, OSError: The image is damaged, truncated, empty, too large or of an unsupported mode.
    """
    with _pillow_errors(getattr(image, "filename", None) or "an image"):
        content = jpeg_content(image)
        if content is None:
            image.load()  # before its size is read: decoding a TIFF also rotates it
        size = resized_size(image.size, pixels_per_side, crop_mode)
        pixels = pil_to_tensor(_to_rgb(image)) if content is None else _decode_jpeg(image, content, size)
        if pixels.shape[1:] != (size[1], size[0]):
            pixels = _resize(pixels, (size[1], size[0]), interpolation)
        orientation = orientation_of(image)
        return ORIENTATIONS[orientation](pixels) if orientation in ORIENTATIONS else pixels


def jpeg_content(image: Image.Image) -> bytes | None:
    """Return the bytes of a JPEG that has not been decoded, and None for any other image."""
    stream = getattr(image, "fp", None)
    if image.format == "JPEG" and getattr(image, "tile", None) and isinstance(stream, io.BytesIO):
        return stream.getvalue()
    return None


def _decode_jpeg(image: Image.Image, content: bytes, size: tuple[int, int]) -> Tensor:
    smallest = (size[0] * _DRAFT_MARGIN, size[1] * _DRAFT_MARGIN)
    full_scale = min(image.width // smallest[0], image.height // smallest[1]) < 2
    if full_scale and decode_jpeg is not None and image.mode in ("RGB", "L"):
        # torchvision returns the same pixels as Pillow in less time. Pillow decodes the files that it refuses, and all
        # files if torchvision was built without a JPEG library.
        try:
            pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
            return pixels
        except RuntimeError:
            pass
    # draft() changes an image object permanently, so it is applied to a second one on the same bytes.
    opened = Image.open(io.BytesIO(content))
    opened.draft(None, smallest)
    rgb: Tensor = pil_to_tensor(_to_rgb(opened))
    return rgb


def _resize(pixels: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    # Not torchvision's resize: it takes another code path on some processors, and rounds differently there.
    if interpolation == "nearest":
        return functional.interpolate(pixels[None], size, mode="nearest-exact")[0]
    return functional.interpolate(pixels[None], size, mode=interpolation, antialias=True)[0]


def resized_size(size: tuple[int, int], pixels: int, crop_mode: CropMode = "center") -> tuple[int, int]:
    """Return the size to which an image is resized before the center crop, as (width, height).

    Args:
        size: Width and height of the image.
        pixels: Pixels of the resized side.
        crop_mode: ``center``: the shorter side gets ``pixels``, and the longer one keeps the aspect ratio. ``squash``:
            both sides get ``pixels``. ``border``: the longer side gets ``pixels``, the shorter one keeps the ratio.

    Raises:
        ValueError: The image is empty, or would be larger than Pillow's limit.
    """
    short, long = min(size), max(size)
    if short == 0:
        raise ValueError(f"the image is empty: {size[0]} x {size[1]} pixels")
    if crop_mode == "squash":
        return pixels, pixels
    if crop_mode == "border":
        other = max(1, round(pixels * short / long))  # rounded to the nearest, as in timm
        return (other, pixels) if size[0] <= size[1] else (pixels, other)
    other = int(pixels * long / short)  # rounded down, as in torchvision
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels * other > limit:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels is too long and thin: with a shorter side of {pixels} "
            f"it would have {pixels * other} pixels, over Pillow's limit of {limit}"
        )
    return (pixels, other) if size[0] <= size[1] else (other, pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    _refuse_floats(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit values at 255. Older versions read 16-bit PNGs as mode I.
        values = np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF) // 257
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _refuse_floats(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers has no known range; save it with 8 or 16 bits")


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image: a key of ``ORIENTATIONS``, or 1 for an upright one."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(orientation) if orientation in ORIENTATIONS else 1
    # Damaged metadata raises nearly any exception, but the pixels are usable without it.
    except Exception as error:
        logger.warning("%s: unreadable EXIF, taken as upright: %s", getattr(image, "filename", "an image"), error)
        return 1


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Log Pillow's warnings under the name of the image, and convert other exceptions to ValueError."""
    with _warnings.logged_as(name):
        try:
            yield
        except (OSError, ValueError, MemoryError):
            raise
        # Decoders raise SyntaxError, struct.error, IndexError and more on damaged files, and DecompressionBombError is
        # none of these.
        except Exception as error:
            raise ValueError(f"cannot be decoded: {error or type(error).__name__}") from error


class _Warnings(threading.local):
    """Logger of the warnings of each thread under the name of the image that it decodes.

    ``warnings.catch_warnings`` is global to the process. The first thread that needs it therefore installs it, and the
    last one removes it.
    """

    _lock: ClassVar = threading.Lock()
    _caught: ClassVar = contextlib.ExitStack()
    _threads: ClassVar = 0
    _name = "an image"

    @contextmanager
    def logged_as(self, name: str) -> Iterator[None]:
        self._name = name
        cls = type(self)
        with cls._lock:
            if not cls._threads:
                cls._caught.enter_context(warnings.catch_warnings())
                warnings.simplefilter("always")
                # torchvision deprecates its decoder, which is still the fastest one.
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


def unlogged_deprecation() -> AbstractContextManager[None]:
    """Return a context in which torchvision's decoder does not warn that it is deprecated."""
    return _warnings.logged_as("a batch of images")


@lru_cache(maxsize=4096)
def _log_once(name: str, message: str) -> None:  # an image is decoded in every epoch
    logger.warning("%s: %s", name, message)
