"""Preprocessing of images: from PIL images to a normalized batch."""

from __future__ import annotations

import functools
import inspect
import io
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.models import WeightsEnum
from torchvision.transforms import v2

from transfer import ConfigError, DataError, Preprocessing
from transfer_vision.images import device_decoding, standalone
from transfer_vision.images.augmentation import (
    Augmentation as Augmentation,  # public import path
    augmentation_transform,
    current_name,
)
from transfer_vision.images.decoding import CropMode, Interpolation, decode, open_image, open_upload, resized_size
from transfer_vision.images.device_decoding import EncodedJpeg
from transfer_vision.images.image_grid import draw_grid
from transfer_vision.images.image_sources import EXTENSIONS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

THUMBNAIL_PIXELS = 160
"""Shorter side of a thumbnail."""

DecodeDevice = Literal["auto", "cpu", "gpu"]
CacheImages = Literal["auto", "off"] | Annotated[float, Field(ge=0, allow_inf_nan=False)]


_Size = Annotated[int, Field(ge=1, le=2**16)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Preset:
    """Preprocessing with which weights were evaluated.

    Args:
        image_size: Height and width of the model's input.
        resize: Pixels of the shorter side before the crop.
        interpolation: Filter of the resize.
        mean: Mean of each channel in the pretraining data, for values in [0, 1].
        std: Standard deviation of each channel in the pretraining data, for values in [0, 1].
    """

    image_size: _Size
    resize: _Size
    interpolation: Interpolation
    mean: tuple[_Finite, ...]
    std: tuple[_Finite, ...]

    @classmethod
    def of(cls, weights: WeightsEnum) -> Self:
        """Return the preset of published weights."""
        facts = weights.transforms()
        (size,), (resize,) = facts.crop_size, facts.resize_size
        return cls(size, resize, facts.interpolation.value, tuple(facts.mean), tuple(facts.std))

    def for_channels(self, count: int) -> Preset:
        """Return the preset for another number of channels: the mean of the three, or the three repeated."""
        if len(self.mean) == count:
            return self
        mean, std = (
            (sum(values) / len(values),) if count == 1 else tuple(islice(cycle(values), count))
            for values in (self.mean, self.std)
        )
        return replace(self, mean=mean, std=std)

    def with_overrides(self, **overrides: Any) -> Preset:
        """Replace the values that are not None; ``resize`` is scaled with another ``image_size``.

        Raises:
            transfer.ConfigError: The number of means or deviations is not the number of channels.
        """
        overrides = {name: value for name, value in overrides.items() if value is not None}
        for name in ("mean", "std"):
            if len(overrides.get(name, self.mean)) != len(self.mean):
                raise ConfigError(
                    f"{name} has {len(overrides[name])} numbers for {len(self.mean)} channels",
                    fix=f"give {len(self.mean)}, or set in_channels",
                )
        if "image_size" in overrides:
            overrides = {"resize": round(overrides["image_size"] * self.resize / self.image_size), **overrides}
        return replace(self, **overrides)


class ImagePreprocessing(Preprocessing):
    """Preprocessing of images as in the evaluation and fine-tuning of torchvision's classification models.

    Args:
        image_size: Height and width of the model's input.
        resize: Pixels of the resized side before the crop; None: 256/224 of ``image_size``.
        interpolation: Filter of the resize, antialiased.
        mean: Mean of each channel in the pretraining data, for values in [0, 1]. Its length is the number of channels.
        std: Standard deviation of each channel in the pretraining data, for values in [0, 1].
        augmentation: ``default`` (a random resized crop and a horizontal flip), ``strong`` (with TrivialAugment and
            random erasing after them), ``none``, or a list of torchvision.transforms.v2 classes with options, in order:
            ``[{name: ColorJitter, brightness: 0.2}]``.
        cache_images: Memory for decoded and resized images, which are kept between epochs if those of a split fit:
            ``auto`` (half of the available memory), ``off``, or a number of GiB.
        crop_mode: Resize before the center crop. ``center``: the shorter side gets ``resize`` pixels. ``squash``: both
            sides do. ``border``: the longer side does, and the rest is filled with the mean color.
        decode: Where JPEG files are decoded, resized and augmented: ``gpu``, ``cpu``, or ``auto`` (on the GPU if there
            is one). Pixels differ by rounding. The GPU decodes images of three channels with the augmentation
            ``default`` or ``none``; anything else is decoded on the CPU.

    Raises:
        transfer.ConfigError: An option is wrong, or ``decode`` is ``gpu`` without a GPU.
    """

    media_type: ClassVar[str] = "image/*"
    file_suffixes: ClassVar[tuple[str, ...]] = EXTENSIONS

    def __init__(
        self,
        *,
        image_size: int = 224,
        resize: int | None = None,
        interpolation: Interpolation = "bilinear",
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        augmentation: Augmentation = "default",
        cache_images: CacheImages = "auto",
        crop_mode: CropMode = "center",
        decode: DecodeDevice = "cpu",
    ) -> None:
        self.image_size = image_size
        self.resize = round(image_size * 256 / 224) if resize is None else resize
        if self.resize < image_size:
            raise ConfigError(
                f"resize {self.resize} is smaller than image_size {image_size}",
                fix=f"set resize to {image_size} or more, or leave it out",
            )
        self.interpolation = interpolation
        self.mean, self.std = tuple(mean), tuple(std)
        self.channels = len(self.mean)
        self.crop_mode: CropMode = crop_mode
        self.augmentation = current_name(augmentation)
        self.cache_images = cache_images
        self._augment = augmentation_transform(self.augmentation, image_size, self.resize, self.channels)
        if decode == "gpu" and (reason := self._reason_not_on_gpu()):
            raise ConfigError(f"decode: gpu is not possible: {reason}", fix="set decode: auto")
        self.decodes_on: Literal["cpu", "gpu"] = "cpu" if decode == "cpu" or self._reason_not_on_gpu() else "gpu"

    def _reason_not_on_gpu(self) -> str | None:
        if self.channels != 3:
            return f"images have {self.channels} channels: expected 3"
        if self.augmentation not in ("default", "none"):
            return "the augmentation is neither default nor none"
        return None if device_decoding.can_decode_on_gpu() else "there is no GPU (CUDA) that decodes JPEG files"

    def restore(self, described: Mapping[str, Any]) -> None:
        """Decode as in the training of a saved model, unless this machine cannot.

        Args:
            described: Result of :meth:`describe` in training.
        """
        self.decodes_on = described.get("decode", "cpu")
        if self.decodes_on == "gpu" and (reason := self._reason_not_on_gpu()):
            self.decodes_on = "cpu"
            warnings.warn(
                f"the model was trained on JPEG files decoded by a GPU, and {reason}: pixels may differ by rounding",
                stacklevel=2,
            )

    @property
    def keep_bytes(self) -> int | None:
        """Memory limit that ``cache_images`` sets, in bytes; None: half of the available memory."""
        if self.decodes_on == "gpu":
            return 0  # decoding on the GPU is faster than reading decoded images from memory
        if self.cache_images == "auto":
            return None
        return 0 if self.cache_images == "off" else int(self.cache_images * 2**30)

    def encode(self, values: Sequence[Any]) -> list[Tensor | EncodedJpeg]:
        """Decode PIL images, apply their orientation, convert them to RGB or gray and resize them.

        Arrays of uint8, (H, W) or (H, W, C), are only resized.

        Returns:
            A uint8 tensor (C, H, W) for each value; in the crop mode ``center`` min(H, W) is ``resize``. Or a JPEG file
            that :meth:`to_device` decodes.

        Raises:
            ValueError, OSError: A value is no image, is damaged or has another number of channels.
        """
        # Decoders release the GIL. In loader processes and if the user wants a single thread, there is one thread.
        threads = min(torch.get_num_threads(), len(values))
        if threads < 2:
            return [self._encode(value) for value in values]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode, values))

    def _encode(self, value: Any) -> Tensor | EncodedJpeg:
        if self.decodes_on == "gpu" and isinstance(value, Image.Image):
            jpeg = device_decoding.encoded_jpeg(value, self.resize, self.crop_mode)
            if jpeg is not None:
                return jpeg
        if isinstance(value, np.ndarray):
            return self._encode_array(value, self.crop_mode)
        if not isinstance(value, Image.Image):
            raise ValueError(f"expected a PIL image, got {type(value).__name__}")
        if self.channels not in (1, 3):
            raise ValueError(
                f"expected an array (H, W, {self.channels}) of uint8, got a PIL image, which has 1 or 3 channels"
            )
        pixels = decode(value, self.resize, self.interpolation, self.crop_mode)
        if self.channels == 1:
            # The weights of the three channels do not exactly add up to 1, so gray pixels would lose a level.
            is_gray = all(torch.equal(pixels[0], other) for other in pixels[1:])
            pixels = pixels[:1] if is_gray else v2.functional.rgb_to_grayscale(pixels)
        return pixels

    def _encode_array(self, value: npt.NDArray[Any], crop_mode: CropMode) -> Tensor:
        array = value[..., None] if value.ndim == 2 else value
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != self.channels or not array.size:
            raise ValueError(
                f"expected an array of uint8 (H, W, {self.channels}), got {value.dtype} {tuple(value.shape)}"
            )
        image = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
        mode = v2.InterpolationMode(self.interpolation)
        width, height = resized_size((array.shape[1], array.shape[0]), self.resize, crop_mode)
        resized: Tensor = v2.functional.resize(image, [height, width], mode, antialias=True)
        return resized

    @property
    def augments(self) -> bool:
        """Whether there is a random augmentation."""
        return self._augment is not None

    def augment(self, encoded: Tensor | EncodedJpeg) -> Tensor | EncodedJpeg:
        """Apply the random augmentation to a uint8 tensor (C, H, W); the result is uint8 (C, H', W').

        For a JPEG file it is only drawn, with the same result.
        """
        if self._augment is None:
            return encoded
        if isinstance(encoded, EncodedJpeg):
            return encoded.augmented(*self._augment.transforms)
        augmented: Tensor = v2.functional.to_dtype(self._augment(encoded), torch.uint8, scale=True)
        return augmented

    def collate(self, encoded: Sequence[Tensor | EncodedJpeg]) -> Tensor | tuple[Tensor, Tensor]:
        """Crop the center and stack. Smaller images are padded with black, or the mean color of a border.

        Args:
            encoded: B uint8 tensors (C, H, W), of any sizes, or JPEG files.

        Returns:
            A uint8 tensor (B, C, image_size, image_size), channels last in memory. With JPEG files, their bytes and the
            transforms of their pixels (:func:`transfer_vision.images.device_decoding.collate`).
        """
        pixels = [self._center_crop(value) for value in encoded if not isinstance(value, EncodedJpeg)]
        if len(pixels) < len(encoded):
            cropped = iter(pixels)
            return device_decoding.collate(
                [value if isinstance(value, EncodedJpeg) else next(cropped) for value in encoded]
            )
        size, channels = self.image_size, self.channels
        batch = torch.empty((len(encoded), size, size, channels), dtype=torch.uint8)
        for target, image in zip(batch, pixels, strict=True):
            target.copy_(image.permute(1, 2, 0))
        return batch.permute(0, 3, 1, 2)

    def _center_crop(self, pixels: Tensor) -> Tensor:
        cropped: Tensor = v2.functional.center_crop(self._padded(pixels), [self.image_size, self.image_size])
        return cropped

    def to_device(self, inputs: Tensor | tuple[Tensor, Tensor], device: torch.device) -> Tensor:
        """Move a uint8 batch (B, C, S, S) to a device and normalize it there; a copy of bytes is four times as fast.

        JPEG files are decoded on the device.

        Returns:
            A float32 tensor (B, C, S, S), channels last in memory.
        """
        if isinstance(inputs, tuple):
            inputs = device_decoding.decode_batch(
                inputs, device, self.image_size, self.interpolation, self._center_crop
            )
        pixels = inputs.to(device, non_blocking=True).permute(0, 2, 3, 1)
        count, height, width, channels = pixels.shape
        # With a complete row of pixels as the last dimension, the CPU uses vector instructions.
        mean, std = _normalization(self.mean, self.std, width, device)
        rows = pixels.reshape(count, height, width * channels).float().sub_(mean).div_(std)
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2)

    def _padded(self, pixels: Tensor) -> Tensor:
        """Pad an image (C, H, W) to the input size with the mean color in the crop mode ``border``."""
        height, width = (max(0, self.image_size - side) for side in pixels.shape[1:])
        if self.crop_mode != "border" or not (height or width):
            return pixels
        sides = [width // 2, height // 2, width - width // 2, height - height // 2]  # left, top, right, bottom
        padded: Tensor = v2.functional.pad(pixels, sides, fill=[float(round(255 * value)) for value in self.mean])
        return padded

    def render_batch(
        self, inputs: Tensor, values: Sequence[Any], captions: Sequence[str], groups: Mapping[str, Sequence[int]]
    ) -> bytes:
        """Draw the images of a batch, float32 (B, C, S, S), without normalization; return the bytes of a PNG file.

        Only the first three channels are drawn; fewer than three are drawn as the gray values of the first.
        """
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        # Inverse of the normalization in to_device().
        pixels = inputs.cpu().float().mul(std).add_(mean).mul_(255).round_().clamp_(0, 255).byte()
        pixels = pixels[:, :3] if self.channels >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
        images = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in pixels]
        return draw_grid(images, captions, groups)

    def thumbnail(self, value: Any) -> bytes:
        """Return a raw value as a small upright image without augmentation: the bytes of a JPEG file.

        Only the first three channels are drawn; fewer than three are drawn as the gray values of the first.
        """
        if isinstance(value, np.ndarray):
            pixels = self._encode_array(value, "center")
            pixels = pixels[:3] if self.channels >= 3 else pixels[:1].expand(3, -1, -1)
        else:
            pixels = decode(value, min(THUMBNAIL_PIXELS, *value.size), "bilinear")
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        image.thumbnail((2 * THUMBNAIL_PIXELS, 2 * THUMBNAIL_PIXELS))
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=88)
        return file.getvalue()

    def read(self, source: str) -> Image.Image:
        """Open the image at a path.

        Raises:
            transfer.DataError: The file is missing or no image.
        """
        path = Path(source)
        try:
            path = path.expanduser()
            if path.exists() and not path.is_file() and not path.is_dir():
                raise OSError("it is no regular file")  # a device or pipe may never end
            return open_image(path.read_bytes(), str(path))
        except FileNotFoundError as error:
            raise DataError("there is no such image", where=str(path)) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"this image cannot be read: {error}", where=str(path)) from error

    def read_bytes(self, content: bytes) -> Image.Image:
        """Open the image with this encoded content, within limits on its format and size.

        Raises:
            ValueError, OSError: The content is no image of a common format, or decoding it would take too much time or
                memory.
        """
        return open_upload(content, "the image")

    def example(self) -> Image.Image | npt.NDArray[np.uint8]:
        """Return a black image, or an array if the number of channels is neither 1 nor 3."""
        if self.channels in (1, 3):
            return Image.new("RGB", (self.resize, self.resize))
        return np.zeros((self.resize, self.resize, self.channels), np.uint8)

    def standalone_code(self) -> str | None:
        """Return code that needs only NumPy and Pillow; None if there are neither one nor three channels."""
        return inspect.getsource(standalone) if self.channels in (1, 3) else None

    def describe(self) -> Mapping[str, Any]:
        """Return the resolved options."""
        return {
            "image_size": self.image_size,
            "resize": self.resize,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            "augmentation": self.augmentation,
            "crop_mode": self.crop_mode,
            "decode": self.decodes_on,
        }


@functools.lru_cache(maxsize=16)
def _normalization(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the values of a row of pixels, (width * C,); copied to a device once."""
    with torch.device("cpu"):  # the caller may be building on the meta device
        row_mean, row_std = (torch.tensor(values).mul(255).repeat(width) for values in (mean, std))
    return row_mean.to(device), row_std.to(device)
