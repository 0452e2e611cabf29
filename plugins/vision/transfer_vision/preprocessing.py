"""From PIL images to a normalised batch: resize, augment, crop, normalise."""

from __future__ import annotations

import difflib
import inspect
import io
import typing
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
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
from transfer_vision.images.decoding import Interpolation, decode, open_picture
from transfer_vision.images.image_grid import draw_grid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

THUMBNAIL_PIXELS = 160
"""Of the shorter side of a picture on a page."""

Augmentation = Literal["usual", "strong", "none"] | list[dict[str, Any]]
CacheImages = Literal["auto", "off"] | Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Preset:
    """How pictures were prepared when weights were evaluated.

    Args:
        image_size: Height and width of what the model sees.
        resize: Pixels of the shorter side before the crop.
        interpolation: The filter of that resize.
        mean: Of each channel in the pretraining data, for values in [0, 1].
        std: Standard deviation of each channel, likewise.
    """

    image_size: int
    resize: int
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, weights: WeightsEnum) -> Self:
        """Return that of published weights."""
        facts = weights.transforms()
        (size,), (resize,) = facts.crop_size, facts.resize_size
        return cls(size, resize, facts.interpolation.value, tuple(facts.mean), tuple(facts.std))

    def for_channels(self, count: int) -> Preset:
        """Return it for another number of channels: the mean of the three for one, else the three over and over."""
        if len(self.mean) == count:
            return self
        mean, std = (
            (sum(values) / len(values),) if count == 1 else tuple(islice(cycle(values), count))
            for values in (self.mean, self.std)
        )
        return replace(self, mean=mean, std=std)

    def with_wishes(self, **wishes: Any) -> Preset:
        """Return it with some values replaced (None: left as it is); another image_size scales ``resize`` with it.

        Raises:
            transfer.ConfigError: There are more or fewer means or deviations than channels.
        """
        wishes = {name: value for name, value in wishes.items() if value is not None}
        for name in ("mean", "std"):
            if len(wishes.get(name, self.mean)) != len(self.mean):
                raise ConfigError(
                    f"{name} has {len(wishes[name])} numbers for {len(self.mean)} channels",
                    fix=f"give {len(self.mean)}, or set in_channels",
                )
        if "image_size" in wishes:
            wishes = {"resize": round(wishes["image_size"] * self.resize / self.image_size), **wishes}
        return replace(self, **wishes)


