"""Datasets of images: folders, published archives, and drawn shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from transfer import (
    ClassFolders,
    Data,
    DataError,
    Dataset,
    DataSpec,
    FileListing,
    Split,
    data_folder,
    download,
    find_file,
)
from transfer_vision.data.shapes import SHAPES, ShapeImages
from transfer_vision.images.image_sources import (
    ArchiveSource,
    FolderSource,
    ImageColumn,
    ImageSource,
    has_image_extension,
    has_torchvision_extension,
    open_source,
)
from transfer_vision.images.validation import BadFiles, decodable_images


class ImageFolder(Dataset):
    """Images in one folder per class, with or without one folder per split.

    The layout is ``root/train/CLASS/*``, ``root/val/CLASS/*`` ..., or ``root/CLASS/*``, from which a test split is cut.

    Args:
        root: Path of the folder or zip archive, relative to the working folder or the data folder.
        train: Name of the folder of the training split.
        val: Name of the folder of the validation split; null: ``validation``, ``valid`` or ``val`` if it exists.
            Without a test split it is the test split, and the validation split is cut from the training split.
        test: Name of the folder of the test split; null: ``test`` if it exists.
        test_fraction: Fraction of each class that becomes the test split if there are no folders of splits. The choice
            depends on the paths only.
        bad_files: Action for images that cannot be decoded: ``error`` refuses the data; ``skip`` leaves them out and
            logs a table of them.
    """

    def __init__(
        self,
        *,
        root: str,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2,
        bad_files: BadFiles = "error",
    ) -> None:
        self._root = root
        self._folders = ClassFolders("images", train=train, val=val, test=test, test_fraction=test_fraction)
        self._bad_files: BadFiles = bad_files

    @property
    def spec(self) -> DataSpec:
        """One image and one class; the names of the classes are unknown until the folders are read."""
        return DataSpec(("image",), "class")

    def load(self) -> Data:
        """List the images, and decode the new ones to check them.

        Raises:
            transfer.DataError: A folder is missing or empty, a split has a class that train lacks, or an image is bad.
        """
        path = Path(self._root).expanduser()
        source = open_source(path if path.exists() else find_file(self._root) or path)
        listing = self._folders.list_files(source.levels(), has_image_extension, source.name)
        return _data(source, listing, self._bad_files)


class PublishedImages(Dataset):
    """A published archive with a folder per split and class, or the folder that it unpacks to.

    Args:
        bad_files: Action for images that cannot be decoded: ``error`` refuses the data; ``skip`` leaves them out and
            logs a table of them.
    """

    folder: ClassVar[str]
    """The folder in the archive. The archive has the same name."""
    url: ClassVar[str]
    splits: ClassVar[Mapping[str, tuple[str, int]]]
    """The folder and the number of images of each split."""
    classes: ClassVar[tuple[str, ...]]

    def __init__(self, *, bad_files: BadFiles = "error") -> None:
        self._bad_files: BadFiles = bad_files

    @property
    def spec(self) -> DataSpec:
        """One image and one class."""
        return DataSpec(("image",), "class", self.classes)

    def load(self) -> Data:
        """Find or download the archive and list its images. Nothing is unpacked, and new images are decoded once.

        Raises:
            transfer.DataError: The archive is missing and cannot be downloaded, contains other images than published,
                or an image is bad.
        """
        archive = f"{self.folder}.zip"
        path = find_file(archive, self.folder) or download(self.url, archive)
        source = FolderSource(path) if path.is_dir() else ArchiveSource(path, self.folder)
        levels = source.levels()
        missing = [folder for folder, _ in self.splits.values() if folder not in levels]
        # Published archives have known contents: anything else is a damaged or another download.
        fix = f"remove it; {self.url} is then downloaded to {data_folder()} again"
        if missing:
            raise DataError(f"there is no folder {missing[0]!r} in it", where=source.name(""), fix=fix)
        folders = ClassFolders("images", train=self.splits["train"][0], test=self.splits["test"][0])
        listing = folders.list_files(levels, has_torchvision_extension, source.name, quiet=True)
        counts = {split: len(paths) for split, paths in listing.paths.items()}
        expected = {split: count for split, (_, count) in self.splits.items()}
        if counts != expected or listing.classes != self.classes:
            raise DataError(
                f"wrong content: expected {expected} images of {', '.join(self.classes)}, "
                f"got {counts} of {', '.join(listing.classes)}",
                where=source.name(""),
                fix=fix,
            )
        return _data(source, listing, self._bad_files)


class Hymenoptera(PublishedImages):
    """Ants and bees: 244 training and 153 test images, from PyTorch's transfer-learning tutorial.

    The tutorial's ``val`` folder is the test split. https://download.pytorch.org/tutorial/hymenoptera_data.zip
    """

    folder = "hymenoptera_data"
    url = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
    splits = {"train": ("train", 244), "test": ("val", 153)}
    classes = ("ants", "bees")


class HotDog(PublishedImages):
    """Hot dogs and other food: 2000 training and 800 test images, from Dive into Deep Learning.

    https://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip
    """

    folder = "hotdog"
    url = "https://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip"
    splits = {"train": ("train", 2000), "test": ("test", 800)}
    classes = ("hotdog", "not-hotdog")


class Shapes(Dataset):
    """Circles, squares and triangles on noisy backgrounds, drawn on access; no file or network is needed.

    All classes have the same distributions of area, color and position, so that they only differ in the outline.

    Args:
        per_class: Number of training images of each class. The validation and test splits have a quarter of it each.
        image_size: Height and width of the images, in pixels.
        seed: Seed of the drawn images.
    """

    def __init__(
        self,
        *,
        per_class: Annotated[int, Field(ge=4)] = 200,
        image_size: Annotated[int, Field(ge=16)] = 64,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self._per_class = per_class
        self._image_size = image_size
        self._seed = seed

    @property
    def spec(self) -> DataSpec:
        """One image and one of three shapes."""
        return DataSpec(("image",), "class", SHAPES)

    def load(self) -> Data:
        """Return the three splits; an image is drawn on access."""
        few = self._per_class // 4
        counts = {"train": self._per_class, "validation": few, "test": few}
        splits = {}
        for number, (split, count) in enumerate(counts.items()):
            # Seeded by split as well: otherwise the test split would repeat training images.
            images = ShapeImages(count * len(SHAPES), self._image_size, (self._seed, number))
            targets = images.targets()
            names = [f"shapes/{split}/{SHAPES[target]}/{index}" for index, target in enumerate(targets)]
            splits[split] = Split({"image": images}, targets, names)
        return Data(self.spec, splits)


def _data(source: ImageSource, listing: FileListing, bad_files: BadFiles) -> Data:
    """Return the data of the listed images that can be decoded."""
    everything = [path for paths in listing.paths.values() for path in paths]
    good = decodable_images(source, everything, bad_files)
    splits = {}
    for split, paths in listing.paths.items():
        # Targets must lose the same rows as the paths.
        decodable = np.array([path in good for path in paths])
        targets = listing.targets[split][decodable]
        remaining = [path for path in paths if path in good]
        # A class without images would be an output that is never trained or scored.
        lost = set(listing.targets[split].tolist()) - set(targets.tolist())
        if lost:
            name = listing.classes[min(lost)]
            raise DataError(
                f"class {name!r} of the {split} split has no good image", where=source.name(""), fix="repair some"
            )
        splits[split] = Split(
            {"image": ImageColumn(source, remaining)}, targets, [source.name(path) for path in remaining]
        )
    return Data(DataSpec(("image",), "class", listing.classes), splits)
