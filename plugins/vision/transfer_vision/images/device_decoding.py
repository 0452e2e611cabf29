"""Decoding of JPEG files where the model is: a batch of encoded files becomes a batch of pixels on a device."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from transfer import DataError
from transfer_vision.images.decoding import (
    ORIENTATIONS,
    CropMode,
    ImageReadMode,
    Interpolation,
    decode_jpeg,
    jpeg_content,
    orientation_of,
    resized_size,
    unlogged_deprecation,
)

MAX_DEVICE_PIXELS = 8_000_000
"""Maximum number of pixels of an image that is decoded on the device, which decodes a complete batch at full size."""
_END_OF_IMAGE = b"\xff\xd9"
_CROPPED = 0
"""Orientation of an image that is decoded and cropped already."""


class EncodedJpeg(NamedTuple):
    """A JPEG file, and the transform of its pixels on the device.

    Args:
        content: Bytes of the file, uint8 (N,).
        height, width: Size after the resize, before the orientation is applied.
        orientation: EXIF orientation, from 1 to 8.
        top, left, crop_height, crop_width: Random crop of the oriented image; a height of 0 crops the center.
        flip: Whether the crop is flipped horizontally, 0 or 1.
    """

    content: Tensor
    height: int
    width: int
    orientation: int
    top: int = 0
    left: int = 0
    crop_height: int = 0
    crop_width: int = 0
    flip: int = 0

    @property
    def oriented_size(self) -> tuple[int, int]:
        """Height and width after the resize and the orientation."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    def augmented(self, crop: v2.RandomResizedCrop, flip: v2.RandomHorizontalFlip) -> EncodedJpeg:
        """Draw crop and flip from the global generator, exactly as these transforms draw them for pixels."""
        # On the meta device: only the size matters, and the pixels do not exist yet.
        box = crop.make_params([torch.empty((3, *self.oriented_size), device="meta")])
        flipped = int(torch.rand(1) < flip.p)
        return self._replace(
            top=box["top"], left=box["left"], crop_height=box["height"], crop_width=box["width"], flip=flipped
        )


def can_decode_on_gpu() -> bool:
    """Return whether this machine can decode JPEG files on a GPU."""
    if decode_jpeg is None or not torch.cuda.is_available():
        return False
    # Older releases of torchvision decode one file per call, which is not faster than the CPU.
    return "list" in str(inspect.signature(decode_jpeg).parameters["input"].annotation).lower()


def encoded_jpeg(image: Image.Image, pixels_per_side: int, crop_mode: CropMode) -> EncodedJpeg | None:
    """Return the content of a JPEG image for the device; None if the CPU has to decode the image.

    The CPU decodes other formats and color spaces, very large images, and files without the marker at their end: it
    reports truncated files under their names.
    """
    content = jpeg_content(image)
    if content is None or image.mode not in ("RGB", "L") or image.width * image.height > MAX_DEVICE_PIXELS:
        return None
    if not content.endswith(_END_OF_IMAGE):
        return None
    width, height = resized_size(image.size, pixels_per_side, crop_mode)
    return EncodedJpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), height, width, orientation_of(image))


def collate(values: Sequence[EncodedJpeg | Tensor]) -> tuple[Tensor, Tensor]:
    """Combine files, and images that are decoded and cropped already, to a batch.

    Returns:
        All bytes, uint8 (N,), and a row per image, int64 (B, 9): its number of bytes, then the fields of
        :class:`EncodedJpeg` in order. One flat tensor, because loader processes pass each tensor in a file of its own.
    """
    contents = [value.content if isinstance(value, EncodedJpeg) else value.reshape(-1) for value in values]
    rows = [
        [len(content), *(value[1:] if isinstance(value, EncodedJpeg) else [_CROPPED] * 8)]
        for content, value in zip(contents, values, strict=True)
    ]
    return torch.cat(contents), torch.tensor(rows)


def decode_batch(
    inputs: tuple[Tensor, Tensor],
    device: torch.device,
    image_size: int,
    interpolation: Interpolation,
    center_crop: Callable[[Tensor], Tensor],
) -> Tensor:
    """Decode a batch of :func:`collate` on a device, and resize, orient, crop and flip its images there.

    Args:
        inputs: Bytes, uint8 (N,), and rows, int64 (B, 9), on the CPU.
        device: CUDA device, whose decoder is nvJPEG, or the CPU.
        image_size: Height and width S of the result.
        interpolation: Filter of the resize; all except ``nearest`` are antialiased.
        center_crop: Function that crops or pads an image (C, H, W) to (C, S, S), for images without a random crop.

    Returns:
        A uint8 tensor (B, C, S, S), channels last in memory.

    Raises:
        transfer.DataError: A file is damaged.
    """
    content, rows = inputs
    parts = content.split_with_sizes(rows[:, 0].tolist())
    values = [EncodedJpeg(part, *row[1:]) for part, row in zip(parts, rows.tolist(), strict=True)]
    # In one call, because nvJPEG decodes the images of a batch in parallel.
    decoded = iter(_decode([value.content for value in values if value.orientation != _CROPPED], device))
    mode = v2.InterpolationMode("nearest-exact" if interpolation == "nearest" else interpolation)
    size = [image_size, image_size]
    batch = torch.empty((len(values), *size, 3), dtype=torch.uint8, device=device)
    for target, value in zip(batch, values, strict=True):
        if value.orientation == _CROPPED:
            pixels = value.content.view(3, *size).to(device, non_blocking=True)
        else:
            # The same steps as on the CPU, so that the pixels are the same up to rounding.
            pixels = v2.functional.resize(next(decoded), [value.height, value.width], mode, antialias=True)
            if value.orientation in ORIENTATIONS:
                pixels = ORIENTATIONS[value.orientation](pixels)
            if value.crop_height:
                box = value.top, value.left, value.crop_height, value.crop_width
                pixels = v2.functional.resized_crop(pixels, *box, size=size, antialias=True)
                pixels = pixels.flip(2) if value.flip else pixels
            else:
                pixels = center_crop(pixels)
        target.copy_(pixels.permute(1, 2, 0))
    return batch.permute(0, 3, 1, 2)


def _decode(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode files on a device; Pillow decodes those that its decoder refuses. Returns uint8 tensors (3, H, W)."""
    assert decode_jpeg is not None
    if not contents:
        return []
    with unlogged_deprecation():
        try:
            decoded: list[Tensor] = decode_jpeg(contents, ImageReadMode.RGB, device)
            return decoded
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            pass
    if len(contents) > 1:  # the error does not name the file
        return [pixels for content in contents for pixels in _decode([content], device)]
    try:
        image = Image.open(io.BytesIO(contents[0].numpy().tobytes()))
        return [pil_to_tensor(image.convert("RGB")).to(device)]
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"an image of the data cannot be decoded: {error}", fix="find it with decode: cpu") from error