class ImagePreprocessing(Preprocessing):
    """Preprocessing of pictures as torchvision's classification models are evaluated and fine-tuned.

    Args:
        image_size: Height and width of what the model sees.
        resize: Pixels of the shorter side before the crop; null: 256/224 of ``image_size``.
        interpolation: The filter of that resize, antialiased.
        mean: Of each channel in the pretraining data, for values in [0, 1]. There are as many channels as means.
        std: Standard deviation of each channel, likewise.
        augmentation: ``usual`` (a random resized crop and a horizontal flip), ``strong`` (with TrivialAugment and
            random erasing after them), ``none``, or a list of torchvision.transforms.v2 classes with options, in
            order: ``[{name: ColorJitter, brightness: 0.2}]``.
        cache_images: Keep decoded and resized pictures in memory from one epoch to the next, where those of a split
            fit: ``auto`` (into half of the memory that is available), ``off``, or into so many GiB.
    """

    media_type: ClassVar[str] = "image/*"

    def __init__(
        self,
        *,
        image_size: int = 224,
        resize: int | None = None,
        interpolation: Interpolation = "bilinear",
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        augmentation: Augmentation = "usual",
        cache_images: CacheImages = "auto",
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
        self.augmentation = augmentation
        self.cache_images = cache_images
        self._augment = _transform(augmentation, image_size, self.resize, self.channels)

    @property
    def keep_bytes(self) -> int | None:
        """As ``cache_images`` says."""
        if self.cache_images == "auto":
            return None
        return 0 if self.cache_images == "off" else int(self.cache_images * 2**30)

    def encode(self, values: Sequence[Any]) -> list[Tensor]:
        """Decode PIL images, turn them upright, convert them to RGB or grey and resize their shorter side.

        An array of uint8, (H, W) or (H, W, C), is taken as it is and resized.

        Returns:
            For each a uint8 tensor (C, H, W) with min(H, W) = ``resize``.

        Raises:
            ValueError, OSError: A value is no picture, or is a damaged one, or has other channels.
        """
        # Decoders leave Python's lock alone. A loader process has one thread, and so has who wants no others.
        threads = min(torch.get_num_threads(), len(values))
        if threads < 2:
            return [self._encode(value) for value in values]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode, values))

    def _encode(self, value: Any) -> Tensor:
        if isinstance(value, np.ndarray):
            return self._encode_array(value)
        if not isinstance(value, Image.Image):
            raise ValueError(f"expected a PIL image, got {type(value).__name__}")
        if self.channels not in (1, 3):
            raise ValueError(f"a picture has 3 channels or is grey; {self.channels} channels come as arrays (H, W, C)")
        pixels = decode(value, self.resize, self.interpolation)
        if self.channels == 1:
            # The weights of the channels do not quite make 1: of grey they would lose a level.
            grey = all(torch.equal(pixels[0], other) for other in pixels[1:])
            pixels = pixels[:1] if grey else v2.functional.rgb_to_grayscale(pixels)
        return pixels

    def _encode_array(self, value: npt.NDArray[Any]) -> Tensor:
        array = value[..., None] if value.ndim == 2 else value
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != self.channels or not array.size:
            raise ValueError(
                f"expected an array of uint8 (H, W, {self.channels}), got {value.dtype} {tuple(value.shape)}"
            )
        image = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
        mode = v2.InterpolationMode(self.interpolation)
        resized: Tensor = v2.functional.resize(image, [self.resize], mode, antialias=True)
        return resized

    @property
    def augments(self) -> bool:
        """There is a random augmentation."""
        return self._augment is not None

    def augment(self, encoded: Tensor) -> Tensor:
        """Apply the random augmentation to a uint8 tensor (C, H, W); the result is uint8 (C, H', W')."""
        if self._augment is None:
            return encoded
        augmented: Tensor = v2.functional.to_dtype(self._augment(encoded), torch.uint8, scale=True)
        return augmented

    def collate(self, encoded: Sequence[Tensor]) -> Tensor:
        """Crop the centre (what is smaller is padded with black), stack and normalise.

        Args:
            encoded: B uint8 tensors (C, H, W), of any sizes.

        Returns:
            A float32 tensor (B, C, image_size, image_size), channels last in memory.
        """
        size, channels = self.image_size, self.channels
        batch = torch.empty((len(encoded), size, size, channels), dtype=torch.uint8)
        for place, pixels in zip(batch, encoded, strict=True):
            place.copy_(v2.functional.center_crop(pixels, [size, size]).permute(1, 2, 0))
        # With a row of pixels as the last dimension the processor works on many values at once.
        mean, std = (torch.tensor(values).mul(255).repeat(size) for values in (self.mean, self.std))
        rows = batch.view(len(encoded), size, size * channels).float().sub_(mean).div_(std)
        return rows.view(batch.shape).permute(0, 3, 1, 2)

    def render_batch(
        self, inputs: Tensor, values: Sequence[Any], captions: Sequence[str], groups: Mapping[str, Sequence[int]]
    ) -> bytes:
        """Draw the pictures of a batch, float32 (B, C, S, S), in their own colours: the bytes of a PNG file.

        Of more than three channels the first three are drawn; fewer than three are drawn as the grey of the first.
        """
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        pixels = inputs.cpu().float().mul(std).add_(mean).mul_(255).round_().clamp_(0, 255).byte()
        pixels = pixels[:, :3] if self.channels >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
        pictures = [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in pixels]
        return draw_grid(pictures, captions, groups)

    def thumbnail(self, value: Any) -> bytes:
        """Return a raw value in few pixels, upright, its colours as they are: the bytes of a JPEG file.

        Of more than three channels the first three are drawn; fewer than three are drawn as the grey of the first.
        """
        if isinstance(value, np.ndarray):
            pixels = self._encode_array(value)
            pixels = pixels[:3] if self.channels >= 3 else pixels[:1].expand(3, -1, -1)
        else:
            pixels = decode(value, min(THUMBNAIL_PIXELS, *value.size), "bilinear")
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        image.thumbnail((2 * THUMBNAIL_PIXELS, 2 * THUMBNAIL_PIXELS))
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=88)
        return file.getvalue()

    def read(self, source: str) -> Image.Image:
        """Open the picture at a path.

        Raises:
            transfer.DataError: There is no file, or it is no picture.
        """
        path = Path(source)
        try:
            path = path.expanduser()
            if path.exists() and not path.is_file() and not path.is_dir():
                raise OSError("it is no regular file")  # and may have no end
            return open_picture(path.read_bytes(), str(path))
        except FileNotFoundError as error:
            raise DataError("there is no such picture", where=str(path)) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"this picture cannot be read: {error}", where=str(path)) from error

    def read_bytes(self, content: bytes) -> Image.Image:
        """Open the picture that is so encoded."""
        return open_picture(content, "the picture")

    def example(self) -> Image.Image | npt.NDArray[np.uint8]:
        """Return a black picture, or an array where pictures do not have so many channels."""
        if self.channels in (1, 3):
            return Image.new("RGB", (self.resize, self.resize))
        return np.zeros((self.resize, self.resize, self.channels), np.uint8)

    def describe(self) -> Mapping[str, Any]:
        """Return the options as they hold, with ``resize`` filled in."""
        return {
            "image_size": self.image_size,
            "resize": self.resize,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            "augmentation": self.augmentation,
        }


def _transform(augmentation: Augmentation, image_size: int, resize: int, channels: int) -> v2.Transform | None:
    if augmentation == "none" or augmentation == []:
        return None
    # The caller may be building on the meta device, and some transforms keep a tensor of their own.
    with torch.device("cpu"):
        usual = [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
        if augmentation == "usual":
            return v2.Compose(usual)
        if augmentation == "strong":
            transform = v2.Compose([*usual, v2.TrivialAugmentWide(), v2.RandomErasing(0.1)])
        else:
            transform = v2.Compose([_named_transform(step) for step in augmentation])
        _try(transform, resize, channels)
    return transform


def _names() -> list[str]:
    found = {key for key, value in vars(v2).items() if isinstance(value, type) and issubclass(value, v2.Transform)}
    return sorted(found - {"Transform"})


def _named_transform(step: Mapping[str, Any]) -> v2.Transform:
    options = dict(step)
    name = options.pop("name", None)
    names = _names()
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        raise ConfigError(
            "an augmentation needs a name"
            if name is None
            else f"torchvision.transforms.v2 has no augmentation {name!r}",
            available=close or names,
            fix=f"did you mean {close[0]!r}?" if close else "write {name: CLASS, OPTION: VALUE}",
        )
    cls: type[v2.Transform] = getattr(v2, name)
    known = [key for key in inspect.signature(cls).parameters if key not in ("args", "kwargs")]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"augmentation {name} has no option {key!r}",
                available=known,
                fix=f"did you mean {near[0]!r}?" if near else None,
            )
    if "transforms" in known:  # RandomApply, RandomChoice, RandomOrder, Compose
        inner = options.get("transforms")
        if not isinstance(inner, list) or not all(isinstance(one, Mapping) for one in inner):
            raise ConfigError(f"augmentation {name} needs transforms", fix="write transforms: [{name: CLASS, ...}]")
        options["transforms"] = [_named_transform(one) for one in inner]
    try:
        return cls(**_with_enums(cls, options))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"augmentation {name} does not take {options}: {error}", available=known) from error


def _with_enums(cls: type[v2.Transform], options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``bilinear`` or ``imagenet`` into the member of torchvision's enumeration that the option wants."""
    hints = typing.get_type_hints(cls.__init__)
    converted = dict(options)
    for key, value in options.items():
        for hint in (hints.get(key), *typing.get_args(hints.get(key))):
            if isinstance(value, str) and isinstance(hint, type) and issubclass(hint, Enum):
                converted[key] = hint(value)
    return converted


def _try(transform: v2.Transform, resize: int, channels: int) -> None:
    """Run an augmentation once, so that one which cannot work is refused before any picture is read."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to draw
        picture = torch.zeros(channels, resize, resize, dtype=torch.uint8)
        try:
            result = transform(picture)
        # Whatever a transform raises on a plain picture, it would raise on the user's pictures too.
        except Exception as error:
            raise ConfigError(
                f"the augmentation fails on a picture of {resize} x {resize} pixels and {channels} channels: {error}",
                fix="augmentations take and return one picture of 8-bit values; look at their order and sizes",
            ) from error
    if not isinstance(result, Tensor) or result.ndim != 3 or result.shape[0] != channels:
        what = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ConfigError(
            f"the augmentation does not return a picture of {channels} channels but {what}",
            fix="leave out the step that changes the number of channels",
        )
